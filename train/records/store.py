"""The records of many shard files in a store as one sequence: each is a range of bytes of an object."""

from __future__ import annotations

import bisect
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from janus_jax.io.store_access import read_many
from train.records.bags import content_of
from train.records.cache import CacheSettings, cache_of


@dataclasses.dataclass(frozen=True)
class Cached:
    """Where the records of a folder are kept once they were read: the cache, and each shard's name in it."""

    settings: CacheSettings
    names: tuple[str, ...]


class StoreRecords:
    """The records of `files` in a `folder` of a store, shared by threads.

    Args:
      ends: uint64 [N], where each record ends in its file.
    Raises: as `Records`, IndexError, OSError, and ValueError for damaged content.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str], counts: Sequence[int], ends: np.ndarray):
        self._paths = [str(folder / file) for file in files]
        self._begins = [0, *map(int, np.cumsum(np.asarray(counts, np.int64)))]
        self.ends = ends
        self.keep_in(None)

    def keep_in(self, cached: Cached | None):
        """Keeps from now on what is read in `cached`, and reads first from there."""
        self.cached = cached
        self._cache = cache_of(cached.settings) if cached else None
        if cached:
            self._cache.use(cached.names)

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> bytes:
        return content_of(self.stored([index])[0])

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """What is stored for each of `indices`, for `content_of`; all that is not cached is requested at once."""
        spans = [self._span(index) for index in indices]
        if self._cache is None:
            return read_many([(self._paths[shard], begin, end) for shard, begin, end in spans])
        names = self.cached.names
        found = {span: self._cache.find(names[span[0]], *span[1:]) for span in spans}
        absent = [span for span, record in found.items() if record is None]
        read = read_many([(self._paths[shard], begin, end) for shard, begin, end in absent])
        for (shard, begin, end), record in zip(absent, read, strict=True):
            found[shard, begin, end] = record
            self._cache.keep(names[shard], begin, record)
        return [found[span] for span in spans]

    def _span(self, index: int) -> tuple[int, int, int]:
        """Shard, and where the record begins and ends in it."""
        if not 0 <= index < self._begins[-1]:
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._begins, index) - 1
        begin = int(self.ends[index - 1]) if index > self._begins[shard] else 0
        return shard, begin, int(self.ends[index])
