"""What bodies may be and what comes back, as models: the server's OpenAPI description of itself is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, BeforeValidator, ConfigDict


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON has numbers of one kind: 3.0 is a whole number too.
Int = Annotated[int, BeforeValidator(_whole)]


class Body(BaseModel):
    """Of a request: values have the types that they are said to have, and fields that are not known are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Reply(BaseModel):
    """Of an answer: it has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorObject(Reply):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorObject


class ModelReply(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    root: str
    parent: str | None


class ModelsReply(Reply):
    object: Literal["list"]
    data: list[ModelReply]


class HealthReply(Reply):
    status: str


class TokenLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class Logprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class PromptDetails(Reply):
    cached_tokens: int


class ChatUsage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatReply(Reply):
    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: ChatUsage


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(Reply):
    """The data of one event of a stream, whose last is `[DONE]`."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None


class InputDetails(Reply):
    text_tokens: int
    image_tokens: int


class ImageUsage(Reply):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class AboutImages(Reply):
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["auto"]
    size: str


class ImageDatum(Reply):
    """One of them, as `response_format` says."""

    b64_json: str | None = None
    url: str | None = None


class ImagesReply(AboutImages):
    created: int
    data: list[ImageDatum]
    seed: int
    usage: ImageUsage


class PartialImage(AboutImages):
    """An event of a stream: the image as far as it is drawn."""

    type: Literal["image_generation.partial_image"]
    b64_json: str
    created_at: int
    partial_image_index: int


class CompletedImage(AboutImages):
    """The last event of a stream."""

    type: Literal["image_generation.completed"]
    b64_json: str
    created_at: int
    usage: ImageUsage
    seed: int


class FailedEvent(ErrorReply):
    """The last event of a stream that fails."""

    type: Literal["error"]


_MEANINGS = {
    400: "What was asked is not possible; the message says why",
    401: "The API key is missing or wrong",
    404: "There is no such model, image or path",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is compressed",
    429: "The queue is full; Retry-After says when to come back",
    499: "The client closed the connection",
    500: "It failed, by no fault of the request's",
    503: "The server is stopping; Retry-After says when to come back",
}
_RETRY = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}, "required": True}}
OF_BODIES = (400, 401, 404, 408, 413, 415, 429, 499, 500, 503)


_EVENTS = (ChatChunk, PartialImage, CompletedImage, FailedEvent)
OF_CHAT = (ChatChunk, ErrorReply, "[DONE]")
OF_IMAGES = (PartialImage, CompletedImage, FailedEvent)


def answers(*statuses: int, events: tuple[type[Reply] | str, ...] = ()) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses`: errors of these statuses, and that an answer may be a stream whose data are of these."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": _MEANINGS[status]}
        | ({"headers": _RETRY} if status in (429, 503) else {})
        for status in statuses
    }
    if events:
        data = [{"const": each} if isinstance(each, str) else _as_json(each) for each in events]
        event: dict[str, Any] = {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}}}
        event["properties"] |= {"data": {"type": "string", "anyOf": data}}
        # OpenAPI 3.2's word, which FastAPI uses in its 3.1 too.
        content = {"text/event-stream": {"itemSchema": event}}
        found[200] = {"description": "Whole, or as server-sent events", "content": content}
    return found


def _as_json(model: type[Reply]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"contentMediaType": "application/json", "contentSchema": reference}


def describe(app: FastAPI, with_key: bool, open_paths: tuple[str, ...]):
    """Makes `app` describe itself as it is: bad bodies get 400, and all but `open_paths` need a key if there is one."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, operations in made["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if not with_key or path.startswith(open_paths):
                        operation["responses"].pop("401", None)
                    else:
                        operation["security"] = [{"key": []}]
            schemas = made["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for event in _EVENTS:
                own = event.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= own.pop("$defs", {}) | {event.__name__: own}
            if with_key:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
