"""Assembles the rows of packed samples that a step's plan describes, ahead of time, in worker processes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from janus_jax.config import IMAGE_CHANNELS
from janus_jax.io.store_access import is_store
from janus_jax.processing.images import ImageSettings, understanding_pixels_uint8
from train.children import outlive_the_notice
from train.config import TASKS
from train.data.mixture import Item, Mixture
from train.data.prepared import Prepared
from train.data.samples import Sample
from train.raw.storage import patiently

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Assembler:
    """Makes the arrays of any rows of any step.

    The report of a step has, for all its rows, the `tokens`, `samples`, understanding `images`, and groups `left_out`
    (see `Mixture`), and for the requested rows the `problems`, one line for each damaged sample.

    The arrays of a batch, where T is the context and Q the number of images per row:

      ids          int32 [B, T]  token ids, or image codes where `is_code`
      is_code      bool  [B, T]
      is_image     bool  [B, T]  placeholders, which are replaced by understanding images
      targets      int32 [B, T]  the next token id or image code
      tasks        int8  [B, T]  the task whose loss a position counts for: one of TASKS, or 0 for none
      segment_ids  int32 [B, T]  samples counted from 1, 0 on padding
      positions    int32 [B, T]  from 0 in each sample
      images       uint8 [B, Q, S, S, 3]  understanding images in the order of their placeholders, then zeros
      damaged      int32 [B]  samples that could not be read

    Attributes:
      mixture: plans the rows.
      settings: how an image file becomes pixels.
      pad_id, placeholder_id: ids of the tokenizer.
    """

    mixture: Mixture
    settings: ImageSettings
    pad_id: int
    placeholder_id: int

    @property
    def folders(self) -> Sequence[Prepared]:
        """The folders that it reads."""
        return self.mixture.folders

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> tuple[Batch, dict[str, Any]]:
        """The arrays of `rows` (default: all) of `step`, and a report.

        A damaged sample leaves its place in the row empty and is named in the report.

        Raises OSError if the machine cannot read a sample (which may be intact), even after several tries.
        """
        plan = self.mixture.plan(step)
        rows = range(len(plan.rows)) if rows is None else rows
        problems: list[str] = []
        fetched = self._fetched([item for row in rows for item in plan.rows[row]])
        made = [self._row(plan.rows[row], problems, fetched) for row in rows]
        batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        lengths = np.array([item.length for row in plan.rows for item in row], np.int64)
        report = {
            "tokens": int(lengths.sum()),
            "samples": len(lengths),
            "images": sum(item.images for row in plan.rows for item in row),
            # The length of a token's sample, averaged over tokens: this determines the cost of attention.
            "sample_length": float((lengths**2).sum() / max(lengths.sum(), 1)),
            "left_out": plan.left_out,
            "problems": problems,
        }
        return batch, report

    def _fetched(self, items: Sequence[Item]) -> dict[tuple[int, int], bytes]:
        """What stores have for `items`, by folder and index: one after the other, each would wait for an answer."""
        found: dict[tuple[int, int], bytes] = {}
        for folder in {id(item.folder): item.folder for item in items}.values():
            indices = [item.index for item in items if item.folder is folder]
            if (stored := folder.stored(indices)) is not None:
                found |= zip([(id(folder), index) for index in indices], stored, strict=True)
        return found

    def _row(self, items: Sequence[Item], problems: list[str], fetched: dict[tuple[int, int], bytes]) -> Batch:
        data = self.mixture.data
        length, size = data.context, self.settings.image_size
        most = data.images_per_row if "understanding" in self.mixture.ratio else 0
        row = {
            "ids": np.full(length, self.pad_id, np.int32),
            "is_code": np.zeros(length, bool),
            "is_image": np.zeros(length, bool),
            "targets": np.zeros(length, np.int32),
            "tasks": np.zeros(length, np.int8),
            "segment_ids": np.zeros(length, np.int32),
            "positions": np.zeros(length, np.int32),
            "images": np.zeros((most, size, size, IMAGE_CHANNELS), np.uint8),
            "damaged": np.zeros((), np.int32),
        }
        start = placed = 0
        for segment, item in enumerate(items, 1):
            try:
                stored = fetched.get((id(item.folder), item.index))
                sample = item.folder[item.index] if stored is None else item.folder.sample(item.index, stored)
                pixels = patiently(functools.partial(self._pixels, sample))
            except ValueError as error:
                problems.append(f"{item.folder.folder}, sample {item.index}: {error}")
                row["damaged"] += 1
                start += item.length
                continue
            arrays = self._elements(sample, item)
            stop = start + len(arrays["ids"])
            for name, values in arrays.items():
                row[name][start:stop] = values
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = np.arange(stop - start)
            row["images"][placed : placed + len(pixels)] = np.reshape(pixels, (-1, size, size, IMAGE_CHANNELS))
            placed += len(pixels)
            start += item.length
        return row

    def _pixels(self, sample: Sample) -> list[np.ndarray]:
        return [understanding_pixels_uint8(image, self.settings) for image in sample.images]

    def _elements(self, sample: Sample, item: Item) -> Batch:
        """What the model reads of a sample, and what it has to predict at each position."""
        ids, answers = sample.ids, sample.answers
        if sample.kind == "generation":
            ids = sample.short_ids if item.cut and len(sample.short_ids) else ids
            answers = np.zeros(len(ids), bool)
            if item.unconditional:
                # As in sampling (Processor.unconditional): all but BOS and begin_of_image, and attended to.
                ids = np.concatenate([ids[:1], np.full(len(ids) - 2, self.pad_id, np.int32), ids[-1:]])
        elif sample.kind == "text" and self.mixture.data.text_loss == "all":
            answers = np.ones(len(ids), bool)
        sequence = np.concatenate([ids, sample.codes])
        is_code = np.arange(len(sequence)) >= len(ids)
        learned = np.concatenate([answers, np.ones(len(sample.codes), bool)])[1:]
        return {
            "ids": sequence[:-1],
            "is_code": is_code[:-1],
            "is_image": (sequence == self.placeholder_id)[:-1] & ~is_code[:-1],
            "targets": sequence[1:],
            "tasks": np.where(learned, TASKS[sample.kind], 0).astype(np.int8),
        }


class Assembles(Protocol):
    """Makes the arrays of any rows of any step, and a report, as `Assembler` does."""

    @property
    def folders(self) -> Sequence[Prepared]: ...

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> tuple[Batch, dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class _Assemble:
    """An assembler for given rows, in a form that can be pickled for worker processes."""

    assembler: Assembles
    rows: tuple[int, ...]

    def __call__(self, step: int):
        return int(step), *self.assembler(int(step), self.rows)


def load_batches(
    assembler: Assembles, rows: Sequence[int], first: int, last: int, workers: int
) -> Iterator[tuple[int, Batch, dict[str, Any]]]:
    """(step, arrays, report) of `rows` for the steps from `first` to before `last`, in order, with prefetching.

    Args:
      rows: the rows that this process holds.
      workers: number of worker processes; 0 for a few threads of this process.
    """
    steps = grain.MapDataset.range(first, last).map(_Assemble(assembler, tuple(rows)))
    if not workers:
        # A store answers late, and many requests at once.
        ahead = 8 if any(is_store(folder.folder) for folder in assembler.folders) else 2
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=2 * ahead)))
    _parse_absl_flags()
    made = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(made.mp_prefetch(options, worker_init_fn=outlive_the_notice))


def _parse_absl_flags():
    # grain passes absl's flags to its workers, and fails if they have not been parsed.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["train"])
