"""Tar shards of `key.jpg`, `key.txt`, `key.json`, as img2dataset and webdataset write them, indexed by one scan.

An error in one member is an error of its sample; if a tar is truncated or damaged, the samples before that point are
read, and the rest counts as one more, bad sample.
"""

from __future__ import annotations

import bisect
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from janus_jax.io.files import read_ranges
from janus_jax.io.messages import one_line
from train.raw.indices import index_of, rows_of
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
from train.raw.tar.headers import Member, Scan

TEXT_SUFFIXES = (".txt", ".caption")
_UNUSED = 1 << 20  # bytes of other members and long names that may be read with a sample
_IMAGE, _TEXT, _JSON = range(3)


class TarShard:
    """Samples of a tar: members whose names agree up to the first dot of the file name.

    `passed_over` are members that belong to no sample. Where the members of each sample stand together, as they nearly
    always do, only their place in the tar is kept (see `indices` for the folder `index`); else their names are, too.
    """

    def __init__(self, path: pathlib.Path, index: pathlib.Path | None = None):
        self.path = path
        refuse_compressed(path)
        self._whole: _Whole | None = None
        self._index = index_of(path, index, "tar", self._build)
        if self._index is not None:
            self.passed_over = PassedOver(*self._index.about["passed"])

    def _build(self, add: Callable[[np.ndarray], Any]) -> dict[str, Any] | None:
        scan = Scan(self.path)
        groups, fields, self.passed_over = _group(scan)
        if scan.fault or not _stand_together(groups, fields):
            self._whole = _Whole(groups, scan.fault)
            return None
        begins = np.array([group.first for group in groups], np.int64)
        sizes = np.array([group.last for group in groups], np.int64) - begins
        add(rows_of(begins, sizes, np.arange(1, len(groups) + 1), 0))
        return {"passed": [self.passed_over.count, self.passed_over.first]}

    def __len__(self) -> int:
        return len(self._index if self._index is not None else self._whole)

    def __getitem__(self, index: int) -> Record:
        if self._index is None:
            key, spans, fault = self._whole.sample(index, self.path)
            place = one_line(f"{self.path}/{key}", 500)
        else:
            begin, size, _ = self._index[index]
            data = self._read([(begin, size)], one_line(f"{self.path} at byte {begin}", 500))[0]
            groups, *_ = _group(Scan(self.path, data))
            if len(groups) != 1:
                raise BadSample(
                    "truncated_tar", str(self.path), f"the tar has changed since it was opened (byte {begin})"
                )
            (group,) = groups
            spans, fault = np.reshape(group.spans, (3, 2)).tolist(), group.told()
            place = one_line(f"{self.path}/{group.key}", 500)
        if fault:
            raise BadSample(fault[0], place, fault[1])
        image, text, fields = spans
        told = text if text[0] >= 0 else fields
        if self._index is None:
            image, told = self._read([image, told], place)
        else:
            image, told = (data[at : at + length] for at, length in (image, told))
        caption = text_of(told, place)
        if text[0] < 0:
            caption = object_of(caption, place).get("caption")
            if caption is None:
                raise BadSample("missing_field", place, "there is no .txt file, and no caption in the .json file")
        return place, {"image": image, "caption": caption}

    def _read(self, spans: Sequence[tuple[int, int]], place: str) -> list[bytes]:
        try:
            return read_ranges(self.path, [(begin, begin + size) for begin, size in spans])
        except ValueError:
            raise BadSample("truncated_tar", place, "the tar has become shorter since it was opened") from None


class _Whole:
    """The samples of a tar by name and place, if their members stand apart, or if it is damaged after some."""

    def __init__(self, groups: list[_Group], broken: str):
        self._broken = broken
        if broken and groups and not groups[-1].whole:
            # The last sample may have been cut: without an image or a text it counts as lost.
            groups.pop()
        self._keys = Names(group.key for group in groups)
        self._spans = np.array([group.spans for group in groups], np.int64).reshape(-1, 3, 2)
        self._faults = {i: fault for i, group in enumerate(groups) if (fault := group.told())}

    def __len__(self) -> int:
        return len(self._keys) + bool(self._broken)

    def sample(self, index: int, path: pathlib.Path) -> tuple[str, list[list[int]], tuple[str, str] | None]:
        """Name, places of its members, and what is wrong with it."""
        if index == len(self._keys):
            raise BadSample("truncated_tar", str(path), self._broken)
        return self._keys[index], self._spans[index].tolist(), self._faults.get(index)


# ---------------------------------------------------------------- members to samples


class _Group:
    """The members of one sample."""

    __slots__ = ("alone", "fault", "first", "key", "last", "name", "others", "spans", "suffixes")

    def __init__(self, name: str, time: int, first: int):
        self.name, self.key = name, name if time == 1 else f"{name} ({time})"
        self.first = self.last = first  # its bytes in the tar
        self.alone = time == 1  # whether its own members say all about it
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


def _group(members: Iterable[Member]) -> tuple[list[_Group], list[tuple[_Group, _Group]], PassedOver]:
    """Samples in the order of their first members; groups that are fields of a sample, and this; and other members.

    Others are those that belong to no sample, except macOS's own files.
    """
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
            group = latest[name] = _Group(name, times[name], member.start)
            groups.append(group)
        group.last = member.end
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
    kept, fields, passed = [], [], PassedOver()
    for group in groups:
        first = _first_part(group.name)
        owner = latest.get(first) if first != group.name else None
        if owner is not None and owner.named:
            # A field such as `a.seg.png` or `a.meta.json` of the sample `a`, which is not used here; but with both
            # image and text, programs other than webdataset mean a separate sample `a.seg`.
            if group.suffixes[_IMAGE] and group.suffixes[_TEXT]:
                detail = f"a separate sample, or fields of the sample {one_line(first)}? Rename it without a dot"
                group.fault, group.alone = ("ambiguous_sample", detail), False
                kept.append(group)
            else:
                fields.append((group, owner))
        elif group.named or any(suffix in OTHER_MEDIA_SUFFIXES for suffix in group.others):
            kept.append(group)
        else:
            passed.add(group.key + (group.others[0] if group.others[0].startswith(".") else ""))
    return kept, fields, passed


def _stand_together(groups: Sequence[_Group], fields: Sequence[tuple[_Group, _Group]]) -> bool:
    """Whether each sample's bytes in the tar, from its first member to its last, make this sample and no other."""
    end = 0
    for group in groups:
        size, used = group.last - group.first, sum(max(0, size) for size in group.spans[1::2])
        if group.first < end or not group.alone or size > min(2 * used + _UNUSED, MAX_PICTURE + MAX_TEXT):
            return False
        end = group.last
    firsts = [group.first for group in groups]
    for field, owner in fields:
        at = bisect.bisect_left(firsts, field.last) - 1
        while at >= 0 and groups[at].last > field.first:
            if groups[at] is not owner:
                return False
            at -= 1
    return True


def _first_part(name: str) -> str:
    """webdataset's key: the name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
