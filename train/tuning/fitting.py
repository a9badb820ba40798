"""What of a tuning run depends on its data: which samples are held out, rows, steps, and captions to draw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from train.config import EvalConfig, TrainConfig
from train.data.prepared import Prepared
from train.raw.sources import BadSample, RawSample

_TOKENS_AT_ONCE = 2048  # of a micro-batch on one device
_STEP = 128  # rows are a multiple of so many tokens long
_HELD_OUT, _MOST_HELD_OUT = 20, 64  # every 20th sample is held out, where there are more than twice as many


class Part(Sequence[RawSample]):
    """Some samples of a source, as one of its own."""

    def __init__(self, source: Any, name: str, items: Sequence[int]):
        self._source, self._items, self.name = source, items, name
        self.description = source.description | {"part": name, "samples": len(items)}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> RawSample:
        return self._source[self._items[index]]

    def anywhere(self, index: int) -> RawSample:
        return self._source.anywhere(self._items[index])


def parts(source: Any) -> list[Part]:
    """The samples to train on, and, if there are enough, some others to evaluate on."""
    count = len(source)
    held_out = list(range(0, count, max(_HELD_OUT, -(-count // _MOST_HELD_OUT)))) if count > 2 * _HELD_OUT else []
    others = sorted(set(range(count)) - set(held_out))
    return [Part(source, "train", others), *([Part(source, "held_out", held_out)] if held_out else [])]


def some_captions(source: Any, count: int = 3) -> tuple[str, ...]:
    """Different captions from all over the data."""
    found: dict[str, None] = {}
    for index in np.linspace(0, len(source) - 1, 8 * count).astype(int):
        try:
            found[source[int(index)].caption or ""] = None
        except BadSample:
            continue
    several = [caption for caption in found if caption]
    return tuple(several[:: max(1, len(several) // count)][:count])


def fitted(
    config: TrainConfig, folders: Sequence[Prepared], limit: int, steps: int | None, batch_size: int | None
) -> TrainConfig:
    """`config` with rows, steps and times that suit the samples in `folders`: those to train on, and held-out ones."""
    trained, *held_out = folders
    count, lengths, pictures = len(trained), trained.lengths, int(trained.images.sum())
    longest = max(int(folder.lengths.max()) for folder in folders)
    context = min(limit, -(-longest // _STEP) * _STEP)
    a_step = min(max(count // 25, 4), 16) if batch_size is None else batch_size
    devices = len(jax.devices())
    at_once = devices * max(1, _TOKENS_AT_ONCE // context)
    rows = max(1, round(a_step * float(lengths.mean()) / context))
    accumulate = -(-rows // at_once)
    rows = max(1, round(rows / accumulate / devices)) * accumulate * devices
    if steps is None:
        passes = min(max(2000 / count, 3), 20)
        steps = min(max(round(passes * count / a_step), 100), 10_000)
    fields = {field: (str(folder.folder),) for folder in held_out for field in [folder.kind]}
    most = max(int(folder.images.max()) for folder in folders)
    return dataclasses.replace(
        config,
        steps=steps,
        batch_size=rows,
        accumulate=accumulate,
        data=dataclasses.replace(
            config.data,
            context=context,
            images_per_row=max(1, most, math.ceil(context * pictures / max(1, int(lengths.sum())))),
        ),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=min(100, steps // 10)),
        loss_chunk=math.gcd(context, 512),
        evaluation=EvalConfig(**fields, every=max(1, steps // 4) if fields else 0, batches=2),
        log_every=max(1, steps // 50),
        save_every=max(10, steps // 5),
    )
