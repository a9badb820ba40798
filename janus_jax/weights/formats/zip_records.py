"""Locates the records of an uncompressed zip archive, as torch.save writes it, and cross-checks all its headers.

A zip archive states the place and size of each record several times: in the directory at its end, in a header before
the record, and often in a descriptor after it. Readers that trust only one of them read wrong bytes if it is damaged.
Here all have to agree, and the records have to fill the archive without gaps.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from janus_jax.io.messages import one_line
from janus_jax.io.stores import size_of
from janus_jax.weights.formats.stored_tensor import Record

_MAX_RECORDS = 200_000
_MAX_DIRECTORY = 64 << 20  # bytes
_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_ENCRYPTED, _DESCRIBED, _UTF8 = 1, 1 << 3, 1 << 11
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


class NoZip(ValueError):
    """The file does not end like a zip archive."""


def read_records(file: BinaryIO) -> dict[str, Record]:
    """Every record of the archive `file`, by name.

    Raises: NoZip if the file is not an archive, or truncated; ValueError if its headers disagree, or for anything that
      torch.save does not write: compressed or encrypted records, multi-volume archives.
    """
    size = size_of(file)
    count, directory_size, directory_at = _find_directory(file, size)
    file.seek(directory_at)
    directory = file.read(directory_size)
    records: dict[str, Record] = {}
    spans = []
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > directory_size:
            raise ValueError("its directory is damaged")
        fields = _ENTRY.unpack_from(directory, at)
        magic, _, _, flags, method, _, _, crc, packed, unpacked, name_size, extra_size, comment_size = fields[:13]
        disk, header_at = fields[13], fields[-1]
        name_at = at + _ENTRY.size
        extra_at = name_at + name_size
        at = extra_at + extra_size + comment_size
        if magic != b"PK\1\2" or at > directory_size:
            raise ValueError("its directory is damaged")
        raw_name = directory[name_at:extra_at]
        name = raw_name.decode("utf-8", "surrogateescape")
        label = one_line(name)
        sizes = _wide(directory[extra_at : extra_at + extra_size], unpacked, packed, header_at)
        unpacked, packed, header_at = sizes
        if method != 0 or packed != unpacked:
            raise ValueError(f"its record {label} is compressed, which torch.save never does")
        if flags & ~(_DESCRIBED | _UTF8) or disk != 0:
            raise ValueError(f"its record {label} is encrypted, or in another volume of the archive")
        if name in records:
            raise ValueError(f"its record {label} appears twice")
        start, end = _check_local(file, raw_name, flags, crc, unpacked, header_at, directory_at)
        # torch.serialization.set_crc32_options(False) writes zeros.
        records[name] = Record(start, unpacked, crc or None)
        spans.append((header_at, end, label))
    if at != directory_size:
        raise ValueError("its directory is damaged")
    expected = 0
    for header_at, end, label in sorted(spans):
        if header_at != expected:
            raise ValueError(f"its record {label} begins at byte {header_at:,} instead of {expected:,}")
        expected = end
    if expected != directory_at:
        raise ValueError(f"its records end at byte {expected:,}, its directory begins at {directory_at:,}")
    return records


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of records, size and place of the directory."""
    tail_size = min(size, _END.size + _FULL16)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:  # those bytes may also appear in a comment
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail):
            break
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise NoZip("it does not end like a zip archive")
    _, disk, first_disk, here, count, directory_size, directory_at, _ = _END.unpack_from(tail, at)
    end = size - tail_size + at
    if end >= _LOCATOR.size:
        file.seek(end - _LOCATOR.size)
        magic, _, wide_at, disks = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if magic == b"PK\6\7":
            wide = _read_end64(file, wide_at, end - _LOCATOR.size)
            narrow = (here, _FULL16), (count, _FULL16), (directory_size, _FULL32), (directory_at, _FULL32)
            if disks != 1 or any(n not in (full, w) for (n, full), w in zip(narrow, wide, strict=True)):
                raise ValueError("the ends of its two directories differ")
            here, count, directory_size, directory_at = wide
            end = wide_at
    if disk or first_disk or here != count:
        raise ValueError("it is one volume of a multi-volume archive")
    if directory_at + directory_size != end:
        raise ValueError("its directory is not where the archive's end says")
    if count > _MAX_RECORDS or directory_size > _MAX_DIRECTORY:
        raise ValueError(f"it has {count:,} records, more than {_MAX_RECORDS:,}, or a directory of over 64 MiB")
    return count, directory_size, directory_at


def _read_end64(file: BinaryIO, at: int, end: int) -> tuple[int, int, int, int]:
    if at + _END64.size != end:
        raise ValueError("its end is damaged")
    file.seek(at)
    magic, length, _, _, disk, first_disk, here, count, directory_size, directory_at = _END64.unpack(
        file.read(_END64.size)
    )
    if magic != b"PK\6\6" or length != _END64.size - 12 or disk or first_disk:
        raise ValueError("its end is damaged")
    return here, count, directory_size, directory_at


def _wide(extra: bytes, *narrow: int) -> list[int]:
    """The 32-bit values `narrow`, with each maximal one replaced by its 64-bit value from the `extra` field."""
    wide = b""
    at = 0
    while at < len(extra):
        if at + 4 > len(extra):
            raise ValueError("its directory is damaged")
        kind, size = struct.unpack_from("<2H", extra, at)
        if at + 4 + size > len(extra):
            raise ValueError("its directory is damaged")
        if kind == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    numbers = []
    for number in narrow:
        if number == _FULL32:
            if len(wide) < 8:
                raise ValueError("its directory lacks a 64-bit value")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        numbers.append(number)
    return numbers


def _check_local(
    file: BinaryIO, raw_name: bytes, flags: int, crc: int, size: int, at: int, limit: int
) -> tuple[int, int]:
    """First byte of the record whose header is at byte `at`, and the byte past its descriptor, if it has one."""
    label = one_line(raw_name.decode("utf-8", "surrogateescape"))
    if at + _LOCAL.size > limit:
        raise ValueError(f"the header of its record {label} is outside the records")
    file.seek(at)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    magic, _, its_flags, method, _, _, its_crc, packed, unpacked, name_size, extra_size = fields
    name, extra = file.read(name_size), file.read(extra_size)
    start = at + _LOCAL.size + name_size + extra_size
    if start + size > limit or magic != b"PK\3\4":
        raise ValueError(f"its record {label} is not where the directory says")
    unpacked, packed = _wide(extra, unpacked, packed)
    described = its_flags & _DESCRIBED and (its_crc, packed, unpacked) == (0, 0, 0)
    if (name, its_flags, method) != (raw_name, flags, 0) or not (
        described or (its_crc, packed, unpacked) == (crc, size, size)
    ):
        raise ValueError(f"the header of its record {label} differs from the directory")
    end = start + size
    if flags & _DESCRIBED:
        # 64-bit sizes are written only if 32 bits are not enough.
        form = struct.Struct("<4sI2I") if size < _FULL32 else struct.Struct("<4sI2Q")
        file.seek(end)
        if file.read(form.size) != form.pack(b"PK\7\10", crc, size, size):
            raise ValueError(f"the descriptor after its record {label} differs from the directory")
        end += form.size
    return start, end
