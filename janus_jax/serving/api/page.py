"""The page at `/`: static files, which may load nothing but themselves and talk to nobody but this server."""

from __future__ import annotations

import importlib.resources

from fastapi import APIRouter
from fastapi.responses import Response

# Path, file and type.
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PATHS = frozenset(_FILES)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    folder = importlib.resources.files("janus_jax") / "serving" / "page"
    for path, (name, kind) in _FILES.items():
        routes.add_api_route(path, _giver((folder / name).read_bytes(), kind), response_model=None)
    return routes


def _giver(data: bytes, kind: str):
    async def give() -> Response:
        return Response(data, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    return give
