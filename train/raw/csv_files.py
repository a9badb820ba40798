"""CSV and TSV files: the first row names the fields, each other row is a record; in UTF-8, UTF-16 or UTF-32."""

from __future__ import annotations

import csv
import io
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from janus_jax.io.files import open_regular, parse_json
from janus_jax.io.messages import one_line
from janus_jax.io.stores import size_of
from train.raw.encodings import LOOK, encoding_of
from train.raw.indices import index_of, rows_of
from train.raw.json_files import line_ends, text_of_span
from train.raw.readers import MAX_TEXT, BadSample, Record, listed, read_span, refuse_compressed

# Fields of these names may contain JSON lists, since a cell cannot express lists otherwise.
_LISTS = ("conversations", "messages", "images", "image")
_DELIMITERS = (",", ";", "\t")
_ROWS_AT_ONCE = 1 << 16
csv.field_size_limit(MAX_TEXT)  # for the whole process; the default is 128 KiB


class CsvFile:
    """Rows of a table, with cells separated by commas, or by semicolons or tabs if its first row has those instead.

    An empty cell is a missing field; `conversations`, `messages` and `images` may be JSON lists. ValueError, with the
    line number, if the file cannot be read as a table. See `indices` for the folder `index`.
    """

    def __init__(self, path: pathlib.Path, index: pathlib.Path | None = None):
        self.path = path
        refuse_compressed(path)
        self._codec, self._begin = encoding_of(read_span(path, 0, LOOK))
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ""
        self._index = index_of(path, index, "rows", self._build)
        self.columns, self._delimiter = self._index.about["columns"], self._index.about["delimiter"]

    def _build(self, add: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        rows = self._rows()
        columns, *_ = next(rows, ([],))
        named = [name for name in columns if name]
        if len(set(named)) < len(named):
            raise ValueError(f"{one_line(self.path)} names a column twice in its first row: {listed(named)}")
        count = 0
        while some := [span for _, *span in itertools.islice(rows, _ROWS_AT_ONCE)]:
            add(rows_of(*np.array(some, np.int64).T, count))
            count += len(some)
        return {"columns": columns, "delimiter": self._delimiter}

    def _rows(self) -> Iterator[tuple[list[str], int, int, int]]:
        """Cells (of the first row only), begin, size and line number of each row that is not blank."""
        with open_regular(self.path) as file:
            lines = _Lines(file, self._begin, self._codec)
            begin, number, first = self._begin, 1, True
            try:
                for row in self._reader(lines):
                    if any(row):
                        yield [cell.strip() for cell in row] if first else [], begin, lines.at - begin, number
                        first = False
                    begin, number = lines.at, lines.number + 1
            except (csv.Error, ValueError) as error:
                raise ValueError(f"{one_line(self.path)}:{number} is not a row of a table: {one_line(error)}") from None

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        if not self._delimiter:
            head = next(lines, "")
            self._delimiter = next((mark for mark in _DELIMITERS if mark in head), ",")
            lines = itertools.chain([head], lines)
        # Strict: an unclosed quote would otherwise swallow all following rows.
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        place, text = text_of_span(self.path, self._codec, self._index[index], "row", "bad_csv")
        try:
            (row,) = csv.reader(io.StringIO(text, newline="\n"), delimiter=self._delimiter, strict=True)
        except (csv.Error, ValueError) as error:
            raise BadSample("bad_csv", place, str(error)) from None
        if len(row) != len(self.columns):
            raise BadSample("bad_csv", place, f"{len(row)} cells, but the first row names {len(self.columns)} columns")
        cells = zip(self.columns, row, strict=True)
        return place, {name: _value(name, cell, place) for name, cell in cells if name and cell}


def _value(name: str, cell: str, place: str) -> Any:
    if name not in _LISTS or not cell.lstrip().startswith("["):
        return cell
    try:
        return parse_json(cell, name)
    except ValueError as error:
        raise BadSample("bad_json", place, str(error)) from None


class _Lines:
    """The lines of a file as text; `at` is the end of the last line read, and `number` its number, from 1."""

    def __init__(self, file: BinaryIO, begin: int, codec: str):
        self.at, self.number = begin, 0
        self._file, self._codec = file, codec
        self._ends = iter((*line_ends(file, begin, codec), size_of(file)))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        end = next(self._ends)
        self._file.seek(self.at)
        # Bytes that are not text in this encoding are reported when their row is read.
        line = self._file.read(end - self.at).decode(self._codec, "replace")
        self.at, self.number = end, self.number + 1
        return line
