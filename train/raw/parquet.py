"""Rows of parquet files, read a row group at a time; all readers together keep only a few files and groups open."""

from __future__ import annotations

import collections
import os
import pathlib
import threading
from typing import Any

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from train.raw.fields import wanted
from train.raw.readers import BadSample, Record, listed
from train.raw.storage import machine_error, patiently

_FILES = 4  # open at a time
# Threads that read in order need at most two adjacent groups, unless the groups are tiny.
_GROUPS_AT_LEAST, _GROUPS_AT_MOST, _GROUPS_BYTES = 2, 16, 64 << 20


class _Held:
    """The most recently used open files and row groups of this process; shared by threads, one of which reads."""

    def __init__(self):
        self.lock = threading.Lock()
        self.files: collections.OrderedDict[pathlib.Path, Any] = collections.OrderedDict()
        self.groups: collections.OrderedDict[tuple[pathlib.Path, int], Any] = collections.OrderedDict()

    def file(self, path: pathlib.Path) -> Any:
        """The open file; call it with the lock held."""
        import pyarrow.parquet as pq

        if path not in self.files:
            file = open_regular(path)  # pyarrow would wait for a FIFO
            if not is_store(path):
                file.close()
            while len(self.files) >= _FILES:
                self.files.popitem(last=False)[1].close()
            self.files[path] = pq.ParquetFile(file if is_store(path) else path)
        self.files.move_to_end(path)
        return self.files[path]

    def group(self, path: pathlib.Path, group: int, columns: list[str]) -> Any:
        """The table of a row group."""
        with self.lock:
            key = (path, group)
            if key not in self.groups:
                table = self.file(path).read_row_group(group, columns=columns)
                self.groups[key] = table
                while self._too_many():
                    self.groups.popitem(last=False)
            self.groups.move_to_end(key)
            return self.groups[key]

    def _too_many(self) -> bool:
        if len(self.groups) <= _GROUPS_AT_LEAST:
            return False
        return len(self.groups) > _GROUPS_AT_MOST or sum(t.nbytes for t in self.groups.values()) > _GROUPS_BYTES


_held = _Held()
os.register_at_fork(after_in_child=_held.__init__)


class Parquet:
    """Rows of a parquet file, with the columns for which `fields.wanted` is true.

    ValueError without pyarrow, or if it is not a parquet file; OSError if the machine cannot read it.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import pyarrow as pa
        except ImportError:
            raise ValueError(f"{path}: reading parquet files needs pyarrow; pip install pyarrow") from None
        self.path = path
        self._errors = (pa.ArrowException, OSError)
        try:
            metadata, names = patiently(self._open, path)
        except self._errors as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the system, not of pyarrow
            raise ValueError(f"{one_line(path)} is not a readable parquet file ({one_line(error)})") from None
        self.columns = [name for name in names if wanted(name)]
        if not self.columns:
            known = "image, caption, text, conversations, messages"
            raise ValueError(f"{one_line(path)} has the columns {listed(names)}; expected some of {known}")
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])

    def _open(self) -> tuple[Any, list[str]]:
        with _held.lock:
            file = _held.file(self.path)
            return file.metadata, file.schema_arrow.names

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        place = f"{one_line(self.path, 500)} row {index}"
        group = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        try:
            table = _held.group(self.path, group, self.columns)
        except self._errors as error:
            if found := machine_error(error, self.path):
                raise found from None
            raise BadSample("bad_parquet", place, f"row group {group} is damaged ({error})") from None
        try:
            return place, table.slice(index - begin, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadSample("bad_unicode", place, f"a text that is not UTF-8 ({error.reason})") from None
