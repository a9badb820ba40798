"""Chooses the samples of step s and their rows, as a pure function of (data, seed, s).

Every step takes a whole number of *groups* of `ratio` samples of each kind, so that the ratio is exact in every step.
The number of groups per step, n, is determined once from the lengths of the data, so that their samples nearly fill the
rows. Step s then reads groups s * n to (s + 1) * n of each kind's endless shuffled stream, so that no step needs to
know what earlier steps read. If the groups of a step do not fit in its rows, the last ones are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import grain
import numpy as np

from train.config import KINDS, PREFERENCE, DataConfig
from train.data.packing import pack
from train.data.prepared import Prepared, open_prepared
from train.records.cache import CacheSettings

_TRIALS = 8  # steps on which a number of groups is tried
_TRIAL_GROUP = 1 << 40  # far from any real one, so that trials read other positions of the streams


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample of a step: sample `index` of folder `folder` of its kind.

    With `unconditional` its prompt is replaced by padding, with `cut` its caption ends after the first sentence.
    """

    kind: str
    folder: Prepared = dataclasses.field(repr=False)
    index: int
    length: int
    images: int
    unconditional: bool = False
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one step, each a list of items, and their number of groups of `ratio` samples.

    `left_out` counts the groups of this step that did not fit.
    """

    rows: list[list[Item]]
    groups: int
    left_out: int


class Stream:
    """An endless random-access order over the samples of several folders, reshuffled with every pass.

    Folders are mixed by weight; item i is (folder, index of the sample).
    """

    def __init__(self, folders: Sequence[Prepared], weights: Sequence[float], seed: int):
        self.folders, self.weights = folders, weights or (1,) * len(folders)
        orders = []
        for number, folder in enumerate(folders):
            order = grain.MapDataset.range(len(folder)).seed(seed + number).shuffle().repeat()
            orders.append(order.map(functools.partial(_tagged, number)))
        self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, self.weights)

    def __getitem__(self, position: int) -> tuple[Prepared, int]:
        number, index = self._order[position]
        return self.folders[number], index

    def item(self, kind: str, position: int) -> Item:
        folder, index = self[position]
        return Item(kind, folder, index, int(folder.lengths[index]), int(folder.images[index]))


class _Remembered:
    """A stream each of whose items is looked up once: steps on which numbers of groups are tried share most of them."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._found: dict[int, Item] = {}

    def item(self, kind: str, position: int) -> Item:
        if position not in self._found:
            self._found[position] = self._stream.item(kind, position)
        return self._found[position]


