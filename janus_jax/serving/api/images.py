"""`POST /v1/images/generations`: drawings, whole or as they grow, in the reply or behind a URL for a while."""

from __future__ import annotations

import asyncio
import base64
import collections
import io
import re
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import Field

from janus_jax.processing.images import generation_pixels
from janus_jax.sampling.sampler import Options
from janus_jax.serving.api.errors import ApiError, bad
from janus_jax.serving.api.events import Running, sse, streamed, unless_gone
from janus_jax.serving.api.schema import OF_BODIES, OF_IMAGES, Body, ImagesReply, Int, answers
from janus_jax.serving.api.served import Served, some_seed
from janus_jax.serving.jobs import Ended, Job, drawings

_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_LARGEST = 2048
_GRAY = (127, 127, 127)


class ImageRequest(Body):
    """OpenAI's fields that Janus can honor; `seed`, `guidance`, `temperature`, `top_k` and `top_p` are its own."""

    prompt: str
    model: str | None = None
    n: Int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: Int | None = Field(None, ge=0, le=3)
    seed: Int | None = None
    guidance: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=1)
    # Refused unless they say what Janus does anyway.
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    negative_prompt: str | None = None


_AS_EVER = {"quality": ("auto", "standard"), "style": (), "background": ("auto", "opaque"), "negative_prompt": ("",)}


