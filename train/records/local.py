"""The records of many shard files on a disk as one sequence, with a bounded number of open files."""

from __future__ import annotations

import bisect
import collections
import os
import pathlib
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from janus_jax.io.files import open_regular
from train.raw.storage import machine_error, patiently
from train.records.bags import ENDING, BagReader

_CHECKED_AT_ONCE = 16  # threads that open files when a folder is opened
_MOST_OPEN = 1024  # each takes a file handle and up to 0.2 MB


T = TypeVar("T")
Reader = BagReader | ArrayRecordReader  # the second for folders prepared before version 3


def _reader(path: str) -> Reader:
    if path.endswith(ENDING):
        return BagReader(path)
    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)


class OpenFiles(Generic[T]):
    """What `make` opens at paths, shared by all threads; beyond `limit`, the least recently used one is dropped.

    A file is closed when its last user drops it, and so never while a thread reads from it: at most `limit` plus one
    for each thread are open.
    """

    def __init__(self, limit: int, make: Callable[[str], T]):
        self.limit, self._make = limit, make
        self.clear()

    def clear(self):
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, T] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: str) -> T:
        with self._lock:
            if (file := self._files.get(path)) is not None:
                self._files.move_to_end(path)
                return file
        # Outside the lock, so that each thread only waits for its own file.
        file = self._make(path)
        dropped = []
        with self._lock:
            self._files[path] = file
            while len(self._files) > self.limit:
                dropped.append(self._files.popitem(last=False))
        return file

    def drop(self, path: str):
        with self._lock:
            self._files.pop(path, None)


def handles() -> int:
    """Half of the file handles that this process may have; the rest is for everything else."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_OPEN if most == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, most // 2))


_open = OpenFiles(handles(), _reader)
# A forked child would share the parent's handles, and perhaps a lock held by a thread of the parent.
os.register_at_fork(after_in_child=_open.clear)


class Records:
    """The records of `files` in `folder`, `counts` of them in each; shared by threads, pickled without open files.

    Indexing raises IndexError beyond the end; OSError if a file cannot be reached, after several tries; RuntimeError or
    another error of the library if the file's content is damaged.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str], counts: Sequence[int]):
        self._paths = [os.path.join(folder, file) for file in files]
        self._begins = [0, *map(int, np.cumsum(np.asarray(counts, np.int64)))]

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._begins[-1]:
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._begins, index) - 1
        path, position = self._paths[shard], index - self._begins[shard]
        try:
            return _open.get(path).read([position])[0]
        except (RuntimeError, ValueError, IndexError, OSError, MemoryError) as error:
            met = [error]
        # The first try has failed: examine its error first, and then the file.
        return patiently(lambda: _read_again(path, position, met.pop() if met else None), path)

    def counted(self) -> int:
        """The number of records, counted by opening all files, a few at a time; raises as indexing does."""
        with ThreadPoolExecutor(min(_CHECKED_AT_ONCE, len(self._paths) or 1)) as pool:
            return sum(pool.map(lambda path: patiently(lambda: _count(path), path), self._paths))


def _read_again(path: str, position: int, error: Exception | None = None) -> bytes:
    """The record, read with a new reader; `error` is that of the shared reader."""
    # Once a reader has failed, it always fails.
    _open.drop(path)
    if error is not None:
        _raise_machine_error(error, path)
    # A second try before anything is called damaged.
    return _of_new_reader(path, lambda reader: reader.read([position])[0])


def _count(path: str) -> int:
    return _of_new_reader(path, _whole_count)


def _whole_count(reader: Reader) -> int:
    if reader.ok():
        return reader.num_records()
    reader.read([0])  # raises an error that says what is wrong
    raise RuntimeError("the file cannot be read")


def _of_new_reader(path: str, use):
    try:
        return use(_reader(path))
    except (RuntimeError, ValueError, IndexError) as error:
        _raise_machine_error(error, path)
        raise


def _raise_machine_error(error: Exception, path: str):
    """Raises the OSError behind `error`, if the machine is at fault."""
    if (found := machine_error(error, path)) is not None:
        _open.clear()  # our own open files may have used up the handles
        raise found from None
    # The library does not always report the system's error; opening the file does.
    with open_regular(path) as file:
        file.read(1)
