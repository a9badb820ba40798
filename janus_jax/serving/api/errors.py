"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} with a status that they map."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from janus_jax.io.messages import one_line
from janus_jax.sampling.finite import NotFinite
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.serving.engine import Full, Stopped

log = logging.getLogger("janus_jax.serving")
_LONGEST = 500


class ApiError(Exception):
    """An answer that is an error: a status, one line, and what OpenAI's error objects say beside it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message, _LONGEST), param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad(message: str, param: str | None = None) -> ApiError:
    """An error of the request's own."""
    return ApiError(400, message, param=param)


def as_api_error(error: Exception, wait: float = 1.0) -> ApiError:
    """Any error of the library or the engine; `wait` is the seconds after which a client may try again."""
    if isinstance(error, ApiError):
        return error
    later = {"Retry-After": str(max(1, min(60, math.ceil(wait))))}
    if isinstance(error, Full):
        return ApiError(429, f"the server is busy: {error}; try again later", code="queue_full", headers=later)
    if isinstance(error, Stopped):
        return ApiError(503, str(error), code="stopping", headers=later)
    if isinstance(error, (NotFinite, OutOfMemory)):
        return ApiError(500, str(error))
    if isinstance(error, (ValueError, OSError)):
        return bad(str(error))
    log.error("an error of the server's own", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why")


def handle_errors(app: FastAPI, wait_seconds: Callable[[], float]):
    """Makes errors of `app` OpenAI's; `wait_seconds` is how long a client should wait if it is full."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, wait_seconds()).response()

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path} here; /openapi.json says what there is"
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    async def of_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _of_body(error, request.headers.get("content-type", "")).response()

    for kind in (ApiError, Full, Stopped, ValueError, OSError):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_body)


def _of_body(error: RequestValidationError, kind: str) -> ApiError:
    # Of a value that may be this or that, the deepest is of what it was meant to be.
    told = max(error.errors(), key=lambda each: len(each["loc"]))
    if told["type"] == "json_invalid":
        return bad(f"the body is not JSON: {told.get('ctx', {}).get('error', told['msg'])}")
    if where := ".".join(map(str, _place(told, error.body))):
        return bad(f"{where}: {told['msg']}", where)
    if "json" not in kind.lower():
        return bad("the body must be JSON, and come with the header Content-Type: application/json")
    return bad(f"the body: {told['msg']}")


def _place(told: dict[str, Any], body: Any) -> Iterator[str | int]:
    """Where in the body it is: pydantic also names the type that it tried, which is in no body."""
    _, *steps = told["loc"]
    for index, step in enumerate(steps):
        found = step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int)
        if found:
            yield step
            body = body[step]
        elif told["type"] == "missing" and index == len(steps) - 1:
            yield step
