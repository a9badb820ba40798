"""`python -m janus_jax serve`: the server of one model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from janus_jax.io.messages import one_line
from janus_jax.pipeline import JanusPipeline
from janus_jax.serving.api.app import make_app
from janus_jax.serving.api.media import Remote
from janus_jax.serving.api.served import Served
from janus_jax.serving.engine import Engine


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
    with Engine(janus, slots, context, max_queue) as engine:
        print("compiling", file=sys.stderr, flush=True)
        engine.warm_up()
        of_models = dict.fromkeys(names) | {name: name for name in janus.adapters.names}
        served = Served(engine, of_models, api_key=api_key, remote=Remote(tuple(hosts)))
        config = uvicorn.Config(
            make_app(served),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(grace)),
            server_header=False,
        )
        host, port = listening.getsockname()[:2]
        print(f"serving {', '.join(map(one_line, of_models))} at http://{host}:{port}", file=sys.stderr, flush=True)
        asyncio.run(_Server(config).serve([listening]))
