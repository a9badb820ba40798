"""Writes the shards of a prepared folder: each from a fixed range of the source's samples, and atomically.

After `data-00000.bag`, its index `data-00000.json` is written (lengths, images, ends, dropped samples), which is merged
into the folder's own index at the end. While a batch of images is being encoded, the next is read, and the one before
is written; a complete shard is stored while the next is made.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from janus_jax.io.ahead import in_order
from janus_jax.io.whole.files import discard, new_partial, publish, write_file
from train.config import PREFERENCE
from train.data.prepared import read_meta
from train.data.samples import Sample
from train.data.shard_files import data_file, index_file, index_text
from train.data.tokenize import SampleTokenizer
from train.raw.sources import BadSample
from train.raw.storage import patiently
from train.records.bags import BagWriter

# Fewer samples say too little about the share of bad ones.
LEAST_READ = 100

Encode = Callable[[np.ndarray], Any]


class Tally:
    """Counts samples that were read, and bad ones by reason."""

    def __init__(self, max_bad_share: float):
        self.max_bad_share = max_bad_share
        self.read, self.dropped = 0, collections.Counter()
        self.first: dict[str, str] = {}

    def add(self, read: int, dropped: Sequence[dict[str, Any]]):
        self.read += read
        for one in dropped:
            self.dropped[one["reason"]] += 1
            self.first.setdefault(one["reason"], f"{one['place']}: {one['detail']}")

    def include(self, read: int, counts: Mapping[str, int], first: Mapping[str, str]):
        """Adds what another process has counted."""
        self.read += read
        self.dropped.update(counts)
        self.first = {**first, **self.first}

    def check(self, least: int = 0):
        """Raises ValueError if at least `least` samples have been read, and too many of them were bad."""
        bad = self.dropped.total()
        if self.read >= least and bad > self.max_bad_share * self.read:
            reasons = "; ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.dropped.items())
            raise ValueError(
                f"{bad} of {self.read} samples are bad, more than max_bad_share {self.max_bad_share:g}: {reasons}; "
                "fix the data, or allow more with --max-bad-share"
            )


class ShardWriter:
    """Writes shards of `source` to `out`; `tally` has the samples read so far.

    Args:
      encode: as in `train.prepare.prepare`; it may return before the codes are computed.
      mark: stands for the settings in the index of each shard, see `train.fleet.folder`.
    """

    def __init__(self, source, out, tokenize: SampleTokenizer, encode, batch_size: int, tally: Tally, mark: str = ""):
        self.source, self.out, self.tokenize, self.encode = source, out, tokenize, encode
        self.batch_size, self.tally, self.mark = batch_size, tally, mark
        self._images = 2 if tokenize.kind == PREFERENCE else 1  # of a sample that are encoded

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

    def write(
        self, pool: ThreadPoolExecutor, shards: Mapping[int, range], on_read: Callable[[int], Any]
    ) -> Iterator[dict]:
        """Writes each of `shards`, of these items of the source, and its index; yields the indices."""
        # Enough ahead to keep the threads busy while a batch is being encoded, over the ends of shards.
        items = itertools.chain.from_iterable(shards.values())
        made = in_order(items, self.make, pool, 2 * self.batch_size)
        with ThreadPoolExecutor(1) as storing:
            stored: Future | None = None
            for shard, own in shards.items():
                path = self.out / data_file(shard)
                partial = new_partial(path)
                try:
                    index, writer = self._write(partial, own, itertools.islice(made, len(own)), on_read)
                except BaseException:
                    discard(partial, path)
                    raise
                if stored is not None:
                    yield stored.result()
                stored = storing.submit(self._store, shard, partial, writer, index)
            if stored is not None:
                yield stored.result()

    def _write(
        self, path: pathlib.Path, items: range, made: Iterator, on_read: Callable[[int], Any]
    ) -> tuple[dict, BagWriter]:
        index = {"read": len(items), "lengths": [], "images": [], "dropped": [], "settings": self.mark}
        digest = hashlib.sha256()
        waiting: list[tuple[Sample, np.ndarray]] = []
        encoding: tuple[list[Sample], Any] | None = None
        writer = BagWriter(path)

        def put(samples: Sequence[Sample]):
            for sample in samples:
                record = sample.to_bytes()
                writer.write(record)
                digest.update(record)
                index["lengths"].append(sample.length)
                index["images"].append(len(sample.images))

        try:
            for item, one in made:
                bad = [dataclasses.asdict(_Dropped.of(one)) | {"item": item}] if isinstance(one, BadSample) else []
                index["dropped"] += bad
                self.tally.add(1, bad)
                on_read(1)
                if bad:
                    self.tally.check(LEAST_READ)
                elif one[1] is None:
                    put(one[0])
                else:
                    waiting.append((one[0][0], one[1]))
                    if self._images * (len(waiting) + 1) > self.batch_size:
                        before, encoding = encoding, self._start(waiting)
                        waiting = []
                        put(self._with_codes(before))
            put(self._with_codes(encoding))
            put(self._with_codes(self._start(waiting) if waiting else None))
        except BaseException:
            writer.close()
            raise
        index["ends"] = writer.ends
        if index["lengths"]:
            index["sha256"] = digest.hexdigest()
        return index, writer

    def _start(self, waiting: list[tuple[Sample, np.ndarray]]) -> tuple[list[Sample], Any]:
        """The samples of a batch, and their codes, which a device may still be computing."""
        given = np.concatenate([pixels.reshape(self._images, *pixels.shape[-3:]) for _, pixels in waiting])
        # Always the same shape, so that it is compiled once.
        images = np.zeros((max(self.batch_size, len(given)), *given.shape[1:]), np.float32)
        images[: len(given)] = given
        return [sample for sample, _ in waiting], self.encode(images)

    def _with_codes(self, encoding: tuple[list[Sample], Any] | None) -> Sequence[Sample]:
        if encoding is None:
            return ()
        samples, codes = encoding[0], np.asarray(encoding[1])
        each = self._images
        expected = (max(self.batch_size, each), self.tokenize.processor.config.gen_vision.num_tokens)
        if codes.shape != expected or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"encode gave {codes.dtype} {list(codes.shape)}, expected integers {list(expected)}")
        own = codes[: each * len(samples)].astype(np.int32)
        if own.min() < 0:  # as `VQModel.encode` marks vectors that are not finite
            raise ValueError("the VQ encoder's values are not finite: its weights are damaged; get them again")
        if each == 1:
            return [dataclasses.replace(sample, codes=one) for sample, one in zip(samples, own, strict=True)]
        pairs = zip(samples, own[::2], own[1::2], strict=True)
        return [dataclasses.replace(sample, codes=chosen, rejected=other) for sample, chosen, other in pairs]

    def _store(self, shard: int, partial: pathlib.Path, writer: BagWriter, index: dict) -> dict:
        path = self.out / data_file(shard)
        try:
            writer.close()
            if index["lengths"]:
                index["bytes"] = partial.stat().st_size
            # Another process may have written the same shard meanwhile, and merged the folder.
            if not self._finished():
                if index["lengths"]:
                    publish(partial, path)
                else:
                    path.unlink(missing_ok=True)
                write_file(self.out / index_file(shard), index_text(index))
        except FileNotFoundError:
            if not self._finished():
                raise
        finally:
            discard(partial, path)
        return index

    def _finished(self) -> bool:
        meta = read_meta(self.out)
        return meta is not None and meta["finished"]


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
