"""Object stores on loopback: gcp-storage-emulator and moto's server, behind a proxy that can be slow and fail.

What they cannot show: credentials and rights, and the speed of a network. Conditions on generations, which
gcp-storage-emulator ignores, are checked by the proxy (moto checks those of S3 by itself).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import http.server
import json
import logging
import os
import random
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

BUCKET = "janus-test"
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as `store_access`, if gcsfs is imported before


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to `port`, `delay` seconds late, or fails them with a status or by hanging up.

    Attributes:
      requests: method and path of every request so far.
      most: how many requests have waited at the same time.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.delay, self.requests = port, 0.0, []
        self.waiting = self.most = 0
        self._counting = threading.Lock()
        self._random, self._faults = random.Random(0), {}
        self._one = threading.Lock()  # gcp-storage-emulator takes one request at a time
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @contextlib.contextmanager
    def failing(
        self,
        share: float = 1.0,
        most: int = 1 << 30,
        kinds: tuple[str, ...] = ("503", "drop"),
        methods: tuple[str, ...] = (),
    ):
        """Fails `share` of the requests (of these `methods`), at most `most`; yields the faults so far, by kind."""
        counts = dict.fromkeys(kinds, 0)
        self._faults = {"share": share, "left": most if kinds else 0, "counts": counts, "methods": methods}
        try:
            yield counts
        finally:
            self._faults = {}

    def about(self, folder) -> int:
        """How many requests named `folder`: readers of another test may still be trying to get what is theirs."""
        return sum(folder.name in urllib.parse.unquote(where) for _, where in self.requests)

    def count(self, change: int):
        with self._counting:
            self.waiting += change
            self.most = max(self.most, self.waiting)

    def fault(self, method: str) -> str:
        faults = self._faults
        if not faults or not faults["left"] or self._random.random() >= faults["share"]:
            return ""
        if faults["methods"] and method not in faults["methods"]:
            return ""
        faults["left"] -= 1
        kind = self._random.choice(list(faults["counts"]))
        faults["counts"][kind] += 1
        return kind

    def passed_on(self, method: str, path: str, headers: dict[str, str], body: bytes):
        """The emulator's answer and its content; None for the answer if a condition on a generation does not hold."""
        with self._one:
            found = urllib.parse.urlsplit(path)
            query = dict(urllib.parse.parse_qsl(found.query))
            if (wanted := query.get("ifGenerationMatch")) is not None:
                where = found.path.removeprefix("/upload")
                where = f"{where}/{urllib.parse.quote(query['name'], safe='')}" if "name" in query else where
                answer, data = self._ask("GET", where, {}, b"")
                if wanted != (json.loads(data)["generation"] if answer.status == 200 else "0"):
                    return None, b""
            return self._ask(method, path, headers, body)

    def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer, data

    def handle_error(self, *_):
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self):
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append((self.command, self.path))
        server.count(1)
        time.sleep(server.delay)
        server.count(-1)
        if kind := server.fault(self.command):
            if kind == "stall":  # says nothing until whoever asks has given up
                self.connection.settimeout(60)
                with contextlib.suppress(OSError):
                    self.rfile.read(1)
                self.close_connection = True
            elif kind == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._answer(int(kind), [("Content-Type", "text/plain")], b"busy" if kind == "503" else b"Forbidden")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        answer, data = server.passed_on(self.command, self.path, headers, body)
        if answer is None:
            self._answer(412, [("Content-Type", "text/plain")], b"conditionNotMet")
            return
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OWN]
        if self.command == "HEAD" and (length := answer.getheader("Content-Length")):
            kept.append(("Content-Length", length))
        self._answer(answer.status, kept, data)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve

    def log_message(self, *_):
        pass


_OWN = ("connection", "transfer-encoding", "content-length", "keep-alive", "date", "server")


def _started(kind: str) -> int:
    """The port of an emulator in a process of its own, which ends with this one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    child = subprocess.Popen([sys.executable, "-m", __name__, kind, str(port)], stdin=subprocess.PIPE)
    atexit.register(child.kill)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return port
        time.sleep(0.05)
    raise RuntimeError(f"the emulator of {kind} did not start")


def _complete_google():
    """What gcp-storage-emulator lacks: objects without bytes, and the generation of what is read, which OCDBT needs.

    And what it has too much of: it writes down all objects after each change, though they are gone with its memory.
    """
    from gcp_storage_emulator import server, storage

    read, described, write, latest = server._read_data, storage.Storage.get_file_obj, server.Response.write_file, {}
    server._read_data = lambda *given: b"" if (data := read(*given)) is None else data

    def get_file_obj(self, *given):
        latest["object"] = described(self, *given)
        return latest["object"]

    def write_file(self, *given, **named):
        self["x-goog-generation"] = latest["object"]["generation"]
        return write(self, *given, **named)

    storage.Storage.get_file_obj, server.Response.write_file = get_file_obj, write_file
    storage.Storage._write_config_to_file = lambda self: None


def main(kind: str, port: int):
    # Headers and content are sent apart: without this, the second waits 40 ms for the first to be acknowledged.
    socketserver.StreamRequestHandler.disable_nagle_algorithm = True
    if kind == "gs":
        from gcp_storage_emulator.server import create_server

        logging.disable(logging.ERROR)
        _complete_google()
        create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).start()
    else:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    sys.stdin.read()
    os._exit(0)


@functools.cache
def google() -> tuple[str, Proxy]:
    """`gs://BUCKET`, which this process and those that it starts reach at once, and the proxy before it."""
    proxy = Proxy(_started("gs"))
    address = f"http://127.0.0.1:{proxy.server_port}"
    os.environ |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    return f"gs://{BUCKET}", proxy


@functools.cache
def amazon() -> tuple[str, Proxy]:
    """`s3://BUCKET`, as `google`."""
    proxy = Proxy(_started("s3"))
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    proxy.passed_on("PUT", f"/{BUCKET}", {"Host": "127.0.0.1"}, b"")
    return f"s3://{BUCKET}", proxy


@contextlib.contextmanager
def slow(proxy: Proxy, seconds: float) -> Iterator[None]:
    proxy.delay = seconds
    try:
        yield
    finally:
        proxy.delay = 0.0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
