"""The merge: from complete shards, whoever wrote them, to a finished prepared folder.

Any number of processes may merge a folder, at the same time too: each writes the same bytes, and `prepared.json`, which
says that the folder is finished, last. Lists of all samples are written as they are read, a shard at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from janus_jax.io.files import parse_json
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.store_cache import local_copy
from janus_jax.io.stores import as_path
from janus_jax.io.whole.files import appearing, remove_partial, write_file
from train.config import PREFERENCE
from train.data.prepared import DROPPED, ENDS, FORMAT_VERSION, IMAGES, INDEX, LENGTHS, META, read_meta
from train.data.shard_files import data_file, listed_shards, missing_shards, read_indices, shard_count
from train.data.shards import Tally
from train.fleet.folder import mark_of

_STORED = {"generation": 1, PREFERENCE: 2}  # images of a sample that are codes
_REMOVED_AT_ONCE = 32  # files; a store answers late


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a preparation: samples of the source read and dropped (by reason), samples kept, their tokens.

    `pictures` counts the images of the kept samples; `changed` counts samples that a finished folder lacks and that
    could be prepared now; `waits_for` counts the shards of other parts that are not complete yet: then the folder is
    not finished, and the rest is about this part's shards.
    """

    folder: pathlib.Path
    kind: str
    read: int
    kept: int
    tokens: int
    dropped: dict[str, int]
    pictures: int
    changed: int = 0
    waits_for: int = 0

    def __str__(self) -> str:
        rows = [("read", self.read), ("kept", self.kept), ("images kept", self.pictures)]
        rows += [("dropped", sum(self.dropped.values()))]
        rows += [(f"  {reason}", count) for reason, count in self.dropped.items()]
        rows += [("tokens", self.tokens), ("mean length", round(self.tokens / max(self.kept, 1)))]
        lines = [f"{name:24} {value:>16,}" for name, value in rows]
        if self.changed:
            lines += [
                f"{self.changed:,} of the dropped samples would be treated differently now, since their files have "
                "appeared or changed; delete the folder and prepare it again to include them"
            ]
        if self.waits_for:
            lines += [
                f"this part is done; {self.waits_for:,} shards of other parts are missing yet, and the part that ends "
                "last finishes the folder"
            ]
        return "\n".join([f"{self.folder} ({self.kind})", *lines])


class Totals:
    """Sums over the indices of shards, for a report."""

    def __init__(self) -> None:
        self.read = self.kept = self.tokens = self.images = 0
        self.dropped: collections.Counter[str] = collections.Counter()

    def add(self, index: dict[str, Any]):
        self.read += index["read"]
        self.kept += len(index["lengths"])
        self.tokens += int(np.sum(index["lengths"], dtype=np.int64))
        self.images += int(np.sum(index["images"], dtype=np.int64))
        self.dropped.update(one["reason"] for one in index["dropped"])

    def report(self, out: pathlib.Path, kind: str, waits_for: int = 0) -> Report:
        counts = dict(self.dropped.most_common())
        pictures = _STORED[kind] * self.kept if kind in _STORED else self.images
        return Report(out, kind, self.read, self.kept, self.tokens, counts, pictures, waits_for=waits_for)


def merge(out: str | os.PathLike, max_bad_share: float = 0.01, ids: dict[str, int] | None = None) -> Report:
    """Finishes the folder `out`, all of whose shards are complete; one that is finished is left as it is.

    Args:
      ids: `special_ids` of the tokenizer, for folders begun by an earlier version.
    Raises: FileNotFoundError if it is no prepared folder; ValueError if shards are missing, of other settings, or have
    more than `max_bad_share` of bad samples over all.
    """
    out = as_path(out)
    meta = read_meta(out)
    if meta is None:
        raise FileNotFoundError(f"{one_line(out)} has no {META}: nothing has been prepared there")
    if meta["finished"]:
        drop_indices(out)
        return report_of(out, meta)
    count = shard_count(meta)
    meta.setdefault("ids", ids)
    if meta["ids"] is None or not count:
        told = "was begun by an earlier version; run the same `python -m train.prepare` again, without --merge"
        raise ValueError(f"{one_line(out)} {told}")
    try:
        missing = missing_shards(out, count)
        return _merge(out, meta, count, Tally(max_bad_share)) if not missing else _refuse(out, missing, count)
    except (FileNotFoundError, ValueError):
        # Another process may have finished it, and removed what was merged.
        now = read_meta(out)
        if now is None or not now["finished"]:
            raise
        return report_of(out, now)


