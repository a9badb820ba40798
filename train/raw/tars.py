"""Tar shards of `key.jpg`, `key.txt`, `key.json`, as img2dataset and webdataset write them, indexed by one scan.

The scan only reads headers and always moves forward, so that its time and memory are bounded by the file's size,
whatever the headers say. An error in one member is an error of its sample; if a tar is truncated or damaged, the
samples before that point are read, and the rest counts as one more, bad sample.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from janus_jax.io.files import open_regular, read_ranges
from janus_jax.io.messages import one_line
from janus_jax.io.stores import size_of
from train.raw.readers import (
    MAX_PICTURE,
    MAX_TEXT,
    OTHER_MEDIA_SUFFIXES,
    PICTURE_SUFFIXES,
    BadSample,
    Names,
    PassedOver,
    Record,
    listed,
    object_of,
    refuse_compressed,
    text_of,
)

TEXT_SUFFIXES = (".txt", ".caption")
_BLOCK = 512
_MAX_EXTRA = 1 << 20  # bytes of an extended header
_MAX_NAME = 4096  # bytes, the longest path of Linux
_PADDING = 1 << 20  # bytes of zeros after an end, within which another archive may begin
_IMAGE, _TEXT, _JSON = range(3)


class TarShard:
    """Samples of a tar: members whose names agree up to the first dot of the file name.

    `passed_over` are members that belong to no sample.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        refuse_compressed(path)
        scan = _Scan(path)
        groups, self.passed_over = _group(scan)
        self._broken = scan.fault
        if self._broken and groups and not groups[-1].whole:
            # The last sample may have been cut: without an image or a text it counts as lost.
            groups.pop()
        self._keys = Names(group.key for group in groups)
        self._spans = np.array([group.spans for group in groups], np.int64).reshape(-1, 3, 2)
        self._faults = {i: fault for i, group in enumerate(groups) if (fault := group.told())}

    def __len__(self) -> int:
        return len(self._keys) + bool(self._broken)

    def __getitem__(self, index: int) -> Record:
        if index == len(self._keys):
            raise BadSample("truncated_tar", str(self.path), self._broken)
        place = one_line(f"{self.path}/{self._keys[index]}", 500)
        if index in self._faults:
            reason, detail = self._faults[index]
            raise BadSample(reason, place, detail)
        image, text, fields = self._spans[index].tolist()
        told = text if text[0] >= 0 else fields
        image, told = self._read([image, told], place)
        caption = text_of(told, place)
        if text[0] < 0:
            caption = object_of(caption, place).get("caption")
            if caption is None:
                raise BadSample("missing_field", place, "there is no .txt file, and no caption in the .json file")
        return place, {"image": image, "caption": caption}

    def _read(self, spans: list[list[int]], place: str) -> list[bytes]:
        try:
            return read_ranges(self.path, [(begin, begin + size) for begin, size in spans])
        except ValueError:
            raise BadSample("truncated_tar", place, "the tar has become shorter since it was opened") from None


# ---------------------------------------------------------------- members to samples


class _Group:
    """The members of one sample."""

    __slots__ = ("fault", "key", "name", "others", "spans", "suffixes")

    def __init__(self, name: str, time: int):
        self.name, self.key = name, name if time == 1 else f"{name} ({time})"
        self.spans, self.suffixes = [-1] * 6, [""] * 3
        self.others: tuple[str, ...] = ()
        self.fault: tuple[str, str] | None = None

    @property
    def named(self) -> bool:
        return any(self.suffixes)

    @property
    def whole(self) -> bool:
        return bool(self.suffixes[_IMAGE] and (self.suffixes[_TEXT] or self.suffixes[_JSON]))

    def told(self) -> tuple[str, str] | None:
        """Reason and detail of what is wrong with the sample, or None."""
        found = listed(dict.fromkeys((*filter(None, self.suffixes), *self.others)))
        media = [suffix for suffix in self.others if suffix in OTHER_MEDIA_SUFFIXES]
        if self.fault:
            return self.fault
        if media:
            return "unsupported_media", f"it has a {media[0]} file; only images and text are supported"
        if not self.suffixes[_IMAGE]:
            return "missing_image", f"there is no image of this name; found {found}"
        if not self.whole:
            return "missing_field", f"there is no .txt or .json file of this name; found {found}"
        return None


