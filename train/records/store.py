"""The records of many shard files in a store as one sequence: each is a range of bytes of an object."""

from __future__ import annotations

import bisect
import pathlib
from collections.abc import Sequence

import numpy as np

from janus_jax.io.store_access import read_many
from train.records.bags import content_of


class StoreRecords:
    """The records of `files` in a `folder` of a store; shared by threads and pickled with the path of its index alone.

    Args:
      ends: uint64 [N], where each record ends in its file.
    Raises: as `Records`, IndexError, OSError, and ValueError for damaged content.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str], counts: Sequence[int], ends: np.ndarray):
        self._paths = [str(folder / file) for file in files]
        self._begins = [0, *map(int, np.cumsum(np.asarray(counts, np.int64)))]
        self.ends = ends

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> bytes:
        return content_of(self.stored([index])[0])

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """What is stored for each of `indices`, for `content_of`; all are requested at the same time."""
        return read_many([self._span(index) for index in indices])

    def _span(self, index: int) -> tuple[str, int, int]:
        if not 0 <= index < self._begins[-1]:
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._begins, index) - 1
        begin = int(self.ends[index - 1]) if index > self._begins[shard] else 0
        return self._paths[shard], begin, int(self.ends[index])
