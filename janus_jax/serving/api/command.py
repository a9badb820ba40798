"""`python -m janus_jax serve`: the server of one model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from janus_jax.io.messages import one_line
from janus_jax.pipeline import JanusPipeline
from janus_jax.sampling.speculative import Speculate
from janus_jax.serving.api.app import make_app
from janus_jax.serving.api.errors import ApiError
from janus_jax.serving.api.media import Remote
from janus_jax.serving.api.served import Served
from janus_jax.serving.engine import Engine


class Connection(H11Protocol):
    """uvicorn's, closed if its client keeps it waiting: for a request that does not come, or by not reading its answer.

    Such a client may have gone without a word, or hold many connections at once. The time of a body is the
    application's (`Limits.body_seconds`); that between requests uvicorn's own.
    """

    header_seconds, unread_seconds = 30.0, 60.0

    def connection_made(self, transport: asyncio.Transport):
        self._begun, self._deadline, self._unread = False, None, None
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes):
        self._begun = True
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None):
        for timer in (self._deadline, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self):
        super().pause_writing()
        self._unread = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch(self):
        """Sets the deadline for a request to come, unless one is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._late)

    def _late(self):
        self._deadline = None
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            return
        if self._begun:
            body = json.dumps(ApiError(408, f"the request did not come within {self.header_seconds:g} s").body).encode()
            head = f"HTTP/1.1 408 Request Timeout\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's, which ends with exit code 0 after SIGTERM, once what was under way is done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on; ValueError or OSError if it is not to be had. To be called before minutes of loading."""
    if not 0 <= port < 1 << 16:  # getaddrinfo takes it modulo that
        raise ValueError(f"--port must be from 0 (any) to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(found[0], found[1])
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(found[4])
        return listening
    except OSError as error:
        raise OSError(f"cannot listen at {one_line(host)}:{port} ({one_line(error)}); use another --port") from None


def serve(
    janus: JanusPipeline,
    listening: socket.socket,
    names: Sequence[str],
    *,
    slots: int = 16,
    context: int | None = None,
    max_queue: int = 256,
    speculate: Speculate = "auto",
    api_key: str | None = None,
    hosts: Sequence[str] = (),
    grace: float = 30.0,
):
    """Serves `janus` until SIGTERM or Ctrl-C; then finishes what is under way, for `grace` seconds at most.

    Args:
      names: of the model; its adapters have their own.
      hosts: from which pictures may be fetched.
    Raises: ValueError as `Engine` does.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with Engine(janus, slots, context, max_queue, speculate) as engine:
        print("compiling", file=sys.stderr, flush=True)
        engine.warm_up()
        of_models = dict.fromkeys(names) | {name: name for name in janus.adapters.names}
        served = Served(engine, of_models, api_key=api_key, remote=Remote(tuple(hosts)))
        config = uvicorn.Config(
            make_app(served),
            http=Connection,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(grace)),
            server_header=False,
        )
        host, port = listening.getsockname()[:2]
        print(f"serving {', '.join(map(one_line, of_models))} at http://{host}:{port}", file=sys.stderr, flush=True)
        asyncio.run(_Server(config).serve([listening]))
