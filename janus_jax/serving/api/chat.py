"""`POST /v1/chat/completions`: questions about text and pictures, answered whole or streamed."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from janus_jax.processing.chat import SYSTEM_PROMPT
from janus_jax.sampling.sampler import Options
from janus_jax.serving.api.errors import bad
from janus_jax.serving.api.events import Running, sse, streamed, unless_gone
from janus_jax.serving.api.media import picture_of
from janus_jax.serving.api.schema import OF_BODIES, OF_CHAT, Body, ChatReply, Int, answers
from janus_jax.serving.api.served import Served, some_seed
from janus_jax.serving.api.text import Answer
from janus_jax.serving.jobs import Ended, Job, Token, question


class ImageUrl(Body):
    url: str
    detail: str | None = None


class Part(Body):
    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Body):
    """OpenAI's fields that Janus can honor, and `top_k`; fields that it does not know are ignored, as OpenAI's are."""

    messages: list[Message] = Field(min_length=1)
    model: str
    max_tokens: Int | None = Field(None, ge=1)
    max_completion_tokens: Int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=1)
    n: Int | None = Field(None, ge=1)
    seed: Int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    # Refused unless they are as good as absent.
    top_logprobs: Int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


_REFUSED = ("top_logprobs", "frequency_penalty", "presence_penalty", "logit_bias", "tools")


def router(served: Served) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatReply, responses=answers(*OF_BODIES, events=OF_CHAT))
    async def complete(body: ChatRequest, request: Request) -> Response:
        return await unless_gone(request, _answer(served, body))

    return routes


async def _answer(served: Served, body: ChatRequest) -> Response:
    name, adapter = served.adapter(body.model)
    _refuse(served, body)
    asked = _Asked(served, name, body, await served.in_thread(lambda: _jobs(served, body, adapter)))
    if body.stream:
        return await streamed(asked.chunks())
    return JSONResponse(await asked.whole())


def _refuse(served: Served, body: ChatRequest):
    for name in _REFUSED:
        if getattr(body, name):
            raise bad(f"{name} is not supported; leave it out", name)
    if body.response_format and body.response_format.get("type") != "text":
        raise bad("response_format must be text: Janus has no constrained output", "response_format")
    if (body.n or 1) > served.limits.choices:
        raise bad(f"n must be at most {served.limits.choices}, got {body.n}", "n")
    stops = _stops(body)
    if len(stops) > 4 or not all(stops):
        raise bad("stop must be a text, or up to 4 of them, none of them empty", "stop")


def _stops(body: ChatRequest) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _jobs(served: Served, body: ChatRequest, adapter: str | None) -> list[Job]:
    """A job for each choice; the seed of choice i is `seed` + i."""
    messages, system = _conversation(served, body.messages)
    limit, context = body.max_completion_tokens or body.max_tokens, served.engine.context
    seed = some_seed() if body.seed is None else body.seed % 2**32
    options = Options(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        seed=seed,
    )
    job = question(served.janus, messages, (), limit or 1, options, system_prompt=system, adapter=adapter)
    if limit is None:
        job.limit = max(1, min(served.limits.max_tokens, context - job.prompt_tokens))
    others = [dataclasses.replace(options, seed=(seed + index) % 2**32) for index in range(1, body.n or 1)]
    return [job, *(Job(job.prompts, own, job.limit, job.end_id, adapter=adapter) for own in others)]


def _conversation(served: Served, messages: list[Message]) -> tuple[list[dict[str, Any]], str]:
    """Messages as `JanusPipeline.chat` takes them, and the system prompt: the reference's, if there is none."""
    _check_number_of_images(served, messages)
    turns, system = [], None
    tag = served.janus.processor.tokenizer.image_placeholder
    for index, message in enumerate(messages):
        place = f"messages.{index}"
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        texts, images = [], []
        for number, part in enumerate(parts or []):
            where = f"{place}.content.{number}"
            if part.type == "text" and part.text is not None:
                texts.append(part.text)
            elif part.type == "image_url" and part.image_url is not None and message.role == "user":
                url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
                images.append(picture_of(url, where, served.limits.image_bytes, served.remote))
                texts.append(tag)
            else:
                raise bad(
                    f"{where} must be a text with its text, or an image_url with its URL in a user message", where
                )
        text = "\n".join(texts)
        if len(text) > 64 * served.engine.context:
            raise bad(f"{place}: {len(text)} characters cannot fit the context; shorten it", place)
        if message.role in ("system", "developer"):
            if turns:
                raise bad(f"{place}: a {message.role} message comes before all others", place)
            system = text if system is None else f"{system}\n{text}"
        else:
            turns.append({"role": message.role, "content": text} | ({"images": images} if images else {}))
    return turns, SYSTEM_PROMPT if system is None else system


