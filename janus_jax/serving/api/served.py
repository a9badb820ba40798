"""What the routes share: the engine, the models' names, limits, and threads for what takes longer than a moment."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from janus_jax.io.messages import did_you_mean, one_line
from janus_jax.pipeline import JanusPipeline
from janus_jax.serving.api.errors import ApiError
from janus_jax.serving.api.media import Remote
from janus_jax.serving.api.metrics import Metrics
from janus_jax.serving.engine import Engine

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
      body: bytes of a body; body_seconds: in which it must have come.
      images: in the messages of a request; image_bytes: memory that opening one may take.
      choices: answers to a request; drawings: images of a request.
      max_tokens: the most tokens of an answer whose request does not say.
      url_seconds, url_bytes: how long, and how many bytes of, the images behind URLs are kept.
    """

    body: int = 32 << 20
    body_seconds: float = 60.0
    images: int = 16
    image_bytes: int = 256 << 20
    choices: int = 8
    drawings: int = 10
    max_tokens: int = 512
    url_seconds: float = 3600.0
    url_bytes: int = 256 << 20


@dataclasses.dataclass(eq=False)
class Served:
    """A model that is served.

    Attributes:
      names: model names, and the adapter behind each (None: the model itself); the first is the model's own.
      api_key: what clients must send as a bearer token; None for none.
      remote: from where pictures may be fetched.
    """

    engine: Engine
    names: dict[str, str | None]
    limits: Limits = dataclasses.field(default_factory=Limits)
    api_key: str | None = None
    remote: Remote = dataclasses.field(default_factory=Remote)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    metrics: Metrics = dataclasses.field(init=False)

    def __post_init__(self):
        self.metrics = Metrics(self.engine)
        self.empty: np.ndarray | None = None  # the codes of a gray picture, once somebody needs them
        self._threads = asyncio.Semaphore(4)  # each may hold an image's worth of memory

    @property
    def janus(self) -> JanusPipeline:
        return self.engine.janus

    def adapter(self, name: str | None) -> tuple[str, str | None]:
        """The name of a model and its adapter, from what a request says; 404 for an unknown one."""
        if name is None:
            return next(iter(self.names.items()))
        if name not in self.names:
            told = did_you_mean(name, self.names) or f"; there is {', '.join(map(one_line, self.names))}"
            raise ApiError(
                404, f"there is no model named {one_line(name)}{told}", param="model", code="model_not_found"
            )
        return name, self.names[name]

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Runs `work` in a thread, of which there are a few: it must not hold up other requests."""
        async with self._threads:
            return await asyncio.to_thread(work)


def some_seed() -> int:
    """A seed for a request that gives none."""
    return secrets.randbelow(2**32)
