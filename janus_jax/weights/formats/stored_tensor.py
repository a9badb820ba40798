"""A tensor that is still in its file, whatever the file's format."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store, read_spans

_BLOCK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """`size` bytes from byte `start` of a file, whose CRC-32 is `crc` (None: not recorded)."""

    start: int
    size: int
    crc: int | None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor inside a file: `strides` count elements, `offset` bytes from the file's start.

    `record` is the section of the file whose checksum covers it, if the format has checksums.
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    record: Record | None = None

    def view(self, verify: bool = True) -> np.ndarray:
        """The tensor as a read-only array over mapped pages of the file; from a store, its bytes are fetched.

        Args:
          verify: verify the record's checksum first, unless this process has already done so.
        Raises: ValueError if the checksum does not match, or the file has become shorter.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        num_bytes = extent(self.shape, self.strides) * self.dtype.itemsize
        if verify and self.record is not None:
            _verify(self.file, self.record)
        flat = np.frombuffer(_pages(self.file, self.offset, num_bytes), np.uint8)[-num_bytes:].view(self.dtype)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Number of elements that a strided tensor spans."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _pages(path: pathlib.Path, offset: int, num_bytes: int) -> mmap.mmap | bytes:
    """Bytes of `path` that end with the `num_bytes` bytes from `offset`."""
    if is_store(path):
        return read_spans(os.fspath(path), [(offset, offset + num_bytes)])[0]
    return _mapped(path, offset, num_bytes)


def _mapped(path: pathlib.Path, offset: int, num_bytes: int) -> mmap.mmap:
    """Pages of `path` that end with the `num_bytes` bytes from `offset`."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with open_regular(path) as file:
        try:
            mapped = mmap.mmap(file.fileno(), offset - start + num_bytes, access=mmap.ACCESS_READ, offset=start)
        except ValueError:
            raise ValueError(f"{one_line(path)} has become shorter since it was opened") from None
    if hasattr(mmap, "MADV_WILLNEED"):  # otherwise transposing reads would fault in pages one by one
        mapped.madvise(mmap.MADV_WILLNEED)
    return mapped


_verified: set[tuple[pathlib.Path, int, int, Record]] = set()


def _verify(path: pathlib.Path, record: Record):
    if record.crc is None:
        return
    status = path.stat()
    # A rewritten file counts as another one.
    key = (path, status.st_size, status.st_mtime_ns, record)
    if key in _verified:
        return
    crc = 0
    for begin in range(record.start, record.start + record.size, _BLOCK_BYTES):
        size = min(_BLOCK_BYTES, record.start + record.size - begin)
        crc = zlib.crc32(memoryview(_pages(path, begin, size))[-size:], crc)
    if crc != record.crc:
        raise ValueError(
            f"{one_line(path)} is damaged: the {record.size:,} bytes from byte {record.start:,} do not match their "
            "checksum; download it again"
        )
    _verified.add(key)
