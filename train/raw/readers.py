"""Readers of files of records: `len()`, and `[i]`, which returns a record's place (for messages) and its fields.

Readers keep an index and no open file, so that threads may share them. An error in one record is raised, as
`BadSample`, when that record is read. This module has what all readers share, and the reader of plain text; the others
are `train.raw.json_files`, `train.raw.csv_files`, `train.raw.tar.shard`, `train.raw.folders` and `train.raw.parquet`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from janus_jax.io.files import open_regular, too_deep
from janus_jax.io.messages import nearest, one_line
from janus_jax.io.store_access import is_store, read_spans
from janus_jax.io.stores import as_path, size_of
from janus_jax.io.stores import missing as missing_in_store
from train.raw.encodings import decode_text

# Suffixes of image files. Pillow reads most of them; a sample with another is dropped with the reason.
_PICTURES = (
    ".jpg .jpeg .jpe .jfif .jif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .avifs .heic .heif .hif .jp2 .j2k .jpc"
    " .jpx .jxl .ppm .pgm .pbm .pnm .pam .pfm .tga .ico .icns .pcx .sgi .dds .qoi .psd .svg .exr .hdr .dng .cr2 .cr3"
    " .nef .arw .orf .rw2 .raf .xcf .eps"
)
PICTURE_SUFFIXES = frozenset(_PICTURES.split())
_OTHERS = ".mp4 .webm .avi .mov .mkv .m4v .mpg .mpeg .wmv .flv .wav .mp3 .flac .ogg .oga .opus .m4a .aac .wma"
OTHER_MEDIA_SUFFIXES = frozenset(_OTHERS.split())
MAX_TEXT = 64 << 20  # bytes of one text: a caption, a document, a line of JSON without its images
MAX_LINE = 512 << 20  # bytes of a line of JSON, which may contain images in base64
_NO_QUESTION = 8 << 20  # bytes; a larger span is compared with the size of its object before
MAX_PICTURE = 256 << 20  # bytes of an image file
_PLACE, _DETAIL = 500, 500  # characters

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\x00", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"PK\x03\x04", "zip", "unzip"),
)
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")

Record = tuple[str, dict[str, Any]]


class BadSample(ValueError):
    """A sample that cannot be used: `reason` (a short stable key), `place` (file and line or so), `detail`."""

    def __init__(self, reason: str, place: str, detail: str):
        # One line, whatever names and libraries' messages contain.
        place, detail = one_line(place, _PLACE), one_line(" ".join(detail.split()), _DETAIL)
        super().__init__(reason, place, detail)
        self.reason, self.place, self.detail = reason, place, detail

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}: {self.detail}"


class TextFile:
    """A text file, read as one document."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        refuse_compressed(path)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        place = one_line(self.path, _PLACE)
        return place, {"text": text_of(read_span(self.path, 0, MAX_TEXT + 1), place)}


# ---------------------------------------------------------------- what readers share


def read_span(path: str | os.PathLike, begin: int, size: int) -> bytes:
    """`size` bytes of a regular file from `begin` on, fewer if it ends before."""
    if is_store(path) and size <= _NO_QUESTION and begin:
        # Spans in the middle are of an index: one request, without asking for the size before.
        return read_spans(os.fspath(path), [(begin, begin + size)])[0]
    with open_regular(path) as file:
        # `read` allocates all that it is asked for.
        size = min(size, max(size_of(file) - begin, 0))
        file.seek(begin)
        return file.read(size)


def text_of(data: bytes, place: str) -> str:
    """The text in `data`; BadSample if it is not text or too long."""
    if len(data) > MAX_TEXT:
        raise BadSample("too_large", place, f"a text of more than {MAX_TEXT:,} bytes")
    try:
        return decode_text(data)
    except ValueError as error:
        raise BadSample("bad_unicode", place, str(error)) from None


def object_of(text: str, place: str) -> dict[str, Any]:
    """The JSON object in `text`; BadSample if it is not one."""
    try:
        # NaN is accepted: pandas writes it into columns that are not read, and no numbers are used here.
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = "lists and objects are nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BadSample("bad_json", place, detail) from None
    return as_object(value, place)


def as_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadSample("bad_json", place, f"expected an object, got {type(value).__name__}")
    if too_deep(value):
        raise BadSample("bad_json", place, "lists and objects nested too deep")
    return value


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names of fields or files for a message, shortened if there are many."""
    names = [one_line(name, 60) for name in names]
    return ", ".join(names[:most] + ([f"and {len(names) - most} more"] if len(names) > most else [])) or "nothing"


def refuse_compressed(path: pathlib.Path):
    """ValueError for a compressed file of any name, since samples are read at random positions in a file."""
    start = read_span(path, 0, 8)
    for mark, name, command in _COMPRESSED:
        if start.startswith(mark):
            raise ValueError(f"{one_line(path)} is compressed ({name}), which is not supported; unpack with {command}")


def missing_path(path: str | os.PathLike) -> FileNotFoundError:
    """The error for a path that does not exist, suggesting a similar one that does."""
    path = as_path(path)
    if is_store(path):
        return missing_in_store(path)
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        near = nearest(missing.name, [child.name for child in missing.parent.iterdir()])
    except OSError:
        near = []
    hint = f"; did you mean {one_line(missing.parent / near[0])}?" if near else ""
    return FileNotFoundError(f"{one_line(path)}: no such file or folder{hint}")


@dataclasses.dataclass
class PassedOver:
    """Ignored files, which belong to no sample: how many, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, name: str):
        self.count, self.first = self.count + 1, self.first or one_line(name)


class Names:
    """Many short strings in little memory."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = int(self._ends[index - 1]) if index else 0
        return self._text[begin : int(self._ends[index])].decode("utf-8", "surrogatepass")
