"""Typed fields of a JSON object that somebody else wrote; a bad value raises ValueError with its place and key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from janus_jax.io.messages import one_line

_REQUIRED = object()
_TYPES = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def shown(value: Any) -> str:
    """`value` as shown inside a message."""
    return one_line(repr(value), 80)


def integer(value: Any, least: int, most: int) -> str | None:
    """None if `value` is an integer within the bounds, else a description of what it must be."""
    if type(value) is int and least <= value <= most:
        return None
    return f"an integer from {least} to {most:,}"


def positive(value: Any, most: float) -> str | None:
    """None if `value` is a number above 0 and at most `most`, else a description of what it must be."""
    if type(value) in (int, float) and 0 < value <= most:
        return None
    return f"a number above 0 and at most {most:g}"


class Fields:
    """A JSON object at `place` (a dotted path, empty for the whole file).

    Each getter returns `default` for a missing key (an error if no default is given), and raises a one-line ValueError
    for a value of the wrong type or out of bounds. With `null=True`, null counts as missing.
    """

    def __init__(self, raw: Any, place: str = ""):
        self.place = place
        if not isinstance(raw, Mapping):
            raise ValueError(
                f"{place or 'the configuration'} must be an object, got {_TYPES.get(type(raw), type(raw).__name__)}"
            )
        self.raw = raw

    def name(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def get(self, key: str, default: Any = _REQUIRED, null: bool = False) -> Any:
        """The value of `key`, of any type."""
        value = self.raw.get(key, default)
        if value is None and null:
            value = default
        if value is _REQUIRED:
            raise ValueError(f"the key {key!r} is missing" + (f" in {self.place}" if self.place else ""))
        return value

    def wrong(self, key: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self.name(key)} must be {wanted}, got {shown(value)}")

    def block(self, key: str, default: Any = _REQUIRED, null: bool = False) -> Fields:
        """The object at `key`."""
        return Fields(self.get(key, default, null), self.name(key))

    def flag(self, key: str, default: Any = _REQUIRED, null: bool = False) -> bool:
        value = self.get(key, default, null)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED, null: bool = False) -> str:
        value = self.get(key, default, null)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def integer(self, key: str, least: int, most: int, default: Any = _REQUIRED, null: bool = False) -> int:
        value = self.get(key, default, null)
        if wanted := integer(value, least, most):
            raise self.wrong(key, value, wanted)
        return value

    def number(self, key: str, least: float, most: float, default: Any = _REQUIRED, null: bool = False) -> float:
        value = self.get(key, default, null)
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(key, value, f"a number from {least:g} to {most:g}")
        return value

    def triple(self, key: str, least: float, most: float, kind: type, null: bool = True) -> tuple | None:
        """Three numbers of type `kind` (int or float), for R, G and B; None if the key is missing."""
        value = self.get(key, None, null)
        if value is None:
            return None
        kinds = (int,) if kind is int else (int, float)
        numbers = isinstance(value, list | tuple) and all(type(channel) in kinds for channel in value)
        if not numbers or len(value) != 3 or not all(least <= channel <= most for channel in value):
            what = "integers" if kind is int else "numbers"
            raise self.wrong(key, value, f"3 {what} from {least:g} to {most:g}, one for each of R, G and B")
        return tuple(value)
