"""The files of a tar, by its headers alone, in bounded time and memory.

The scan always moves forward, so that both are bounded by the file's size, whatever the headers say.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import struct
from collections.abc import Iterator

from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line
from janus_jax.io.stores import size_of

_BLOCK = 512
_MAX_EXTRA = 1 << 20  # bytes of an extended header
_MAX_NAME = 4096  # bytes, the longest path of Linux
_PADDING = 1 << 20  # bytes of zeros after an end, within which another archive may begin


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar, and the position of its bytes; `fault` says why they cannot be used.

    With its headers and padding it takes the bytes from `start` to before `end`.
    """

    name: str
    begin: int
    size: int
    fault: str
    start: int
    end: int


class _Damage(ValueError):
    pass


class Scan:
    """Iterates over the files of a tar; afterwards `fault` says what is wrong with its end, or is ''.

    With `data`, over those in these bytes of it, which begin with a header and end with a file.
    """

    def __init__(self, path: pathlib.Path, data: bytes | None = None):
        self.path, self.fault, self._last, self._data = path, "", "", data

    def __iter__(self) -> Iterator[Member]:
        with open_regular(self.path) if self._data is None else io.BytesIO(self._data + bytes(3 * _BLOCK)) as file:
            try:
                yield from self._members(file, size_of(file) if self._data is None else len(self._data))
            except _Damage as damage:
                after = f" after {one_line(self._last)}" if self._last else ""
                self.fault = f"{damage}{after}"

    def _members(self, file, end: int) -> Iterator[Member]:
        at, start, long_name, extra = 0, None, None, {}
        while True:
            file.seek(at)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                at, start = _next_archive(file, at), None
                if at is None:
                    return
                continue
            start = at if start is None else start
            if len(header) < _BLOCK:
                raise _Damage("no end of archive: it is truncated")
            if not _is_header(header):
                raise _Damage(f"no member header where one is expected (byte {at}): the tar is damaged")
            kind, size, begin = header[156:157], _number(header[124:136]), at + _BLOCK
            if size is None or size < 0:
                raise _Damage(f"a header without a usable size (byte {at}): the tar is damaged")
            if kind in b"xXgLK":
                if size > _MAX_EXTRA:
                    raise _Damage(f"an extended header of {size:,} bytes (byte {at}): the tar is damaged")
                data = file.read(size)
                if len(data) < size:
                    raise _Damage("truncated within a header")
                if kind == b"L":
                    long_name = data.split(b"\0", 1)[0]
                elif kind in b"xX":
                    extra = _pax(data, at)
                elif kind == b"g" and _pax(data, at):
                    raise _Damage(f"a global header that names or measures members (byte {at}), which is not supported")
                at = begin + _whole_blocks(size)
                continue
            fault = ""
            if kind == b"S":
                fault, begin = "it is stored sparse, which is not supported", _skip_sparse(file, begin)
            elif any(key.startswith(b"GNU.sparse") for key in extra):
                fault = "it is stored sparse, which is not supported"
            elif kind in b"123456":
                fault = "it is a link or a special file, which is not followed"
            if b"size" in extra:
                size = _decimal(extra[b"size"], at)
            name = extra.get(b"GNU.sparse.name", extra.get(b"path", long_name))
            name = _ustar_name(header) if name is None else name
            long_name, extra = None, {}
            is_folder = kind == b"5" or (kind in b"\0" + b"0" and name.endswith(b"/"))
            stored = 0 if kind in b"123456" else size
            if len(name) > _MAX_NAME:
                fault = fault or f"its name has {len(name):,} bytes"
                name = name[:100] + b"..." + name[-100:]
            text = name.decode("utf-8", "surrogateescape")
            if begin + stored > end:
                raise _Damage(f"truncated within {one_line(text)}")
            if not is_folder:
                self._last = text
                yield Member(text, begin, stored, fault, start, min(begin + _whole_blocks(stored), end))
            at, start = begin + _whole_blocks(stored), None


def _next_archive(file, at: int) -> int | None:
    """The position of another tar appended after the end at `at`, or None."""
    file.seek(at)
    for begin in range(at, at + _PADDING, _BLOCK):
        block = file.read(_BLOCK)
        if block.strip(b"\0"):
            if len(block) < _BLOCK or not _is_header(block):
                raise _Damage(f"something that is not a tar follows the end of the archive (byte {begin})")
            return begin
        if not block:
            return None
    return None


def _is_header(header: bytes) -> bool:
    checksum = _number(header[148:156])
    # Computed with the checksum field itself as eight spaces; some old programs summed signed bytes.
    if checksum == sum(header) - sum(header[148:156]) + 8 * 32:
        return True
    return checksum == sum(struct.unpack("148b8x356b", header)) + 8 * 32


def _number(field: bytes) -> int | None:
    """The value of octal digits, or of binary if the first byte says so; None if it is neither."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value - 256 ** (len(field) - 1) if field[0] == 0xFF else value
    digits = field.split(b"\0", 1)[0].strip()
    if digits.translate(None, b"01234567"):
        return None
    return int(digits or b"0", 8)


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise _Damage(f"an extended header without a usable size (byte {at}): the tar is damaged")
    return int(digits)


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pax(data: bytes, at: int) -> dict[bytes, bytes]:
    """The records `length key=value` that give a member's name or size."""
    found, begin = {}, 0
    while begin < len(data) and data[begin]:
        space = data.find(b" ", begin, begin + 20)
        digits = data[begin:space] if space > 0 else b""
        end = begin + int(digits) if digits.isdigit() else 0
        if not space < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _Damage(f"an extended header that cannot be read (byte {at}): the tar is damaged")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            found[key] = value
        begin = end
    return found


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _skip_sparse(file, begin: int) -> int:
    """The beginning of the data of a sparse member of old GNU tar: after further blocks of its map."""
    file.seek(begin - _BLOCK)
    more = file.read(_BLOCK)[482:483] == b"\1"
    while more:
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise _Damage("truncated within a header")
        more, begin = block[504:505] == b"\1", begin + _BLOCK
    return begin
