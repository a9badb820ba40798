"""Fixtures to import: a server of the small checkpoint on loopback, with OpenAI's client, and requests to it."""

# ruff: noqa: F811  (fixtures are imported)

import base64
import http.client
import io
import time

import numpy as np
import pytest
from PIL import Image

from janus_jax.serving.engine import Engine
from tests.library.tiny_janus import QUESTION, folder, janus  # noqa: F401
from tests.serving.api.on_loopback import data_url, on_loopback

openai = pytest.importorskip("openai")
for name in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(name)

from janus_jax.serving.api import schema  # noqa: E402, F401
from janus_jax.serving.api.app import make_app  # noqa: E402
from janus_jax.serving.api.media import Remote  # noqa: E402
from janus_jax.serving.api.served import Limits, Served  # noqa: E402

MODEL, LIMIT = "janus-tiny", 20
NO_SYSTEM = {"role": "system", "content": ""}


@pytest.fixture(scope="module")
def served(janus):
    with Engine(janus, slots=5, max_queue=40) as engine:
        limits = Limits(body=1 << 20, body_seconds=1.0, images=3)
        yield Served(engine, {MODEL: None, "other-name": None}, limits, api_key="secret", remote=Remote(("localhost",)))


@pytest.fixture(scope="module")
def port(served):
    with on_loopback(make_app(served)) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.integers(low, low + 100, (40, 60, 3), np.uint8) for low in (0, 80, 155)]


def asking(*pictures, text: str = QUESTION, **how):
    images = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    user = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    return {"model": MODEL, "messages": [NO_SYSTEM, user], "max_tokens": LIMIT} | how


def opened(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def is_free(served: Served) -> bool:
    deadline = time.monotonic() + 30
    while not served.engine.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    return served.engine.idle


def raw(port: int, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Authorization": "Bearer secret", **headers})
    answer = connection.getresponse()
    return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
