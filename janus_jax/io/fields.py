"""Typed fields of a JSON object that somebody else wrote; what does not fit is a ValueError naming place and key."""

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
    """`value` inside a message."""
    return one_line(repr(value), 80)


def whole(value: Any, least: int, most: int) -> str | None:
    """What `value` should be where it is not a whole number in these bounds, else None."""
    if type(value) is int and least <= value <= most:
        return None
    return f"a whole number from {least} to {most:,}"


def positive(value: Any, most: float) -> str | None:
    """What `value` should be where it is not a number above 0 and up to `most`, else None."""
    if type(value) in (int, float) and 0 < value <= most:
        return None
    return f"a number above 0 and up to {most:g}"


class Fields:
    """A JSON object at `place` (a dotted path, empty for the whole file).

    Each getter takes the default for a key that is absent (without one, that is an error), and raises ValueError in one
    line for a value of another type or out of bounds. null counts as absent where `null` says so.
    """

    def __init__(self, raw: Any, place: str = ""):
        self.place = place
        if not isinstance(raw, Mapping):
            raise ValueError(
                f"{place or 'the configuration'} has the wrong type: {_TYPES.get(type(raw), 'no JSON')}, not an object"
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
        return ValueError(f"{self.name(key)} is {shown(value)}, not {wanted}")

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
            raise self.wrong(key, value, "a text")
        return value

    def whole(self, key: str, least: int, most: int, default: Any = _REQUIRED, null: bool = False) -> int:
        value = self.get(key, default, null)
        if wanted := whole(value, least, most):
            raise self.wrong(key, value, wanted)
        return value

    def number(self, key: str, least: float, most: float, default: Any = _REQUIRED, null: bool = False) -> float:
        value = self.get(key, default, null)
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(key, value, f"a number from {least:g} to {most:g}")
        return value

    def triple(self, key: str, least: float, most: float, kind: type, null: bool = True) -> tuple | None:
        """Three numbers, for R, G and B, of type `kind` (int or float); None where the key is absent."""
        value = self.get(key, None, null)
        if value is None:
            return None
        kinds = (int,) if kind is int else (int, float)
        numbers = isinstance(value, list | tuple) and all(type(part) in kinds for part in value)
        if not numbers or len(value) != 3 or not all(least <= part <= most for part in value):
            what = "whole numbers" if kind is int else "numbers"
            raise self.wrong(key, value, f"3 {what} from {least:g} to {most:g}, one for each of R, G and B")
        return tuple(value)
