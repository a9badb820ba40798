"""Shard files in the format of Bagz: records one after the other, then the end of each as a 64-bit number.

A record is found by two numbers, so that a store serves it by one request for a range of bytes and a local disk by
`pread`. Each of ours begins with the CRC-32 of its content. `bagz.Reader` reads the files too.
"""

from __future__ import annotations

import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line

ENDING = ".bag"
_CRC = struct.Struct("<I")
_END_BYTES = 8


class BagWriter:
    """Writes the local file `path`; it is complete once `close` has returned, which raises OSError for a full disk."""

    def __init__(self, path: pathlib.Path):
        self.ends: list[int] = []
        self._file = open(path, "wb")  # noqa: SIM115 - until `close`
        self._at = 0

    def write(self, content: bytes):
        self._file.write(_CRC.pack(zlib.crc32(content)) + content)
        self._at += _CRC.size + len(content)
        self.ends.append(self._at)

    def close(self):
        with self._file as file:
            file.write(np.array(self.ends, "<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())


class BagReader:
    """The records of a local file, read at any position by any number of threads; one file handle.

    Raises: OSError if the file cannot be opened or read; ValueError if it is damaged, IndexError beyond its end.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file = open_regular(path)
        self._number = self._file.fileno()
        size = os.fstat(self._number).st_size
        self._table = int.from_bytes(self._bytes(size - _END_BYTES, _END_BYTES), "little") if size else 0
        if self._table > size or (size - self._table) % _END_BYTES or (size and not self._table):
            raise ValueError(f"{one_line(self.path)} has no table of its records: it is damaged")
        self._count = (size - self._table) // _END_BYTES

    def ok(self) -> bool:
        return True

    def num_records(self) -> int:
        return self._count

    def read(self, positions: Sequence[int]) -> list[bytes]:
        return [self._record(position) for position in positions]

    def _record(self, position: int) -> bytes:
        if not 0 <= position < self._count:
            raise IndexError(f"record {position} of {self._count} in {one_line(self.path)}")
        first = max(position - 1, 0)
        ends = np.frombuffer(self._bytes(self._table + _END_BYTES * first, _END_BYTES * (position - first + 1)), "<u8")
        begin, end = (int(ends[0]) if position else 0), int(ends[-1])
        if not begin + _CRC.size <= end <= self._table:
            raise ValueError(f"the table of records in {one_line(self.path)} is damaged at record {position}")
        return content_of(self._bytes(begin, end - begin))

    def _bytes(self, begin: int, size: int) -> bytes:
        data = os.pread(self._number, size, begin) if begin >= 0 else b""
        if len(data) < size:
            raise ValueError(f"{one_line(self.path)} ends before byte {begin + size}: it is damaged")
        return data


def content_of(record: bytes) -> bytes:
    """The content of a stored record; ValueError if it does not match its checksum."""
    if not is_whole(record):
        raise ValueError("the record does not match its checksum")
    return record[_CRC.size :]


def is_whole(record: bytes) -> bool:
    """Whether a stored record matches its checksum."""
    return len(record) >= _CRC.size and _CRC.unpack_from(record)[0] == zlib.crc32(memoryview(record)[_CRC.size :])