def _tagged(number: int, index: int) -> tuple[int, int]:
    return number, int(index)


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Steps from `start` on, which read `groups` groups each; `read` groups were read before them."""

    start: int
    read: int
    streams: dict[str, Stream]
    groups: int


def cache_settings(data: DataConfig) -> CacheSettings | None:
    return CacheSettings(data.cache, int(data.cache_gb * 1e9)) if data.cache else None


def open_kind(path: str, kind: str, data: DataConfig) -> Prepared:
    """The prepared folder `path`; ValueError in one line if it has no samples of `kind` that fit the rows of `data`."""
    folder = open_prepared(path, cache_settings(data))
    if folder.kind != kind:
        place = "dpo.pairs" if folder.kind == PREFERENCE else f"data.{folder.kind}"
        raise ValueError(f"{path} has {folder.kind} samples but is listed in data.{kind}; list it in {place}")
    longest, most = folder.longest(), folder.most_images()
    if longest > data.context:
        raise ValueError(
            f"{path} has samples of up to {longest} tokens, more than data.context={data.context}; "
            "prepare it again with that --context"
        )
    if most > data.images_per_row:
        raise ValueError(
            f"{path} has samples of up to {most} images, more than data.images_per_row={data.images_per_row}"
        )
    return folder


class Mixture:
    """Plans steps of `batch_size` rows over the prepared folders of `data`.

    Raises: FileNotFoundError or ValueError, in one line, for folders that are missing, empty, of another kind, or have
    samples longer than the context; ValueError if not even one group fits in a step; OSError if the folder of the cache
    cannot be written.
    """

    def __init__(self, data: DataConfig, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        if settings := cache_settings(data):
            settings.check()
        divisor = math.gcd(*data.ratio)
        self.ratio = {kind: count // divisor for kind, count in zip(KINDS, data.ratio, strict=True) if count}
        if data.early_steps and data.early_generation:
            early = self._phase(0, 0, data.early_generation, ())
            read = data.early_steps * early.groups  # understanding and text continue from there
            later = self._phase(data.early_steps, read, data.generation, data.generation_weights)
            self._phases = [early, later]
        else:
            self._phases = [self._phase(0, 0, data.generation, data.generation_weights)]

    @property
    def folders(self) -> list[Prepared]:
        """All folders that are read, of every kind."""
        found = [f for phase in self._phases for stream in phase.streams.values() for f in stream.folders]
        return list({str(f.folder): f for f in found}.values())

    def plan(self, step: int) -> Plan:
        """The rows of `step`, counted from 0."""
        phase = next(phase for phase in reversed(self._phases) if step >= phase.start)
        return self._plan(phase.streams, phase.groups, phase.read + (step - phase.start) * phase.groups, step)

    def groups(self, step: int) -> int:
        """How many groups `step` should take."""
        return next(phase for phase in reversed(self._phases) if step >= phase.start).groups

    def _phase(self, start: int, read: int, generation: Sequence[str], generation_weights: Sequence[float]) -> _Phase:
        d = self.data
        folders = {"understanding": d.understanding, "text": d.text, "generation": generation}
        weights = {
            "understanding": d.understanding_weights, "text": d.text_weights, "generation": generation_weights
        }  # fmt: skip
        streams = {}
        for number, kind in enumerate(KINDS):
            if kind in self.ratio:
                opened = [open_kind(path, kind, d) for path in folders[kind]]
                streams[kind] = Stream(opened, weights[kind], self.seed + 1000 * number)
        return _Phase(start, read, streams, self._fitting_groups(streams))

    def _fitting_groups(self, streams: dict[str, Stream]) -> int:
        """The most groups that fit the rows in all but one of a few trial steps."""
        means = {kind: _means(stream) for kind, stream in streams.items()}
        streams = {kind: _Remembered(stream) for kind, stream in streams.items()}
        tokens = sum(count * means[kind][0] for kind, count in self.ratio.items())
        images = sum(count * means[kind][1] for kind, count in self.ratio.items())
        most = self.batch_size * self.data.context / tokens
        if images:
            most = min(most, self.batch_size * self.data.images_per_row / images)

        def fits(groups: int) -> bool:
            plans = (self._plan(streams, groups, _TRIAL_GROUP + t * groups, t, exact=True) for t in range(_TRIALS))
            return sum(plan is not None for plan in plans) >= _TRIALS - 1

        low, high = 0, int(most) + 1
        while high - low > 1:
            middle = (low + high) // 2 if high - low > 8 else high - 1
            low, high = (middle, high) if fits(middle) else (low, middle)
        if not low:
            asked = " : ".join(f"{count} {kind}" for kind, count in self.ratio.items())
            raise ValueError(
                f"{self.batch_size} rows of {self.data.context} tokens and {self.data.images_per_row} images have no "
                f"room for {asked} samples, {tokens:.0f} tokens and {images:.1f} images on average; raise batch_size"
            )
        return low

    def _plan(self, streams: dict[str, Stream], groups: int, first: int, step: int, exact: bool = False):
        items = {kind: self._items(stream, kind, groups, first) for kind, stream in streams.items()}
        if "generation" in items:
            items["generation"] = self._randomized(items["generation"], step)
        for kept in range(groups, 0, -1):
            taken = [item for kind, count in self.ratio.items() for item in items[kind][: kept * count]]
            rows = pack(
                [item.length for item in taken],
                [item.images for item in taken],
                self.batch_size,
                self.data.context,
                self.data.images_per_row,
            )
            if rows is not None:
                return Plan([[taken[i] for i in row] for row in rows], kept, groups - kept)
            if exact:
                return None
        return Plan([[] for _ in range(self.batch_size)], 0, groups)

    def _items(self, stream: Stream | _Remembered, kind: str, groups: int, first: int) -> list[Item]:
        count = self.ratio[kind]
        return [stream.item(kind, position) for position in range(first * count, (first + groups) * count)]

    def _randomized(self, items: list[Item], step: int) -> list[Item]:
        draws = np.random.default_rng((self.seed, step)).random((2, len(items)))
        unconditional, cut = draws < [[self.data.guidance_dropout], [self.data.caption_cut]]
        return [
            dataclasses.replace(item, unconditional=bool(u), cut=bool(c))
            for item, u, c in zip(items, unconditional, cut, strict=True)
        ]


def _means(stream: Stream) -> tuple[float, float]:
    """Tokens and images of a stream's samples, on average."""
    means = [(folder.mean_length(), folder.mean_images()) for folder in stream.folders]
    return tuple(float(np.average(column, weights=stream.weights)) for column in zip(*means, strict=True))
