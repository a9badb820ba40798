"""The server as an ASGI application: routes, errors, and what holds for every request."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from janus_jax.serving.api import chat, images, page, schema
from janus_jax.serving.api.errors import ApiError, as_api_error, handle_errors, log
from janus_jax.serving.api.served import Served

_OPEN = ("/health", "/v1/images/files/")  # without a key: the names of files cannot be guessed


def make_app(served: Served) -> FastAPI:
    """The application; the engine is the caller's to start and to close."""
    app = FastAPI(title="janus_jax", docs_url=None, redoc_url=None, redirect_slashes=False)
    handle_errors(app, lambda: served.metrics.wait_seconds)
    app.include_router(chat.router(served))
    app.include_router(images.router(served))
    app.include_router(page.router())

    def model(name: str) -> dict[str, Any]:
        own = next(iter(served.names))
        parent = None if served.names[name] is None else own
        about = {"max_model_len": served.engine.context, "root": own, "parent": parent}
        return {"id": name, "object": "model", "created": served.created, "owned_by": "janus_jax", **about}

    @app.get("/v1/models", response_model=schema.ModelsReply, responses=schema.answers(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in served.names]}

    @app.get("/v1/models/{name:path}", response_model=schema.ModelReply, responses=schema.answers(401, 404))
    async def one_model(name: str) -> dict[str, Any]:
        return model(served.adapter(name)[0])

    stopped: dict[int | str, Any] = {503: {"model": schema.HealthReply, "description": "The engine has stopped"}}

    @app.get("/health", response_model=schema.HealthReply, responses=stopped)
    async def health() -> Response:
        healthy = served.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "the engine has stopped"}, 200 if healthy else 503)

    figures: dict[int | str, Any] = {
        200: {"description": "Prometheus's text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **schema.answers(401),
    }

    @app.get("/metrics", response_class=Response, responses=figures)
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    schema.describe(app, served.api_key is not None, _OPEN)
    app.add_middleware(_EveryRequest, served=served)
    return app


class _EveryRequest:
    """Key, size and time of the body, request id, log and count; an ASGI middleware."""

    def __init__(self, app: Any, served: Served):
        self._app, self._served = app, served

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else uuid.uuid4().hex
        began, begun, status = time.monotonic(), False, 500

        async def sending(message: dict[str, Any]):
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            body = await self._body(receive, headers) if scope["method"] == "POST" else None
            await self._app(scope, receive if body is None else _replay(body, receive), sending)
        except Exception as error:
            if begun:
                raise
            await as_api_error(error).response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._served.metrics.note_request(route, status)
            # Never the prompt.
            took = time.monotonic() - began
            log.info("%s %s %s %d %.3fs", request_id, scope["method"], route, status, took)

    def _check_key(self, path: str, headers: dict[str, str]):
        key = self._served.api_key
        if key is None or path in page.PATHS or path.startswith(_OPEN):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, receive: Any, headers: dict[str, str]) -> bytes:
        limits = self._served.limits
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "the body must not be compressed; send it without Content-Encoding")
        too_large = ApiError(413, f"the body has more than {limits.body >> 20} MiB; send smaller images, or fewer")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limits.body:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "the client closed the connection")
                body += message.get("body", b"")
                if len(body) > limits.body:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), limits.body_seconds)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_seconds:g} s") from None


def _replay(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body again, and then what comes after it."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
