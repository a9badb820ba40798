"""Writes the shards of a prepared folder: each from a fixed range of the source's samples, and atomically.

After `data-00000.bag`, its index `data-00000.json` is written (lengths, images, ends, dropped samples), which is merged
into the folder's own index at the end. A folder in a store gets each file whole, and so the index after its records.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from train.data.bags import BagWriter
from train.data.samples import Sample
from train.data.shard_files import appearing, data_file, index_file, replace_file
from train.data.tokenize import SampleTokenizer
from train.raw.sources import BadSample
from train.raw.storage import patiently

# Fewer samples say too little about the share of bad ones.
_LEAST_READ = 100

Encode = Callable[[np.ndarray], Any]


class ShardWriter:
    """Writes shards, and counts bad samples over all of them."""

    def __init__(self, source, out, tokenize: SampleTokenizer, encode, batch_size: int, max_bad_share: float):
        self.source, self.out, self.tokenize, self.encode = source, out, tokenize, encode
        self.batch_size, self.max_bad_share = batch_size, max_bad_share
        self.read, self.dropped = 0, collections.Counter()
        self.first: dict[str, str] = {}

    def add(self, read: int, dropped: Sequence[dict[str, str]]):
        self.read += read
        for one in dropped:
            self.dropped[one["reason"]] += 1
            self.first.setdefault(one["reason"], f"{one['place']}: {one['detail']}")

    def check(self):
        """Raises ValueError if too many samples have been bad so far."""
        bad = self.dropped.total()
        if bad > self.max_bad_share * self.read:
            reasons = "; ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.dropped.items())
            raise ValueError(
                f"{bad} of {self.read} samples are bad, more than max_bad_share {self.max_bad_share:g}: {reasons}; "
                "fix the data, or allow more with --max-bad-share"
            )

    def make(self, item: int) -> tuple[list[Sample], np.ndarray | None] | BadSample:
        """Raises OSError if the machine cannot read the item or has no memory for it, even after several tries."""
        try:
            return patiently(lambda: self._make(item))
        except BadSample as error:
            return error

    def _make(self, item: int) -> tuple[list[Sample], np.ndarray | None]:
        raw = self.source[item]
        samples, pixels = self.tokenize(raw)
        return [dataclasses.replace(sample, place=_writable(raw.place)) for sample in samples], pixels

    def decides_anew(self, dropped: Sequence[dict[str, Any]]) -> int:
        """How many dropped samples would now be kept, or dropped for another reason, since files may have appeared."""
        count = 0
        for one in dropped:
            made = self.make(one["item"]) if one.get("item", -1) in range(len(self.source)) else None
            count += not isinstance(made, BadSample) or made.reason != one["reason"]
        return count

    def write(self, pool: ThreadPoolExecutor, shard: int, items: range, on_read: Callable[[int], Any]) -> dict:
        """Writes the shard of `items` and then its index, and returns the index."""
        with appearing(self.out / data_file(shard)) as partial:
            index = self._write(pool, partial, items, on_read)
            if not index["lengths"]:
                partial.unlink()
        replace_file(self.out / index_file(shard), json.dumps(index, ensure_ascii=False))
        return index

    def _write(self, pool: ThreadPoolExecutor, path: pathlib.Path, items: range, on_read: Callable[[int], Any]) -> dict:
        index = {"read": len(items), "lengths": [], "images": [], "dropped": []}
        digest, waiting = hashlib.sha256(), []
        writer = BagWriter(path)

        def put(sample: Sample):
            record = sample.to_bytes()
            writer.write(record)
            digest.update(record)
            index["lengths"].append(sample.length)
            index["images"].append(len(sample.images))

        try:
            # Enough ahead to keep the threads busy while a batch is being encoded.
            for item, made in zip(items, _in_order(pool, self.make, items, ahead=2 * self.batch_size), strict=True):
                bad = [dataclasses.asdict(_Dropped.of(made)) | {"item": item}] if isinstance(made, BadSample) else []
                index["dropped"] += bad
                self.add(1, bad)
                on_read(1)
                if bad:
                    if self.read >= _LEAST_READ:
                        self.check()
                elif made[1] is None:
                    for sample in made[0]:
                        put(sample)
                else:
                    waiting.append((made[0][0], made[1]))
                    if len(waiting) == self.batch_size:
                        for sample in self.add_codes(waiting):
                            put(sample)
                        waiting.clear()
            for sample in self.add_codes(waiting):
                put(sample)
        finally:
            writer.close()
        if index["lengths"]:
            size = path.stat().st_size
            index |= {"ends": writer.ends, "bytes": size, "sha256": digest.hexdigest()}
        return index

    def add_codes(self, waiting: list[tuple[Sample, np.ndarray]]) -> Iterator[Sample]:
        if not waiting:
            return
        # Always the same shape, so that it is compiled once.
        images = np.zeros((self.batch_size, *waiting[0][1].shape), np.float32)
        images[: len(waiting)] = [pixels for _, pixels in waiting]
        codes = np.asarray(self.encode(images))
        expected = (self.batch_size, self.tokenize.processor.config.gen_vision.num_tokens)
        if codes.shape != expected or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"encode gave {codes.dtype} {list(codes.shape)}, expected integers {list(expected)}")
        if codes[: len(waiting)].min() < 0:  # as `VQModel.encode` marks vectors that are not finite
            raise ValueError("the VQ encoder's values are not finite: its weights are damaged; get them again")
        for (sample, _), own in zip(waiting, codes.astype(np.int32), strict=False):
            yield dataclasses.replace(sample, codes=own)


@dataclasses.dataclass(frozen=True)
class _Dropped:
    reason: str
    place: str
    detail: str

    @classmethod
    def of(cls, error: BadSample) -> _Dropped:
        return cls(_writable(error.reason), _writable(error.place), _writable(error.detail))


def _writable(text: str) -> str:
    # The data may contain lone surrogates, which cannot be written.
    return text.encode(errors="replace").decode()


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: range, ahead: int) -> Iterator[Any]:
    """`function` of each item in order, computed by `pool`, with at most `ahead` of them computed in advance."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
