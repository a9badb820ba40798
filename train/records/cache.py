"""A cache on a local disk of records that were read from stores: what is read again costs no request.

    ADDRESS.VERSION.records   of one version of a shard: a sparse file with each record where it is in the shard

A record is there if it matches its checksum, which neither a hole nor a half-written record does. So a kill costs
nothing, and processes share the folder without locks.

Shuffled epochs read every record equally often, so the records of a run are kept until there is no more room, and then
stay: to replace them by others would only cost writes. Room is made from shards that nobody uses now, the least
recently used first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterable

from janus_jax.io.messages import one_line, print_note
from train.records.bags import is_whole
from train.records.local import OpenFiles, handles

_ENDING = ".records"
_BLOCK = 4096  # bytes of a disk's block, which a record takes whole
_PARTS = 64  # a process measures the folder again once it has written this part of what was free
_IN_USE = 600  # seconds without use after which a shard that this process does not read may be removed
_FULL_FOR = 60  # seconds until a full folder is measured again
_SPARE = 20  # this part of the disk is left to others


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """Where records are kept, and how many bytes of them."""

    folder: str
    num_bytes: int

    def check(self):
        """OSError in one line if files cannot be written to the folder, which is made if it is missing."""
        folder = pathlib.Path(self.folder)
        probe = folder / f".{secrets.token_hex(4)}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            told = f"data.cache cannot be written ({error.strerror}); choose another folder"
            raise OSError(error.errno, told, self.folder) from None


def name_of(address: str, version: str) -> str:
    """The name of the file with records of this version of the shard at `address`."""
    return f"{_hash(address, 24)}.{_hash(version, 16)}{_ENDING}"


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


class SampleCache:
    """The cache of `settings` in this process, shared by its threads.

    Nothing is raised once the cache is open: without a disk that can be read and written, nothing is found and kept,
    which is said once.
    """

    def __init__(self, settings: CacheSettings):
        self._folder, self._limit = pathlib.Path(settings.folder), settings.num_bytes
        self._own: set[str] = set()
        self._files = OpenFiles(max(1, handles() // 2), self._opened)
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()
        self._allowed, self._measure_after = 0, 0.0
        self._off = self._told = False

    def use(self, names: Iterable[str]):
        """Says that this process reads the shards `names`: other versions of them are removed."""
        names = set(names)
        self._own |= names
        addresses = {name.partition(".")[0] for name in names}
        try:
            for path in self._folder.glob(f"*{_ENDING}"):
                if path.name in names:
                    self._touch(path.name)
                elif path.name.partition(".")[0] in addresses:
                    path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def find(self, name: str, begin: int, end: int) -> bytes | None:
        """The record in the bytes [begin, end) of the shard `name`, with its checksum; None if it is not kept."""
        if self._off:
            return None
        try:
            if not os.path.exists(self._folder / name):
                self._files.drop(name)  # perhaps another process has removed it
                return None
            self._touch(name)
            record = os.pread(self._files.get(name).fileno(), end - begin, begin)
        except OSError as error:
            self._give_up(error)
            return None
        return record if len(record) == end - begin and is_whole(record) else None

    def keep(self, name: str, begin: int, record: bytes):
        """Keeps the bytes of the shard `name` from `begin` on, if there is room."""
        blocks = (begin + len(record) - 1) // _BLOCK - begin // _BLOCK + 1
        try:
            if not self._off and self._may_write(blocks * _BLOCK):
                os.pwrite(self._files.get(name).fileno(), record, begin)
        except OSError as error:
            self._give_up(error)

    def _opened(self, name: str):
        number = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._touch(name)
        return os.fdopen(number, "r+b", buffering=0)

    def _touch(self, name: str):
        now = time.time()
        if now - self._used.get(name, 0) > _IN_USE / 2:
            self._used[name] = now
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                os.utime(self._folder / name)

    def _may_write(self, num_bytes: int) -> bool:
        with self._lock:
            now = time.monotonic()
            if self._allowed < num_bytes and now >= self._measure_after:
                room = self._room()
                self._allowed = max(room // _PARTS, num_bytes if room >= num_bytes else 0)
                if not self._allowed:
                    self._measure_after = now + _FULL_FOR
            if self._allowed < num_bytes:
                return False
            self._allowed -= num_bytes
            return True

    def _room(self) -> int:
        """Bytes that may still be written, once shards that nobody uses are removed, if there are few."""
        there = {}
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(_ENDING):
                    there[entry.name] = entry.stat()
        sizes = {name: status.st_blocks * 512 for name, status in there.items()}
        disk, used = shutil.disk_usage(self._folder), sum(sizes.values())
        limit = min(self._limit, used + disk.free - disk.total // _SPARE)
        unused = [name for name, status in there.items() if status.st_mtime < time.time() - _IN_USE]
        for name in sorted(set(unused) - self._own, key=lambda name: there[name].st_mtime):
            if limit - used > limit // _PARTS:
                break
            (self._folder / name).unlink(missing_ok=True)
            used -= sizes[name]
        if limit - used <= 0 and limit < self._limit:
            self._tell(f"its disk has {disk.free / 1e9:.3g} GB free, so no more samples are kept there")
        return max(0, limit - used)

    def _give_up(self, error: OSError):
        self._off = True
        self._tell(f"{error.strerror or error}; samples are read from the store from now on")

    def _tell(self, what: str):
        told, self._told = self._told, True
        if not told:
            print_note(f"data.cache, {one_line(self._folder)}: {what}")

    def after_fork(self):
        """A child shares neither the lock, which a thread may have held, nor open files."""
        self._lock = threading.Lock()
        self._files.clear()


_caches: dict[CacheSettings, SampleCache] = {}


def cache_of(settings: CacheSettings) -> SampleCache:
    """The one of this process: what may be written is measured for all its folders together."""
    return _caches.setdefault(settings, SampleCache(settings))


def _forked():
    for cache in _caches.values():
        cache.after_fork()


os.register_at_fork(after_in_child=_forked)
