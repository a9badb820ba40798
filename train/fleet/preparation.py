"""A preparation: what is read, what is written, and how; in every process that takes part."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from janus_jax.io.progress import shown, step_bar
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from train.config import ENCODED, PREFERENCE
from train.data.fingerprints import CODES_PRECISION
from train.data.prepared import read_meta
from train.data.shard_files import index_file, missing_shards, read_indices
from train.data.shards import LEAST_READ, Encode, ShardWriter, Tally
from train.data.tokenize import SampleTokenizer, resized_by, tokenizer_fingerprint
from train.fleet.folder import begin, mark_of, probe, special_ids
from train.fleet.merge import Report, Totals, drop_indices, merge, read_dropped, report_of
from train.fleet.shares import ALL, Part
from train.raw.sources import RawSample

_REQUESTS = 32  # to a store at a time
# Samples in a shard, which is what is lost of a process that is killed: few, unless there are millions of them.
_SMALLEST, _SHARDS = 8192, 256
_LARGEST = {"understanding": 8192, "text": 1 << 16, "generation": 1 << 18, PREFERENCE: 1 << 17}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How samples are prepared, wherever they come from; ValueError for what cannot be.

    Attributes:
      context: samples with more tokens are dropped; plain texts are split instead.
      shard_size: samples of the source per file; None for 8192, or for millions of samples more, up to files of about
        half a gigabyte to one.
      batch_size: images encoded at a time.
      max_bad_share: the preparation stops if more than this share of the samples is bad.
      system_prompt: for conversations without one.
      store: how understanding images are stored: 'original', as their files; or 'resized', as PNGs of the pixels that
        the model sees, which are small and fast to read if the originals are large.
      workers: threads that read, decode and tokenize; None for one per core.
    """

    context: int = 4096
    shard_size: int | None = None
    batch_size: int = 32
    max_bad_share: float = 0.01
    system_prompt: str = SYSTEM_PROMPT
    store: str = "original"
    workers: int | None = None

    def __post_init__(self):
        if self.batch_size < 1 or any(given is not None and given < 1 for given in (self.shard_size, self.workers)):
            raise ValueError("shard_size, batch_size and workers must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}")


class Preparation:
    """The preparation of `source` in the folder `out`, begun, or joined if another process has begun it.

    Arguments and errors are those of `train.prepare.prepare`.

    Attributes:
      count: the number of shards.
      finished: whether the folder is complete.
    """

    def __init__(
        self,
        source: Sequence[RawSample],
        out: str | os.PathLike,
        kind: str,
        processor: Processor,
        options: PrepareOptions,
        *,
        encode: Encode | None = None,
        vq_fingerprint: str = "",
        progress: bool | None = None,
    ):
        encoded = kind in ENCODED
        if encoded and encode is None:
            raise ValueError(f"preparing {kind} data needs encode, from images to codes")
        if not len(source):
            raise ValueError("the source is empty")
        shard_size = options.shard_size or default_shard_size(kind, len(source))
        self.source, self.out, self.kind = source, as_path(out), kind
        self.shard_size, self.max_bad_share, self.progress = shard_size, options.max_bad_share, progress
        self.workers = options.workers or default_workers(source)
        tokenize = SampleTokenizer(processor, kind, options.context, options.system_prompt, options.store)
        settings = {
            "kind": kind,
            "context": options.context,
            "shard_size": shard_size,
            "system_prompt": options.system_prompt,
            "tokenizer": tokenizer_fingerprint(processor),
            "vq": vq_fingerprint if encoded else "",
            "image_size": processor.config.gen_vision.image_size if encoded else 0,
            "patches": processor.config.vision.num_patches,
            "source": getattr(source, "description", {"samples": len(source)}) | {"probe": probe(source)},
        }
        if encoded:
            # Codes are computed in full precision, but platforms sum in different orders.
            settings["encoded_on"] = {"platform": jax.default_backend(), "precision": CODES_PRECISION}
        if options.store == "resized" and kind == "understanding":
            settings["resized"] = list(resized_by(processor.settings))
        self._meta = begin(self.out, settings, processor.tokenizer)
        self._mark, self._ids = mark_of(settings), special_ids(processor.tokenizer)
        tally = Tally(options.max_bad_share)
        self._writer = ShardWriter(source, self.out, tokenize, encode, options.batch_size, tally, self._mark)
        self.count = -(-len(source) // shard_size)
        self.finished: bool = self._meta["finished"]

    def run(self, part: Part) -> Report:
        """Makes the missing shards of `part`, and finishes the folder unless shards of other parts are missing."""
        if self.finished:
            return self.end(part)
        own, totals = part.of(self.count), Totals()
        done = set()
        for shard, index in self.done(own):
            done.add(shard)
            totals.add(index)
        with step_bar("preparing", sum(len(self._items(shard)) for shard in own), shown(self.progress)) as bar:
            bar.update(sum(len(self._items(shard)) for shard in done))
            for index in self.write([shard for shard in own if shard not in done], bar.update):
                totals.add(index)
        others = set(missing_shards(self.out, self.count)) - set(own)
        # Once the folder is finished, there are no indices of shards.
        if others and not (read_meta(self.out) or self._meta)["finished"]:
            self.tally.check(LEAST_READ)
            return totals.report(self.out, self.kind, waits_for=len(others))
        return self.end(part)

    def done(self, shards: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The complete ones of `shards` and their indices, except those that could be prepared better now."""
        for shard, index in read_indices(self.out, shards, self._mark):
            if self._writer.decides_anew(index["dropped"]):
                # For example, missing images have appeared: without its index, the shard is written again.
                (self.out / index_file(shard)).unlink(missing_ok=True)
            else:
                self.tally.add(index["read"], index["dropped"])
                yield shard, index

    def write(self, shards: Sequence[int], on_read: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
        """Writes `shards`, and yields their indices."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from self._writer.write(pool, {shard: self._items(shard) for shard in shards}, on_read)
        finally:
            pool.shutdown(cancel_futures=True)

    def end(self, part: Part = ALL) -> Report:
        """Merges. If the folder was finished before, counts the dropped samples of `part` that would now be kept."""
        if not self.finished:
            return merge(self.out, self.max_bad_share, self._ids)
        drop_indices(self.out)
        dropped = (one for one in read_dropped(self.out) if one["item"] // self.shard_size % part.count == part.index)
        return report_of(self.out, self._meta, sum(self._writer.decides_anew([one]) for one in dropped))

    @property
    def tally(self) -> Tally:
        """Of the samples read by this process, and of those in shards that it found complete."""
        return self._writer.tally

    def new_tally(self):
        self._writer.tally = Tally(self.max_bad_share)

    def _items(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))


def default_shard_size(kind: str, samples: int) -> int:
    """Samples of the source in a shard: of large sources so many that files have about half a gigabyte to one."""
    return min(_LARGEST[kind], max(_SMALLEST, samples // _SHARDS))


def default_workers(source: Sequence[RawSample]) -> int:
    """Threads that read: one per core, and enough for many requests at once if samples come from a store."""
    path = getattr(source, "description", {}).get("path", "")
    return max(os.cpu_count() or 1, _REQUESTS if is_store(path) else 1)
