"""The model's replies to items: pictures are read ahead and encoded once, and questions are asked in batches."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from evals.asking.plan import Bin, Question, Shape, bins, questions
from evals.items import ImageRef, Item, Problem
from janus_jax.io.messages import error_text
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import bucket
from janus_jax.sampling import batches
from janus_jax.sampling.finite import NotFinite, on_host
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import check_count
from janus_jax.sampling.shared import Grouped, answer, embed_pictures
from janus_jax.sharding import batch_shards

# More rows are hardly faster: a CPU is busy with a few, an accelerator with some hundreds.
_MOST_ROWS = {"cpu": 48}
_ROWS = 256
_PICTURES = 16  # encoded at a time, a shard
_KEPT = 1 << 30  # bytes of embedded pictures that are kept on the host


@dataclasses.dataclass(frozen=True)
class Replies:
    """What a batch came to: replies by item id, items that could not be asked, and ids that got no reply."""

    texts: dict[str, str]
    problems: list[Problem]
    unjudged: list[str] = dataclasses.field(default_factory=list)


class Respondent:
    """A model that items are put to; it remembers pictures from one benchmark to the next.

    On a mesh that spans processes, all of them ask the same items, and get all replies.

    Args:
      batch_size: questions at a time on each shard of the mesh; default as many as fit in the memory.
      kept_bytes: of embedded pictures that are kept.
    """

    def __init__(self, janus: JanusPipeline, batch_size: int | None = None, kept_bytes: int = _KEPT):
        if janus.processor is None:
            raise ValueError(f"{janus.source or 'this checkpoint'} has no tokenizer.json, which is needed to ask it")
        self._janus, self._processor = janus, janus.processor
        self._shards = batch_shards(janus.mesh)
        platform = (jax.devices()[0] if janus.mesh is None else janus.mesh.devices.flat[0]).platform
        rows = _MOST_ROWS.get(platform, _ROWS) if batch_size is None else check_count("batch_size", batch_size)
        self._rows = rows
        self._kept_bytes = kept_bytes
        self._features: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._bad: dict[str, str] = {}
        self.encoded = 0  # pictures that went through the encoder

    def ask(self, items: Sequence[Item]) -> Iterator[Replies]:
        """Replies to `items`, batch by batch, in an order that is good for speed.

        Raises: ValueError that names the item whose logits are not finite; OutOfMemory if not even one question fits.
        """
        asked, problems = questions(items, self._processor)
        if problems:
            yield Replies({}, problems)
        left = {question.item.id: question for question in asked}
        while left:
            try:
                for replies in self._all(list(left.values())):
                    for item in (*replies.texts, *(problem.id for problem in replies.problems)):
                        del left[item]
                    yield replies
            except jax.errors.JaxRuntimeError as error:
                several = self._janus.mesh is not None and self._janus.mesh.is_multi_process
                # Other processes may have had enough memory, and would wait in this batch.
                if not OutOfMemory.says(error) or several:
                    raise
                if self._rows <= 1:
                    raise OutOfMemory("not even one question at a time fits in the device's memory") from error
                self._rows = max(self._rows // 2, 1)

    def _all(self, asked: Sequence[Question]) -> Iterator[Replies]:
        budget = batches.usable_bytes(self._janus.mesh, coming=self._janus.params)
        plan = bins(asked, self._janus.model, self._rows, budget)
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:

            def read(new: dict[str, ImageRef]) -> dict[str, np.ndarray | str]:
                return dict(zip(new, readers.map(self._pixels, new.values()), strict=True))

            waiting: tuple[Sequence[Bin], Future] | None = None
            for batch in itertools.chain(_by(self._shards, plan), [None]):
                coming = None
                if batch is not None:
                    known = {*self._features, *self._bad, *(_pictures(waiting[0]) if waiting else ())}
                    new = {key: image for key, image in _pictures(batch).items() if key not in known}
                    coming = (batch, ahead.submit(read, new))
                if waiting is not None:
                    yield self._batch(waiting[0], waiting[1].result())
                waiting = coming

    # ------------------------------------------------------------ pictures

    def _pixels(self, image: ImageRef) -> np.ndarray | str:
        try:
            return self._processor.understanding_pixels([image.read()])[0]
        except (ValueError, OSError) as error:
            return f"{image.name}: {error_text(error)}"

    def _embedded(self, batch: Sequence[Bin], pixels: dict[str, np.ndarray | str]) -> dict[str, np.ndarray]:
        """Embeddings [patches, D] of the batch's pictures; of those that cannot be read, `_bad` has the reason."""
        needed = _pictures(batch)
        have = {key: self._features[key] for key in needed if key in self._features}
        missing = [key for key in needed if key not in have and key not in self._bad]
        # Not read ahead is what has been forgotten since.
        made = {key: pixels[key] if key in pixels else self._pixels(needed[key]) for key in missing}
        for key in self._agreed_bad(made):
            reason = made.pop(key)
            self._bad[key] = reason if isinstance(reason, str) else f"{needed[key].name} cannot be read by a process"
        size = _PICTURES * self._shards
        for start in range(0, len(made), size):
            keys = list(made)[start : start + size]
            stacked = np.stack([made[key] for key in keys])  # type: ignore[misc]
            padded = -(-bucket(len(keys), 2) // self._shards) * self._shards
            stacked = stacked[np.minimum(np.arange(padded), len(keys) - 1)]
            with batches.using(self._janus.mesh):
                put = batches.put(stacked, self._janus.mesh)
                features = on_host(embed_pictures(self._janus.model, self._janus.params, put))
            have |= dict(zip(keys, features, strict=False))
            self.encoded += len(keys)
        for key in needed:
            if key in have:
                # A copy, or a single picture would hold the memory of all that were encoded with it.
                self._features[key] = np.array(have[key]) if key in made else have[key]
                self._features.move_to_end(key)
        while self._features and sum(x.nbytes for x in self._features.values()) > self._kept_bytes:
            self._features.popitem(last=False)
        return have

    def _agreed_bad(self, made: dict[str, np.ndarray | str]) -> list[str]:
        """The pictures that some process could not read."""
        bad = np.array([isinstance(x, str) for x in made.values()], bool)
        if made and self._janus.mesh is not None and self._janus.mesh.is_multi_process:
            bad = np.asarray(process_allgather(bad)).any(0)
        return [key for key, missing in zip(made, bad, strict=True) if missing]

    # ------------------------------------------------------------ answers

    def _batch(self, batch: Sequence[Bin], pixels: dict[str, np.ndarray | str]) -> Replies:
        features = self._embedded(batch, pixels)
        problems = []
        able: list[Bin] = []
        for one in batch:
            groups = []
            for group in one.groups:
                bad = [image.key for image in group[0].item.images if image.key in self._bad]
                if not bad:
                    groups.append(group)
                for question in group if bad else ():
                    problems.append(Problem(question.item.id, self._bad[bad[0]], question.item))
            able.append(Bin(tuple(groups)))
        asked = [question for one in able for question in one.questions]
        if not asked:
            return Replies({}, problems)
        grouped, rows = self._grouped(able, features)
        tokenizer = self._processor.tokenizer
        how = {"eos_id": tokenizer.eos_id, "max_new_tokens": Shape.of(asked).room, "mesh": self._janus.mesh}
        try:
            found = answer(self._janus.model, self._janus.params, grouped, **how)
        except NotFinite as error:
            question = rows[error.rows[0]]
            name = "a question" if question is None else f"question {question.item.id}"
            raise ValueError(f"{name}: {error.reason}") from None
        texts = {}
        for question, row in zip(rows, found.tolist(), strict=True):
            if question is not None:
                texts[question.item.id] = tokenizer.answer(row[: question.room])
        return Replies(texts, problems)

    def _grouped(self, able: Sequence[Bin], features: dict[str, np.ndarray]) -> tuple[Grouped, list[Question | None]]:
        """What `shared.answer` takes, and the question of each row (None for rows that only fill the shape)."""
        pad, placeholder = self._processor.left_pad, self._processor.tokenizer.image_placeholder_id
        shape = Shape.of([question for one in able for question in one.questions])
        # Few sizes, so that few programs are compiled.
        groups = bucket(max(len(one.groups) for one in able), 2)
        count = max(len(one.questions) for one in able)
        rows = max(count, min(1 << (count - 1).bit_length(), self._rows))
        filler = [self._processor.tokenizer.bos_id]
        prefixes: list[Sequence[int]] = []
        tails: list[Sequence[int]] = []
        of_rows: list[Question | None] = []
        picks = np.zeros((len(able), rows), np.int32)
        first = next(iter(features.values()), None)
        patches = self._processor.config.vision.num_patches
        embedded = None
        if shape.pictures and first is not None:
            embedded = np.zeros((len(able) * groups, shape.pictures * patches, first.shape[-1]), first.dtype)
        for shard, one in enumerate(able):
            for number, group in enumerate(one.groups):
                if embedded is not None:
                    for index, image in enumerate(group[0].item.images):
                        span = slice(index * patches, (index + 1) * patches)
                        embedded[shard * groups + number, span] = features[image.key]
            own = one.questions
            prefixes += [group[0].ids[: group[0].cut] for group in one.groups] + [filler] * (groups - len(one.groups))
            tails += [question.tail for question in own] + [filler] * (rows - len(own))
            of_rows += [*own, *[None] * (rows - len(own))]
            picks[shard, : len(own)] = np.repeat(np.arange(len(one.groups)), [len(group) for group in one.groups])
        prefix_ids, prefix_mask = pad(prefixes, shape.prefix)
        ids, mask = pad(tails, shape.tail)
        real = np.array([question is not None for question in of_rows])
        prefix = (prefix_ids, prefix_mask.astype(bool), prefix_ids == placeholder)
        return Grouped(*prefix, embedded, ids, mask.astype(bool), picks, real), of_rows


def _pictures(batch: Iterable[Bin]) -> dict[str, ImageRef]:
    return {image.key: image for one in batch for group in one.groups for image in group[0].item.images}


def _by(count: int, plan: Iterable[Bin]) -> Iterator[list[Bin]]:
    """`plan` in batches of `count` bins, the last one filled with empty ones."""
    plan = iter(plan)
    while batch := list(itertools.islice(plan, count)):
        yield batch + [Bin(())] * (count - len(batch))
