"""Which questions are asked together: grouped by their pictures, sorted by length, as many as the memory holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from evals.items import Item, Problem
from janus_jax.io.messages import error_text
from janus_jax.model.janus import Janus
from janus_jax.processing.chat import Processor, bucket
from janus_jax.sampling import batches
from janus_jax.sampling.shared import FIRST_ROOM

_MULTIPLE = 8  # lengths of prefixes are padded to a multiple: of a benchmark, nearly all are equal


@dataclasses.dataclass(frozen=True)
class Question:
    """An item in tokens: `ids[:cut]` is the prefix, which ends with the last picture, and `room` the longest answer."""

    item: Item
    ids: tuple[int, ...]
    cut: int
    room: int

    @property
    def group(self) -> tuple:
        """What questions of one prefix have in common."""
        return (tuple(image.key for image in self.item.images), self.ids[: self.cut])

    @property
    def tail(self) -> tuple[int, ...]:
        return self.ids[self.cut :]


def questions(items: Sequence[Item], processor: Processor) -> tuple[list[Question], list[Problem]]:
    """`items` in tokens, and those that the model cannot be asked.

    An answer is at most as long as the model's positions allow.
    """
    found, problems = [], []
    limit = processor.config.language.max_positions
    placeholder = processor.tokenizer.image_placeholder_id
    for item in items:
        try:
            ids = processor.prompt_ids(item.prompt, len(item.images), 1)
        except ValueError as error:
            problems.append(Problem(item.id, error_text(error), item))
            continue
        # Behind the last picture comes its end tag.
        cut = len(ids) - ids[::-1].index(placeholder) + 1 if item.images else 1
        cut = min(cut, len(ids) - 1)
        found.append(Question(item, tuple(ids), cut, min(item.max_new_tokens, limit - len(ids))))
    return found, problems


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths in tokens that a batch is padded to, and the most pictures of a prefix."""

    prefix: int
    tail: int
    pictures: int
    room: int

    @classmethod
    def of(cls, asked: Sequence[Question]) -> Shape:
        prefix = max(question.cut for question in asked)
        return cls(
            prefix=-(-prefix // _MULTIPLE) * _MULTIPLE,
            tail=bucket(max(len(question.tail) for question in asked), 16),
            pictures=max(len(question.item.images) for question in asked),
            room=max(question.room for question in asked),
        )


@dataclasses.dataclass(frozen=True)
class Bin:
    """Groups of questions that one shard of the mesh is asked together."""

    groups: tuple[tuple[Question, ...], ...]

    @property
    def questions(self) -> list[Question]:
        return [question for group in self.groups for question in group]


def bins(asked: Sequence[Question], model: Janus, rows: int, budget: int | None) -> Iterator[Bin]:
    """`asked` in bins of at most `rows` questions and `budget` bytes (None: any), but at least one question."""
    groups: dict[tuple, list[Question]] = {}
    for question in asked:
        groups.setdefault(question.group, []).append(question)
    taken: list[tuple[Question, ...]] = []
    for group in sorted(groups.values(), key=_lengths):
        while group:
            room = rows - sum(map(len, taken))
            count = min(len(group), room)
            # A group that would be cut goes into the next bin, unless too much of this one would stay empty.
            if taken and count < len(group) <= rows and room <= rows // 4:
                count = 0
            # Nor does a longer one, for which all of a bin would be padded, if half of it is full.
            if room <= rows // 2 and _longer(taken, group):
                count = 0
            while count and taken and not _fits(model, [*taken, tuple(group[:count])], budget):
                count -= 1
            while count > 1 and not taken and not _fits(model, [tuple(group[:count])], budget):
                count -= 1
            if count:
                taken.append(tuple(group[:count]))
                group = group[count:]
            if not count or sum(map(len, taken)) == rows:
                yield Bin(tuple(taken))
                taken = []
    if taken:
        yield Bin(tuple(taken))


def _longer(taken: Sequence[Sequence[Question]], group: Sequence[Question]) -> bool:
    """Whether `group` would make a bin with `taken` longer."""
    own = [question for group in taken for question in group]
    before, after = Shape.of(own), Shape.of([*own, *group])
    return dataclasses.replace(after, room=before.room) != before


def _lengths(group: Sequence[Question]) -> tuple[int, ...]:
    shape = Shape.of(group)
    # The first question's own length keeps the order from depending on anything but the questions.
    return shape.pictures, shape.prefix, shape.tail, shape.room, len(group[0].ids)


def _fits(model: Janus, groups: Sequence[Sequence[Question]], budget: int | None) -> bool:
    if budget is None:
        return True
    shape = Shape.of([question for group in groups for question in group])
    of_group = batches.bytes_to_answer(model, shape.prefix, shape.pictures, 0)
    of_row = batches.bytes_to_go_on(model, shape.prefix, shape.tail, min(shape.room, FIRST_ROOM))
    return len(groups) * of_group + sum(map(len, groups)) * of_row <= budget
