"""Rows of parquet files, read a row group at a time."""

from __future__ import annotations

import pathlib
import threading
from typing import Any

import numpy as np

from janus_jax.messages import one_line
from train.fields import wanted
from train.readers import BadSample, Record, listed


class Parquet:
    """Rows of a parquet file; of the columns, those that `fields.wanted` knows.

    ValueError without pyarrow, or for another file.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ValueError(f"{path}: parquet files need pyarrow; pip install pyarrow") from None
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{one_line(path)} is not a readable parquet file ({one_line(error)})") from None
        names = self._file.schema_arrow.names
        self.columns = [name for name in names if wanted(name)]
        if not self.columns:
            known = "image, caption, text, conversations, messages"
            raise ValueError(f"{one_line(path)} has the columns {listed(names)}; expected some of {known}")
        groups = range(self._file.metadata.num_row_groups)
        self._ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in groups])
        self._lock, self._errors = threading.Lock(), (pa.ArrowException, OSError)
        self._held: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        place = f"{one_line(self.path, 500)} row {index}"
        group = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        try:
            table = self._group(group)
        except self._errors as error:
            raise BadSample("bad_parquet", place, f"row group {group} is damaged ({error})") from None
        try:
            return place, table.slice(index - begin, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadSample("bad_unicode", place, f"a text that is not UTF-8 ({error.reason})") from None

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._held:
                table = self._file.read_row_group(group, columns=self.columns)
                # Two at a time: threads that read in order are at most at the seam of two groups.
                self._held = {key: self._held[key] for key in list(self._held)[-1:]} | {group: table}
            return self._held[group]
