"""Which questions are asked together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from evals.asking.plan import Bin, Question, Shape, bins
from evals.items import Item
from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus
from janus_jax.sampling import batches

MODEL = Janus(PRESETS["janus_tiny"])


@dataclasses.dataclass(frozen=True)
class Picture:
    key: str
    name: str = ""

    def read(self) -> bytes:
        raise AssertionError


def question(number: int, picture: int | None, tail: int = 20, cut: int = 18) -> Question:
    images = () if picture is None else (Picture(str(picture)),)
    item = Item(f"{picture}-{number}", "", images, 32, {})
    return Question(item, tuple(range(cut + tail)), cut, 32)


def ids(found: list[Bin]) -> list[list[str]]:
    return [[each.item.id for each in one.questions] for one in found]


def test_questions_about_a_picture_stay_together():
    """In any order of the items; a group that does not fit goes to the next bin."""
    asked = [question(number, picture) for number in range(6) for picture in range(5)]
    found = list(bins(asked, MODEL, 16, None))
    assert [[len(group) for group in one.groups] for one in found] == [[6, 6], [6, 6], [6]]
    assert sorted(name for own in ids(found) for name in own) == sorted(each.item.id for each in asked)
    assert all(len({each.group for each in group}) == 1 for one in found for group in one.groups)


def test_large_groups_are_cut():
    found = list(bins([question(number, 0) for number in range(31)], MODEL, 8, None))
    assert [len(one.questions) for one in found] == [8, 8, 8, 7]
    # Half a bin is not left empty.
    asked = [question(number, picture) for picture, count in ((0, 4), (1, 7)) for number in range(count)]
    assert [[len(group) for group in one.groups] for one in bins(asked, MODEL, 8, None)] == [[4, 4], [3]]


def test_sorted_by_length():
    rng = np.random.default_rng(0)
    asked = [question(i, i, tail=int(rng.integers(1, 200)), cut=int(rng.choice([18, 60]))) for i in range(200)]
    found = list(bins(asked, MODEL, 10, None))
    shapes = [Shape.of(one.questions) for one in found]
    padded = sum((shape.prefix + shape.tail) * len(one.questions) for shape, one in zip(shapes, found, strict=True))
    assert padded < 1.4 * sum(len(each.ids) for each in asked)
    assert len(found) < 30


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_bins_fit_the_memory(rows):
    of_group, of_row = batches.bytes_to_answer(MODEL, 24, 1, 0), batches.bytes_to_go_on(MODEL, 24, 24, 32)
    asked = [question(number, picture) for picture in range(8) for number in range(6)]
    budget = of_group + rows * of_row
    found = list(bins(asked, MODEL, 64, budget))
    assert sum(len(one.questions) for one in found) == 48
    for one in found:
        assert len(one.groups) * of_group + len(one.questions) * of_row <= budget
    # Not even one question fits: it is tried all the same, since the figures are cautious.
    assert [len(one.questions) for one in bins(asked[:3], MODEL, 64, 10)] == [1, 1, 1]
