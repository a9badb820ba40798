"""VLMEvalKit's TSV files: quoted cells as pandas reads them, and pictures in each of their four shapes.

A picture is base64 in the row, a short reference to another row, a list of either in one cell, or a file that
`image_path` names. Tables have gigabytes of base64: only texts are held, and a row is read again for its picture.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from evals.items import ImageRef
from evals.read.pictures import FilePicture, key_of, unreadable
from janus_jax.io.files import open_regular, read_ranges
from janus_jax.io.messages import did_you_mean, one_line

# A non-empty cell of at most so many characters is the index of the row that has the picture.
LONGEST_REFERENCE = 64
_MAX_CELL = 1 << 30  # characters
# What pandas takes for a missing value, also where a cell means the word itself.
MISSING = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"),
        *("NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    ]
)


@dataclass
class Row:
    """A row without its pictures' bytes: cells by column (missing ones left out), pictures, or why there are none."""

    index: str
    cells: dict[str, str]
    place: str
    images: tuple[ImageRef, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class CellPicture:
    """A picture in base64 in a cell of a table, or in a list in one."""

    path: pathlib.Path
    span: tuple[int, int]
    column: int
    element: int | None
    key: str
    name: str

    def read(self) -> bytes:
        (text,) = read_ranges(self.path, [self.span])
        try:
            (row,) = _parsed(io.StringIO(text.decode("utf-8"), newline=""))
            cell = row[self.column]
            return base64.b64decode(cell if self.element is None else _listed(cell)[self.element])
        except (csv.Error, UnicodeDecodeError, IndexError, binascii.Error, ValueError) as error:
            raise ValueError(f"{self.name} is not base64: {one_line(error)}") from None


@dataclass
class _Cell:
    """What is known of an `image` cell after the row is read."""

    span: tuple[int, int]
    size: int
    text: str  # of a reference; "" for a long cell
    keys: list[str] = field(default_factory=list)  # of the pictures in it
    is_list: bool = False


def read_tsv(path: pathlib.Path, columns: Sequence[str], picture_folder: str) -> list[Row]:
    """The rows of a table that must have `columns` and `image` or `image_path`.

    `picture_folder` is where VLMEvalKit puts the benchmark's pictures, below `images` beside the table. A row whose
    pictures cannot be had has a `problem`. Raises ValueError for a file that is no such table, naming the line, or for
    an index that is there twice; OSError if it cannot be read.
    """
    rows: list[Row] = []
    pictures: list[_Cell | None] = []
    header: list[str] = []
    for number, span, cells in _records(path):
        if not header:
            header = cells
            _check_columns(path, header, columns)
            place = {name: position for position, name in enumerate(header)}
            continue
        if len(cells) > len(header):
            raise ValueError(f"{one_line(path)}:{number} has {len(cells)} cells, the first row names {len(header)}")
        cells += [""] * (len(header) - len(cells))
        pictures.append(_cell(cells[place["image"]], span) if "image" in place else None)
        named = {name: cell for name, cell in zip(header, cells, strict=True) if name != "image"}
        row = Row("", {k: v for k, v in named.items() if v not in MISSING}, f"{one_line(path, 500)}:{number}")
        row.index = row.cells.get("index", "")
        if not row.index:
            raise ValueError(f"{row.place} has no index")
        rows.append(row)
    if not header:
        raise ValueError(f"{one_line(path)} is empty")
    _whole_numbers(rows)
    by_index: dict[str, int] = {}
    for position, row in enumerate(rows):
        if by_index.setdefault(row.index, position) != position:
            raise ValueError(f"{row.place}: index {one_line(row.index)} is there twice")
    folder = path.parent / "images" / picture_folder
    for row, cell in zip(rows, pictures, strict=True):
        if cell is None:
            _by_path(row, folder)
        else:
            _in_table(row, cell, pictures, by_index, path, place["image"])
    return rows


def _check_columns(path: pathlib.Path, header: list[str], columns: Sequence[str]) -> None:
    missing = [name for name in ("index", *columns) if name not in header]
    hints = "".join(did_you_mean(name, header) for name in missing)
    if not {"image", "image_path"} & set(header):
        missing.append("image (or image_path)")
    if missing:
        there = ", ".join(map(one_line, header[:30]))
        raise ValueError(f"{one_line(path)} has no column {', '.join(missing)}{hints}; it has {there}")
    if len(set(header)) < len(header):
        raise ValueError(f"{one_line(path)} names a column twice in its first row")


def _records(path: pathlib.Path) -> Iterator[tuple[int, tuple[int, int], list[str]]]:
    """Line number, bytes and cells of each row that is not blank."""
    with open_regular(path) as file:
        lines = _Lines(file)
        begin, number = 0, 1
        try:
            for cells in _parsed(lines):
                if cells and (len(cells) > 1 or cells[0].strip()):
                    yield number, (begin, lines.at), cells
                last = (begin, number)
                begin, number = lines.at, lines.number + 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{one_line(path)}:{lines.number} is not UTF-8: {error.reason}") from None
        except csv.Error as error:
            raise ValueError(f"{one_line(path)}:{number} is not a row of a table: {one_line(error)}") from None
    if begin and lines.number > last[1]:
        # The last row has several lines: it may be a quote that is never closed, which has taken in the rest.
        (text,) = read_ranges(path, [(last[0], begin)])
        if text.count(b'"') % 2:
            raise ValueError(f"{one_line(path)}:{last[1]} opens a quote that is never closed")


def _parsed(lines: Iterable[str]) -> Iterator[list[str]]:
    # For the whole process; the default is 128 KiB, and other readers may have set another.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL))
    return csv.reader(lines, delimiter="\t")


class _Lines:
    """Lines of a file as text; `at` is the end of the last one read, and `number` its number, from 1."""

    def __init__(self, file):
        self.at, self.number, self._file = 0, 0, file

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        first = not self.at
        self.at, self.number = self.at + len(line), self.number + 1
        return line.decode("utf-8-sig" if first else "utf-8")


def _whole_numbers(rows: list[Row]) -> None:
    """As pandas and VLMEvalKit: if every index is an integer, all are compared as integers (`007` is 7)."""
    try:
        numbers = [str(int(row.index)) for row in rows]
    except ValueError:
        return
    for row, number in zip(rows, numbers, strict=True):
        row.index = number


def _cell(text: str, span: tuple[int, int]) -> _Cell:
    if text in MISSING:
        return _Cell(span, 0, "")
    if len(text) <= LONGEST_REFERENCE:
        return _Cell(span, len(text), text)
    if text.startswith("[") and text.endswith("]"):
        try:
            return _Cell(span, len(text), "", [key_of(each.encode()) for each in _listed(text)], True)
        except ValueError:
            return _Cell(span, len(text), "", [], True)
    return _Cell(span, len(text), "", [key_of(text.encode())])


def _listed(text: str) -> list[str]:
    """The texts in a cell that is a list as Python writes it; ValueError if it is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("the list in the cell cannot be read") from None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("the cell is not a list of texts")
    return value


def _in_table(
    row: Row, cell: _Cell, cells: Sequence[_Cell | None], by_index: dict[str, int], path: pathlib.Path, column: int
) -> None:
    name = f"the picture of {row.place}"
    if not cell.size:
        row.problem = f"{row.place} has no picture"
        return
    if cell.text:
        wanted = cell.text.strip()
        # Compared as text, as VLMEvalKit does; a table whose indices are numbers may write them as 7.0.
        position = by_index.get(wanted, by_index.get(wanted.removesuffix(".0")))
        if position is None:
            row.problem = f"{row.place} refers to the picture of row {one_line(wanted)}, which is not there"
            return
        target = cells[position]
        assert target is not None
        if not target.keys:
            row.problem = f"{row.place} refers to the picture of row {one_line(wanted)}, which has none of its own"
            return
        cell, name = target, f"the picture of row {one_line(wanted)} in {one_line(path, 500)}"
    if not cell.keys:
        row.problem = f"{row.place}: the list of pictures cannot be read"
        return
    row.images = tuple(
        CellPicture(path, cell.span, column, number if cell.is_list else None, key, name)
        for number, key in enumerate(cell.keys)
    )


def _by_path(row: Row, folder: pathlib.Path) -> None:
    text = row.cells.get("image_path", "")
    if not text:
        row.problem = f"{row.place} has no picture"
        return
    try:
        names = _listed(text) if text.startswith("[") and text.endswith("]") else [text]
    except ValueError as error:
        row.problem = f"{row.place}: {error}"
        return
    paths = [folder / name for name in names]
    row.problem = unreadable(paths) or ""
    row.images = () if row.problem else tuple(map(FilePicture, paths))
