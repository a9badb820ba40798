"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} with a status that they map."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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
    """Makes every error of `app` one of OpenAI's; `wait_seconds` is how long a client should wait if it is full."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, wait_seconds()).response()

    async def of_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    async def of_body(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return bad(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}").response()
        where = ".".join(str(part) for part in first["loc"][1:])
        return bad(f"{where}: {first['msg']}" if where else f"the body: {first['msg']}", where or None).response()

    for kind in (ApiError, Full, Stopped, ValueError, OSError, Exception):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_body)
