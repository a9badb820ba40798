"""Clients that keep the server waiting: by requests that do not come, and answers that they do not read."""

import http.client
import json
import select
import socket
import time

import pytest

from tests.serving.api.on_loopback import on_loopback

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from janus_jax.serving.api.command import Connection

BODY = b"x" * (32 << 20)  # more than the buffers of both sides
ended = []


class Hasty(Connection):
    header_seconds, unread_seconds = 0.3, 0.3


async def app(scope, receive, send):
    """Answers with what was asked for: much, or little."""
    assert scope["type"] == "http", "uvicorn goes on without the lifespan's events"
    body = BODY if scope["path"] == "/much" else b"little"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    for start in range(0, len(body), 1 << 20):
        await send({"type": "http.response.body", "body": body[start : start + (1 << 20)], "more_body": True})
    await send({"type": "http.response.body"})
    ended.append(scope["path"])


@pytest.fixture(scope="module")
def port():
    with on_loopback(app, Hasty) as port:
        yield port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def test_a_half_open_connection_is_closed(port):
    with connected(port) as waiting:
        began = time.monotonic()
        assert waiting.recv(100) == b"" and time.monotonic() - began >= 0.25


def test_a_request_that_comes_too_slowly_is_told_so(port):
    with connected(port) as slow:
        answer = b""
        for byte in b"GET /little HTTP/1.1\r\nHost: here\r\n" + b"X-More: y\r\n" * 1000:
            slow.send(bytes([byte]))
            if select.select([slow], [], [], 0.01)[0]:
                break
        while piece := slow.recv(1000):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head
    assert json.loads(body)["error"]["message"] == "the request did not come within 0.3 s"


def test_the_time_is_each_request_s_own(port):
    """Over one connection, more often than the time for one allows."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(5):
        connection.request("GET", "/little")
        assert connection.getresponse().read() == b"little"
        time.sleep(0.1)
    with connected(port) as again:
        again.sendall(b"GET /little HTTP/1.1\r\nHost: here\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200 ")
        time.sleep(0.1)
        again.sendall(b"GET /lit")  # and no more
        rest = b""
        while piece := again.recv(1000):
            rest += piece
        assert b"HTTP/1.1 408 " in rest


def test_an_answer_that_nobody_reads_is_dropped(port):
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(20)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(b"GET /much HTTP/1.1\r\nHost: here\r\n\r\n")
        deadline = time.monotonic() + 20
        while "/much" not in ended and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "/much" in ended, "the application waits for a client that does not read"
        received = 0
        while piece := deaf.recv(1 << 20):
            received += len(piece)
        assert received < len(BODY)


def test_an_answer_that_is_read_slowly_comes_whole(port):
    with connected(port) as slow:
        slow.sendall(b"GET /much HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        received = 0
        while piece := slow.recv(8 << 20):
            received += len(piece)
            time.sleep(0.002)
    assert received > len(BODY)
