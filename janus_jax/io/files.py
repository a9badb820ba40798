"""Reading files that somebody else wrote: regular files only, never more than a stated size, JSON within bounds.

A path may name anything: a FIFO that nobody writes to, an endless device, 4 GB of text. Every error raised here is an
OSError or a ValueError, in one line that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from typing import Any, BinaryIO

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store, read_spans
from janus_jax.io.stores import as_path, open_object, size_of

MAX_JSON = 64 << 20  # bytes; the largest JSON of a published checkpoint, its tokenizer, has 5 MB
MAX_JSON_DEPTH = 200  # levels of nested lists and objects
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens `path` for reading bytes if it is a regular file (or a link to one), or an object in a store; never blocks.

    Raises: FileNotFoundError and other OSErrors of the system; ValueError for a folder, FIFO, device or socket, and for
      a path that contains a null character.
    """
    if is_store(path):
        return open_object(path)
    try:
        # Non-blocking: opening a FIFO would wait for somebody to write to it.
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a null character
        raise ValueError(f"{one_line(os.fspath(path))}: {error}") from None
    except OSError as error:
        if kind := _kind(path):  # a socket cannot even be opened
            raise ValueError(f"{one_line(path)} is {kind}, not a regular file") from None
        raise error
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise ValueError(f"{one_line(path)} is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file")
    return os.fdopen(number, "rb")


def _kind(path: str | os.PathLike) -> str | None:
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:
        return None


def read_ranges(path: str | os.PathLike, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes [begin, end) of the regular file `path` for each of `spans`; ValueError if it ends before."""
    if is_store(path):
        return read_spans(os.fspath(path), spans)
    found = []
    with open_regular(path) as file:
        for begin, end in spans:
            file.seek(begin)
            found.append(file.read(end - begin))
            if len(found[-1]) < end - begin:
                raise ValueError(f"{one_line(path)} has become shorter since it was opened")
    return found


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """All bytes of the regular file `path`; ValueError if it has more than `limit`, see also `open_regular`."""
    with open_regular(path) as file:
        size = size_of(file)
        data = file.read(size + 1) if size <= limit else b""
        if size < len(data) <= limit:
            # Files under /proc report size 0 but have content. (Read last: `read` allocates all that it is asked for.)
            data += file.read(limit + 1 - len(data))
    if size > limit or len(data) > limit:
        raise ValueError(f"{one_line(path)} has {max(size, len(data)):,} bytes, more than the limit of {limit:,}")
    return data


def read_text(path: str | os.PathLike, limit: int = MAX_JSON) -> str:
    """Text of the UTF-8 file `path` without its byte order mark; ValueError as `read_bytes`, or if it is not UTF-8."""
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{one_line(path)} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: str | os.PathLike, limit: int = MAX_JSON) -> Any:
    """The value in the JSON file `path`; ValueError as `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit), one_line(path))


def read_json_object(path: str | os.PathLike, limit: int = MAX_JSON, missing_ok: bool = False) -> dict[str, Any]:
    """The object in the JSON file `path`; {} if it is absent and `missing_ok`; ValueError as `read_json`."""
    if missing_ok and not as_path(path).exists():
        return {}
    raw = read_json(path, limit)
    if not isinstance(raw, dict):
        raise ValueError(f"{one_line(path)} holds {_json_type(raw)}, not a JSON object")
    return raw


def parse_json(text: str | bytes, place: str, unique_names: bool = False) -> Any:
    """The value of the JSON `text`; messages say that it is from `place`.

    ValueError for invalid JSON, for numbers too large for float64 (1e999 would be read as infinity), NaN and Infinity,
    integers of thousands of digits, more than `MAX_JSON_DEPTH` levels of lists and objects, and with `unique_names` for
    an object with a repeated name.
    """
    pairs = _unique if unique_names else None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{place} is not valid JSON: {error.msg} at {where}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{place} is not usable JSON: lists and objects are nested thousands deep") from None
    except ValueError as error:
        told = "an integer of thousands of digits" if "integer string" in str(error) else str(error)
        raise ValueError(f"{place} is not usable JSON: {told}") from None
    if too_deep(value):
        raise ValueError(f"{place} is not usable JSON: lists and objects are nested more than {MAX_JSON_DEPTH} deep")
    return value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the name {one_line(name)} appears twice in one object")
        made[name] = value
    return made


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {one_line(text, 40)} is too large for float64")
    return value


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_JSON_DEPTH` deep; Python's own limit varies."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
