"""JSON posted to an endpoint, again where that can help."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from janus_jax.io.messages import error_text, one_line

_LONGEST = 1 << 20  # bytes of a reply
_AGAIN = {408, 409, 425, 429}  # and all from 500
T = TypeVar("T")


class NoReply(Exception):
    """The endpoint has not answered."""


def address(url: str) -> urllib.parse.SplitResult | None:
    """The parts of an address that can be posted to; None if it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.netloc else None


def post(
    url: str,
    body: Mapping[str, Any],
    read: Callable[[bytes], T],
    *,
    key: str | None,
    timeout: float,
    wait: float,
    tries: int,
) -> T:
    """What `read` finds in the reply; a reply in which it finds nothing, and says ValueError, is asked for again.

    Args:
      key: for the header Authorization.
      timeout: seconds for one request.
      wait: seconds before the second try; each next one waits twice as long.
    Raises: NoReply with the reason, after `tries` where trying again can help.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    reason = ""
    for number in range(tries):
        if number:
            time.sleep(wait * random.uniform(0.5, 1))
            wait *= 2
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answered:
                return read(answered.read(_LONGEST))
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {_told(error)}"
            if error.code < 500 and error.code not in _AGAIN:
                break
            asked = error.headers.get("Retry-After", "")
            wait = max(wait, min(float(asked), 60)) if asked.isdigit() else wait
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error_text(error)
    raise NoReply(reason)


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return one_line(error.read(2000).decode("utf-8", "replace").strip() or error.reason)
    except (OSError, http.client.HTTPException):
        return one_line(error.reason)