def _refuse(out: pathlib.Path, missing: Sequence[int], count: int) -> Report:
    raise ValueError(
        f"{one_line(out)} cannot be merged: {len(missing)} of its {count} shards are missing "
        f"({listed_shards(missing)}); run the same `python -m train.prepare` to make them, with --part I/N in as many "
        "processes as you like"
    )


def _merge(out: pathlib.Path, meta: dict[str, Any], count: int, tally: Tally) -> Report:
    totals, files, found = Totals(), [], []
    with contextlib.ExitStack() as stack:
        lengths, images, ends = (
            stack.enter_context(_growing(out / name, dtype))
            for name, dtype in ((LENGTHS, np.int32), (IMAGES, np.int32), (ENDS, np.uint64))
        )
        dropped = stack.enter_context(open(stack.enter_context(appearing(out / DROPPED)), "w", encoding="utf-8"))
        for shard, index in read_indices(out, range(count), mark_of(meta["settings"])):
            found.append(shard)
            totals.add(index)
            tally.add(index["read"], index["dropped"])
            lengths.append(index["lengths"])
            images.append(index["images"])
            ends.append(index["ends"])
            dropped.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in index["dropped"])
            files.append(
                {
                    "file": data_file(shard),
                    "samples": len(index["lengths"]),
                    "bytes": index.get("bytes", 0),
                    "sha256": index.get("sha256", ""),
                }
            )
        if missing := sorted(set(range(count)) - set(found)):
            _refuse(out, missing, count)
        tally.check()
    report = totals.report(out, meta["kind"])
    done = {"version": FORMAT_VERSION, "finished": True, "read": report.read, "samples": report.kept}
    done |= {"tokens": report.tokens, "dropped": report.dropped, "shards": files}
    done[INDEX] = {LENGTHS: lengths.figures(), IMAGES: images.figures()}
    write_file(out / META, json.dumps(meta | done, indent=2, ensure_ascii=False) + "\n")
    drop_indices(out)
    return report


class _Growing:
    """A file as `np.save` writes it, to which values are appended."""

    def __init__(self, file: BinaryIO, dtype: type):
        self._file, self._dtype, self._count = file, np.dtype(dtype), 0
        self._digest, self._sum, self._max = hashlib.sha256(), 0, 0
        self._header()

    def _header(self):
        # Numpy leaves room in it for a larger number of values.
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, described | {"shape": (self._count,)})

    def append(self, values: Sequence[int]):
        array = np.asarray(values, self._dtype)
        self._file.write(array.tobytes())
        self._digest.update(array)
        self._count += len(array)
        if len(array):
            self._sum, self._max = self._sum + int(array.sum(dtype=np.int64)), max(self._max, int(array.max()))

    def close(self):
        self._file.seek(0)
        self._header()

    def figures(self) -> dict[str, Any]:
        return {"sha256": self._digest.hexdigest(), "sum": self._sum, "max": self._max}


@contextlib.contextmanager
def _growing(path: pathlib.Path, dtype: type) -> Iterator[_Growing]:
    with appearing(path) as partial, open(partial, "wb") as file:
        grown = _Growing(file, dtype)
        yield grown
        grown.close()


def report_of(out: pathlib.Path, meta: dict[str, Any], changed: int = 0) -> Report:
    """The report of a finished folder."""
    pictures = _STORED.get(meta["kind"], 0) * meta["samples"]
    if meta["kind"] not in _STORED:
        if INDEX in meta:
            pictures = meta[INDEX][IMAGES]["sum"]
        else:  # of an earlier version
            images = np.load(local_copy(out / IMAGES) if is_store(out) else out / IMAGES, allow_pickle=False)
            pictures = int(images.sum(dtype=np.int64))
    totals = meta["read"], meta["samples"], meta["tokens"], meta["dropped"]
    return Report(out, meta["kind"], *totals, pictures, changed)


def read_dropped(out: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        with (out / DROPPED).open("rb") as file:
            for line in file:
                one = parse_json(line.decode("utf-8"), DROPPED) if line.strip() else None
                if isinstance(one, dict) and isinstance(one.get("item"), int) and "reason" in one:
                    yield one
    except (FileNotFoundError, ValueError):
        return  # the file is for people, and may have been edited


def drop_indices(out: pathlib.Path):
    """Removes what was merged, and what killed processes left."""
    # Records of version 2 were written again.
    old = [*out.glob("data-*.json"), *out.glob("data-*.array_record")]
    with ThreadPoolExecutor(_REMOVED_AT_ONCE) as pool:
        for _ in pool.map(lambda path: path.unlink(missing_ok=True), old):
            pass
    remove_partial(out, left_after=0)