class Kept:
    """Images behind URLs that nobody can guess, for some time and up to so many bytes."""

    def __init__(self, seconds: float, most: int):
        self._seconds, self._most = seconds, most
        self._files: collections.OrderedDict[str, tuple[float, bytes]] = collections.OrderedDict()

    def put(self, data: bytes, ending: str) -> str:
        """Keeps `data`; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{ending}"
        self._files[name] = (time.monotonic() + self._seconds, data)
        self._forget()
        return name

    def get(self, name: str) -> bytes | None:
        self._forget()
        return self._files[name][1] if name in self._files else None

    def _forget(self):
        now, size = time.monotonic(), sum(len(data) for _, data in self._files.values())
        while self._files:
            until, data = next(iter(self._files.values()))
            if until > now and size <= self._most:
                return
            size -= len(data)
            self._files.popitem(last=False)


def router(served: Served) -> APIRouter:
    routes, kept = APIRouter(), Kept(served.limits.url_seconds, served.limits.url_bytes)

    @routes.post("/v1/images/generations", response_model=ImagesReply, responses=answers(*OF_BODIES, events=OF_IMAGES))
    async def generate(body: ImageRequest, request: Request) -> Response:
        return await unless_gone(request, _answer(served, body, kept, str(request.base_url)))

    files: dict[int | str, Any] = {
        200: {"description": "The file", "content": {f"image/{kind}": {} for kind in _FORMATS}},
        **answers(404),
    }

    @routes.get("/v1/images/files/{name}", response_class=Response, responses=files)
    async def file(name: str) -> Response:
        data = kept.get(name)
        if data is None:
            raise ApiError(404, "there is no such image, or its time is over; draw it again with the same seed")
        return Response(data, media_type=f"image/{name.rpartition('.')[2]}")

    return routes


async def _answer(served: Served, body: ImageRequest, kept: Kept, base_url: str) -> Response:
    _, adapter = served.adapter(body.model)
    drawn = _Drawn(served, body, kept, base_url)
    drawn.jobs = await served.in_thread(lambda: drawings(served.janus, body.prompt, body.n or 1, drawn.options))
    for job in drawn.jobs:
        job.adapter = adapter
    if body.stream:
        return await streamed(drawn.events(), error_event="error")
    return JSONResponse(await drawn.whole())


class _Drawn:
    """A request under way."""

    def __init__(self, served: Served, body: ImageRequest, kept: Kept, base_url: str):
        self.served, self.body, self.kept, self.base_url = served, body, kept, base_url
        self.jobs: list[Job] = []
        native = served.janus.config.gen_vision.image_size
        self.side = _side(body.size, native)
        self.format = body.output_format or "png"
        self.seed = some_seed() if body.seed is None else body.seed
        self._refuse()
        self.options = Options(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k,
            seed=self.seed,
            cfg_weight=5.0 if body.guidance is None else body.guidance,
        )
        self.about = {
            "background": "opaque",
            "output_format": self.format,
            "quality": "auto",
            "size": f"{self.side}x{self.side}",
        }

    def _refuse(self):
        body, most = self.body, self.served.limits.drawings
        if (body.n or 1) > most:
            raise bad(f"n must be at most {most}, got {body.n}", "n")
        for name, known in _AS_EVER.items():
            if (value := getattr(body, name)) is not None and value not in known:
                raise bad(f"{name} is not supported; leave it out", name)
        if body.stream and (body.n or 1) > 1:
            raise bad("a stream is of one image; ask for several with several requests", "n")
        if body.stream and body.response_format == "url":
            raise bad("a stream carries images itself; leave response_format out", "response_format")
        if body.partial_images and not body.stream:
            raise bad("partial_images needs stream", "partial_images")
        if self.format == "png" and body.output_compression not in (None, 100):
            raise bad("output_compression is of jpeg and webp", "output_compression")

    @property
    def usage(self) -> dict[str, Any]:
        given, drawn = self.jobs[0].prompt_tokens, sum(len(job.tokens) for job in self.jobs)
        details = {"text_tokens": given, "image_tokens": 0}
        total = {"output_tokens": drawn, "total_tokens": given + drawn}
        return {"input_tokens": given, "input_tokens_details": details, **total}

    async def whole(self) -> dict[str, Any]:
        pictures: list[asyncio.Task[bytes] | None] = [None] * len(self.jobs)
        try:
            async with Running(self.served.engine, self.jobs) as running:
                async for index, event in running.events():
                    if isinstance(event, Ended):
                        self.served.metrics.note_job(self.jobs[index])
                        pictures[index] = asyncio.ensure_future(self._encoded(np.array(self.jobs[index].tokens)))
            data = [self._datum(await picture) for picture in pictures if picture is not None]
        finally:
            for picture in pictures:
                if picture is not None:
                    picture.cancel()
        return {"created": int(time.time()), "data": data, "seed": self.seed, "usage": self.usage, **self.about}

    def _datum(self, picture: bytes) -> dict[str, Any]:
        if self.body.response_format == "url":
            return {"url": f"{self.base_url}v1/images/files/{self.kept.put(picture, self.format)}"}
        return {"b64_json": base64.b64encode(picture).decode()}

    async def events(self) -> AsyncIterator[str]:
        (job,), count = self.jobs, self.body.partial_images or 0
        shown = [job.limit * (i + 1) // (count + 1) for i in range(count)]
        empty = await _empty(self.served) if count else None
        async with Running(self.served.engine, self.jobs) as running:
            if not shown:
                yield ": drawing\n\n"
            async for _, event in running.events():
                if isinstance(event, Ended):
                    break
                if shown and len(job.tokens) >= shown[0]:
                    # The codes of this moment: more are drawn meanwhile.
                    index, codes = count - len(shown), list(job.tokens)
                    shown = [n for n in shown[1:] if n > len(codes)] if len(shown) > 1 else []
                    picture = await self._encoded(np.concatenate([codes, empty[len(codes) :]]))
                    yield self._event("partial_image", picture, partial_image_index=index)
            self.served.metrics.note_job(job)
            picture = await self._encoded(np.array(job.tokens))
            yield self._event("completed", picture, usage=self.usage, seed=self.seed)

    def _event(self, name: str, picture: bytes, **more: Any) -> str:
        kind = f"image_generation.{name}"
        data = {"b64_json": base64.b64encode(picture).decode(), "created_at": int(time.time()), **self.about}
        return sse({"type": kind, **data, **more}, kind)

    async def _encoded(self, codes: np.ndarray) -> bytes:
        """The file of codes [num_tokens]."""
        pixels = await asyncio.wrap_future(self.served.engine.decode(codes.astype(np.int32)))
        return await self.served.in_thread(lambda: self._file(pixels))

    def _file(self, pixels: np.ndarray) -> bytes:
        image = Image.fromarray(pixels)
        if image.width != self.side:
            image = image.resize((self.side, self.side), Image.Resampling.LANCZOS)
        quality = {} if self.body.output_compression is None else {"quality": self.body.output_compression}
        file = io.BytesIO()
        image.save(file, _FORMATS[self.format], **quality)
        return file.getvalue()


def _side(size: str | None, native: int) -> int:
    """The side of the square that `size` asks for; images are drawn at the model's own and resampled."""
    if size in (None, "auto"):
        return native
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "")
    if not found:
        raise bad(f"size must be auto or WIDTHxHEIGHT, such as {native}x{native}", "size")
    width, height = map(int, found.groups())
    if width != height:
        raise bad(f"size must be square, since Janus draws squares: {width}x{width} or {height}x{height}", "size")
    if not 16 <= width <= _LARGEST:
        raise bad(f"size must be from 16x16 to {_LARGEST}x{_LARGEST}", "size")
    return width


async def _empty(served: Served) -> np.ndarray:
    """The codes of a gray picture, which stand for what is not drawn yet."""
    if served.empty is None:
        size = served.janus.config.gen_vision.image_size
        pixels = generation_pixels(Image.new("RGB", (size, size), _GRAY), size)
        served.empty = await asyncio.wrap_future(served.engine.encode(pixels))
    return served.empty
