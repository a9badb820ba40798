"""Where each record of a source file is, in 16 bytes a record: in memory, or in a file that is made once and mapped.

Whoever opens a large file of records first writes its index, whole, to the folder that is given; all others map it. It
is about a file of one path, size and time of change.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.store_access import is_store
from janus_jax.io.store_cache import local_copy
from janus_jax.io.stores import size_of
from janus_jax.io.whole.files import appearing

# Of a record: its first byte; its bytes, 2**32 - 1 if there are more; its number in its file, such as that of its line,
# less its index.
ROW = np.dtype([("begin", "<u8"), ("size", "<u4"), ("before", "<u4")])
_MOST = 2**32 - 1
_VERSION = 1
_LENGTH = 8  # bytes of the last number of a file of indices
KEPT_FROM = 64 << 20  # bytes of a file; the index of a smaller one is soon made again
_MAPPED = 64  # files at a time: each takes a file handle


def rows_of(begins: Any, sizes: Any, numbers: Any, first: int) -> np.ndarray:
    """Rows for records from index `first` on: arrays of their first bytes, sizes, and numbers from 1."""
    rows = np.empty(len(begins), ROW)
    rows["begin"], rows["size"] = begins, np.minimum(sizes, _MOST)
    rows["before"] = np.minimum(np.asarray(numbers, np.int64) - 1 - np.arange(first, first + len(begins)), _MOST)
    return rows


class Index:
    """Rows of the records of a file, and what else is known `about` them."""

    def __init__(self, rows: np.ndarray | None, count: int, about: dict[str, Any], path: pathlib.Path | None = None):
        self._rows, self._count, self._path, self.about = rows, count, path, about

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """First byte, bytes, and number from 1 of a record."""
        rows = self._rows if self._path is None else _mapped.get(self._path, self._count)
        begin, size, before = rows[index].tolist()
        return begin, size, before + index + 1


Build = Callable[[Callable[[np.ndarray], Any]], dict[str, Any] | None]


def index_of(source: pathlib.Path, folder: pathlib.Path | None, kind: str, build: Build) -> Index | None:
    """The index of the file `source`, from `folder` if it is there, else built, and kept in `folder` if one is given.

    Args:
      kind: tells ways to index the same file apart.
      build: calls its argument with rows, some at a time, and returns what is known about all: JSON, or None if rows do
        not describe the records, and then so does this.
    """
    state = source.stat()
    if folder is None or state.st_size < KEPT_FROM:
        parts: list[np.ndarray] = []
        about = build(parts.append)
        rows = np.concatenate(parts) if parts else np.empty(0, ROW)
        return None if about is None else Index(rows, len(rows), about)
    told = f"{_VERSION} {kind} {source.absolute()} {state.st_size} {state.st_mtime_ns}"
    path = folder / f"{hashlib.sha256(told.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.rows"
    if (found := _opened(path)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with appearing(path) as partial, open(partial, "wb") as file:
            about = build(lambda rows: file.write(rows.tobytes()))
            if about is None:
                raise _NotKept
            text = json.dumps(about).encode()
            file.write(text + len(text).to_bytes(_LENGTH, "little"))
    except _NotKept:
        return None
    # Somebody may have removed it just now.
    return _opened(path) or index_of(source, None, kind, build)


class _NotKept(Exception):
    pass


def _opened(path: pathlib.Path) -> Index | None:
    """The index in the file `path`; None if there is none."""
    try:
        local = local_copy(path) if is_store(path) else path
        with open_regular(local) as file:
            size = size_of(file)
            file.seek(max(size - _LENGTH, 0))
            length = int.from_bytes(file.read(_LENGTH), "little")
            count, rest = divmod(size - _LENGTH - length, ROW.itemsize)
            if rest or count < 0:
                return None
            file.seek(count * ROW.itemsize)
            return Index(None, count, json.loads(file.read(length)), local)
    except (FileNotFoundError, ValueError):
        return None


class _Mapped:
    """The files of indices that were used last, mapped; shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[pathlib.Path, np.ndarray] = collections.OrderedDict()

    def get(self, path: pathlib.Path, count: int) -> np.ndarray:
        with self._lock:
            if path not in self._files:
                self._files[path] = np.memmap(path, ROW, mode="r", shape=(count,))
                while len(self._files) > _MAPPED:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


_mapped = _Mapped()
os.register_at_fork(after_in_child=_mapped.__init__)  # a thread of the parent may hold the lock
