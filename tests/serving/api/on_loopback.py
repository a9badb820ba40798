"""Serves an application on loopback from a thread, and what requests to it are made of."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image


def data_url(picture: np.ndarray) -> str:
    """A uint8 picture [h, w, 3] as requests carry it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@contextlib.contextmanager
def on_loopback(app: Any, connection: Any = None) -> Iterator[int]:
    """The port at which `app` is served, as the command does it."""
    import uvicorn

    from janus_jax.serving.api.command import Connection

    kind = connection or Connection
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, http=kind))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