def _kind(suffix: str) -> int | None:
    if suffix in PICTURE_SUFFIXES:
        return _IMAGE
    return _TEXT if suffix in TEXT_SUFFIXES else _JSON if suffix == ".json" else None


def _group(members: Iterator[_Member]) -> tuple[list[_Group], PassedOver]:
    """Samples in the order of their first members, and members that belong to none (except macOS's own files)."""
    groups: list[_Group] = []
    latest: dict[str, _Group] = {}
    times: dict[str, int] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        if base.startswith(".") or "__MACOSX" in folder.split("/") or not base:
            continue
        stem, suffix = os.path.splitext(base)
        suffix, name = suffix.lower(), folder + slash + stem
        kind, group = _kind(suffix), latest.get(name)
        # A repeated member begins another sample, since tars may be concatenated.
        if group is None or (kind is not None and group.suffixes[kind] == suffix):
            times[name] = times.get(name, 0) + 1
            group = latest[name] = _Group(name, times[name])
            groups.append(group)
        if kind is None:
            group.others += (suffix or base,) if len(group.others) < 20 else ()
            continue
        if group.suffixes[kind]:
            both = f"{group.suffixes[kind]} and {suffix}"
            group.fault = group.fault or ("ambiguous_sample", f"it has both {both}; keep only one of them")
        group.suffixes[kind] = suffix
        group.spans[2 * kind : 2 * kind + 2] = member.begin, member.size
        limit = MAX_PICTURE if kind == _IMAGE else MAX_TEXT
        if member.fault:
            group.fault = group.fault or ("bad_member", f"{suffix}: {member.fault}")
        elif member.size > limit:
            group.fault = group.fault or ("too_large", f"{suffix} has {member.size:,} bytes, more than {limit:,}")
    kept, passed = [], PassedOver()
    for group in groups:
        first = _first_part(group.name)
        owner = latest.get(first) if first != group.name else None
        if owner is not None and owner.named:
            # A field such as `a.seg.png` or `a.meta.json` of the sample `a`, which is not used here; but with both
            # image and text, programs other than webdataset mean a separate sample `a.seg`.
            if group.suffixes[_IMAGE] and group.suffixes[_TEXT]:
                detail = f"a separate sample, or fields of the sample {one_line(first)}? Rename it without a dot"
                group.fault = ("ambiguous_sample", detail)
                kept.append(group)
        elif group.named or any(suffix in OTHER_MEDIA_SUFFIXES for suffix in group.others):
            kept.append(group)
        else:
            passed.add(group.key + (group.others[0] if group.others[0].startswith(".") else ""))
    return kept, passed


def _first_part(name: str) -> str:
    """webdataset's key: the name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


# ---------------------------------------------------------------- headers


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar, and the position of its bytes; `fault` says why they cannot be used."""

    name: str
    begin: int
    size: int
    fault: str = ""


class _Damage(ValueError):
    pass


class _Scan:
    """Iterates over the files of a tar; afterwards `fault` says what is wrong with its end, or is ''."""

    def __init__(self, path: pathlib.Path):
        self.path, self.fault, self._last = path, "", ""

    def __iter__(self) -> Iterator[_Member]:
        with open_regular(self.path) as file:
            try:
                yield from self._members(file, size_of(file))
            except _Damage as damage:
                after = f" after {one_line(self._last)}" if self._last else ""
                self.fault = f"{damage}{after}"

    def _members(self, file, end: int) -> Iterator[_Member]:
        at, long_name, extra = 0, None, {}
        while True:
            file.seek(at)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                at = _next_archive(file, at)
                if at is None:
                    return
                continue
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
                yield _Member(text, begin, stored, fault)
            at = begin + _whole_blocks(stored)


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
