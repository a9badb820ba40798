"""JSON files of records: an object on each line, or one list of objects; in UTF-8, UTF-16 or UTF-32."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line
from janus_jax.io.stores import size_of
from train.raw.encodings import LOOK, WIDTH, decode_text, encoding_of
from train.raw.indices import index_of, rows_of
from train.raw.readers import MAX_LINE, BadSample, Record, as_object, object_of, read_span, refuse_compressed

_MAX_LIST = 8 << 30  # bytes of a list, which has to be held in memory
_AT_ONCE = 1 << 22  # bytes searched for line ends at a time
_GLANCE = 64  # bytes of a line that nearly always show that it is not blank
_BLANK = 4096  # bytes; longer whitespace does not count as a blank line


def json_reader(path: pathlib.Path, index: pathlib.Path | None = None) -> JsonLines | JsonList:
    """The reader of a JSON file: a list of objects, or an object on each line; see `indices` for the folder `index`."""
    refuse_compressed(path)
    start = read_span(path, 0, LOOK)
    codec, begin = encoding_of(start)
    text = start[begin:].decode(codec, "replace").lstrip()
    return JsonList(path) if text.startswith("[") else JsonLines(path, index)


class JsonLines:
    """An object on each line; blank lines are skipped."""

    def __init__(self, path: pathlib.Path, index: pathlib.Path | None = None):
        self.path = path
        self._codec, begin = encoding_of(read_span(path, 0, LOOK))
        self._index = index_of(path, index, "lines", lambda add: self._build(begin, add))

    def _build(self, begin: int, add: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        count = number = 0
        with open_regular(self.path) as file, open_regular(self.path) as again:
            for begins, ends, sure in _lines(file, begin, self._codec):
                numbers = np.arange(number + 1, number + 1 + len(begins))
                number += len(begins)
                for at in np.flatnonzero(~sure).tolist():
                    sure[at] = not self._is_blank(again, int(begins[at]), int(ends[at]))
                add(rows_of(begins[sure], (ends - begins)[sure], numbers[sure], count))
                count += int(sure.sum())
        return {}

    def _is_blank(self, file, begin: int, end: int) -> bool:
        file.seek(begin)
        if file.read(min(end - begin, _GLANCE)).decode(self._codec, "replace").strip():
            return False
        rest = max(end - begin - _GLANCE, 0)
        return rest <= _BLANK and not file.read(rest).decode(self._codec, "replace").strip()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        place, text = text_of_span(self.path, self._codec, self._index[index], "line", "bad_json")
        # Concatenated files each have a byte order mark.
        return place, object_of(text.removeprefix("\ufeff"), place)


def text_of_span(path: pathlib.Path, codec: str, span: tuple[int, int, int], what: str, bad: str) -> tuple[str, str]:
    """The place and text of a record at `span` (begin, size, line number) of a file of `codec`.

    Raises: BadSample, 'too_large' or `bad`, for a `what` that is too long or is not text.
    """
    begin, size, number = span
    place = f"{one_line(path, 500)}:{number}"
    if size > MAX_LINE:
        raise BadSample("too_large", place, f"a {what} of {size:,} bytes, more than the limit of {MAX_LINE:,}")
    try:
        return place, decode_text(read_span(path, begin, size), codec)
    except ValueError as error:
        raise BadSample(bad, place, str(error)) from None


def line_ends(file, begin: int, codec: str) -> Iterator[int]:
    """The end of each line, including its newline; a last line without a newline is left out."""
    width = WIDTH[codec]
    units = np.dtype(f"{'>' if codec.endswith('be') else '<'}u{width}")
    file.seek(begin)
    while data := file.read(_AT_ONCE):
        whole = len(data) // width
        yield from (begin + (np.flatnonzero(np.frombuffer(data, units, whole) == 10) + 1) * width).tolist()
        begin += whole * width


def _lines(file: BinaryIO, begin: int, codec: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of some lines at a time: where each begins and ends, and whether its first character is surely not blank.

    A line ends with its newline, or where the file does.
    """
    width, size = WIDTH[codec], size_of(file)
    units = np.dtype(f"{'>' if codec.endswith('be') else '<'}u{width}")
    at, pending, known = begin, begin, False  # `known`: whether the pending line surely is not blank
    file.seek(at)
    while data := file.read(_AT_ONCE):
        found = np.frombuffer(data, units, len(data) // width)
        # Not a space of any kind; other characters are looked at one by one.
        plain = (found > 32) & (found < 127)
        if at == pending and len(found):
            known = bool(plain[0])
        newlines = np.flatnonzero(found == 10)
        if len(newlines):
            ends = at + (newlines + 1) * width
            begins = np.concatenate([[pending], ends[:-1]])
            yield begins, ends, np.concatenate([[known], plain[newlines[:-1] + 1]])
            pending, after = int(ends[-1]), int(newlines[-1]) + 1
            known = after < len(found) and bool(plain[after])
        at += len(found) * width
        if len(data) % width:
            break
    if size > pending:
        yield np.array([pending]), np.array([size]), np.array([False])


class JsonList:
    """One JSON list of objects, held in memory."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        place = one_line(path)
        data = read_span(path, 0, _MAX_LIST + 1)
        if len(data) > _MAX_LIST:
            raise ValueError(f"{place} is a list of more than {_MAX_LIST >> 30} GiB; write an object on each line")
        try:
            self._records = _list(decode_text(data))
        except json.JSONDecodeError as error:
            told = f"{error.msg} at line {error.lineno} column {error.colno}"
            raise ValueError(f"{place} is not valid JSON: {told}") from None
        except RecursionError:
            raise ValueError(f"{place} is not usable JSON: lists and objects are nested too deep") from None
        except ValueError as error:
            raise ValueError(f"{place} is {error}") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        place = f"{one_line(self.path, 500)}[{index}]"
        return place, as_object(self._records[index], place)


def _list(text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # An integer of thousands of digits, which is no reason to refuse the other records: numbers are not used here.
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 4000 else float("nan"))