def _check_number_of_images(served: Served, messages: list[Message]):
    """Before any is opened."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    count, most = sum(part.type == "image_url" for part in parts), served.limits.images
    if count > most:
        raise bad(f"there are {count} images, and may be {most}; leave some out", "messages")


class _Choice:
    """One answer under way."""

    def __init__(self, served: Served, stops: list[str], logprobs: bool):
        self.tokenizer = served.janus.processor.tokenizer
        self._noting = logprobs
        self.answer = Answer(self.tokenizer, stops)
        self.text, self.reason = "", ""
        self.logprobs: list[dict[str, Any]] = []

    def take(self, event: Token | Ended) -> tuple[str, list[dict[str, Any]]]:
        """The text that comes with an event, and log probabilities if asked for; `reason` says if it was the last."""
        noted = []
        if isinstance(event, Token):
            piece = self.answer.push(event.token)
            if self._noting:
                spelled = self.tokenizer.decode([event.token], skip_special_tokens=False)
                own = {"token": spelled, "logprob": event.logprob, "bytes": list(spelled.encode()), "top_logprobs": []}
                noted = [own]
            if self.answer.stopped:
                self.reason = "stop"
        else:
            piece, self.reason = self.answer.finish(), event.reason
        self.text += piece
        self.logprobs += noted
        return piece, noted


class _Asked:
    """A request under way: its jobs, and its answer in either form."""

    def __init__(self, served: Served, name: str, body: ChatRequest, jobs: list[Job]):
        self.served, self.body, self.jobs = served, body, jobs
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self.choices = [_Choice(served, _stops(body), bool(body.logprobs)) for _ in jobs]

    async def events(self) -> AsyncIterator[tuple[int, str, list[dict[str, Any]], str]]:
        """(choice, text, log probabilities, reason for its end or ''), until all are over."""
        left = set(range(len(self.jobs)))
        async with Running(self.served.engine, self.jobs) as running:
            async for index, event in running.events():
                if index in left:
                    choice = self.choices[index]
                    piece, noted = choice.take(event)
                    if choice.reason:
                        left.discard(index)
                        self.served.engine.cancel(self.jobs[index])  # at a stop string the engine does not know
                        self.served.metrics.note_job(self.jobs[index])
                    yield index, piece, noted, choice.reason
                if not left:
                    return

    @property
    def usage(self) -> dict[str, Any]:
        prompt, drawn = self.jobs[0].prompt_tokens, sum(len(job.tokens) for job in self.jobs)
        cached = {"cached_tokens": min(self.jobs[0].reused, prompt)}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": cached,
        }

    async def whole(self) -> dict[str, Any]:
        async for _ in self.events():
            pass
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.body.logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None, noted: Any = None) -> str:
        logprobs = {"content": noted, "refusal": None} if noted else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        return sse(chunk)

    @property
    def _with_usage(self) -> bool:
        return bool(self.body.stream_options and self.body.stream_options.include_usage)

    async def chunks(self) -> AsyncIterator[str]:
        begun = False
        events = self.events()
        try:
            async for index, piece, noted, reason in events:
                if not begun:
                    begun = True
                    for each in range(len(self.jobs)):
                        yield self._chunk(each, {"role": "assistant", "content": ""})
                if piece or noted:
                    yield self._chunk(index, {"content": piece}, noted=noted)
                if reason:
                    yield self._chunk(index, {}, reason)
        finally:
            await events.aclose()
        if self._with_usage:
            yield sse({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage})
        yield sse("[DONE]")
