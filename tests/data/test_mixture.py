"""Packing and mixing: nothing lost, limits and ratios kept, and a step's plan a function of (data, seed, step)."""

import collections
import dataclasses
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import mixture
from train.data.mixture import Mixture
from train.data.packing import pack


@dataclasses.dataclass(frozen=True)
class Folder:
    """What the mixture reads of a prepared folder."""

    folder: pathlib.Path
    kind: str
    lengths: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def longest(self) -> int:
        return int(self.lengths.max())

    def most_images(self) -> int:
        return int(self.images.max())

    def mean_length(self) -> float:
        return float(self.lengths.mean())

    def mean_images(self) -> float:
        return float(self.images.mean())


def some_folders(*names: str, size: int = 97, length: int = 20) -> dict[str, Folder]:
    """Folders by name; a name begins with the kind's first letter."""
    kinds = {"u": "understanding", "t": "text", "g": "generation"}
    rng = np.random.default_rng(len(names))
    found = {}
    for name in names:
        kind = kinds[name[0]]
        lengths = np.full(size, length) if kind == "generation" else rng.integers(5, length, size)
        found[name] = Folder(pathlib.Path(name), kind, lengths, np.full(size, int(kind == "understanding")))
    return found


@pytest.fixture
def use(monkeypatch):
    """Puts folders in the place of those on disk."""

    def put(folders: dict[str, Folder]):
        monkeypatch.setattr(mixture, "open_prepared", lambda path, cache=None: folders[path])

    return put


def config(**changes) -> DataConfig:
    usual = DataConfig(
        understanding=("u",), text=("t",), generation=("g",), ratio=(2, 1, 2), context=64, images_per_row=4
    )
    return dataclasses.replace(usual, **changes)


def content(plan) -> list[list[tuple]]:
    return [[(str(i.folder.folder), i.index, i.unconditional, i.cut) for i in row] for row in plan.rows]


def drawn(plan, kind: str) -> list[tuple[str, int]]:
    return [(str(i.folder.folder), i.index) for row in plan.rows for i in row if i.kind == kind]


# ---------------------------------------------------------------- packing

SAMPLES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(SAMPLES, st.integers(1, 12), st.integers(30, 80), st.integers(0, 5))
def test_packing_loses_nothing_and_keeps_its_limits(samples, rows, context, images_per_row):
    lengths, images = [n for n, _ in samples], [q for _, q in samples]
    packed = pack(lengths, images, rows, context, images_per_row)
    assert packed == pack(lengths, images, rows, context, images_per_row)
    if packed is None:
        # With a row for every sample, only a sample that fits no row is a reason.
        too_large = any(n > context or q > images_per_row for n, q in samples)
        assert too_large or rows < len(samples)
        return
    assert len(packed) == rows
    assert sorted(i for row in packed for i in row) == list(range(len(samples)))
    for row in packed:
        assert sum(lengths[i] for i in row) <= context
        assert sum(images[i] for i in row) <= images_per_row


@pytest.mark.parametrize(
    "lengths, images, rows",
    [([11], [0], 4), ([1], [3], 4), ([6, 6, 6], [0, 0, 0], 2), ([1, 1, 1], [2, 2, 2], 2)],
    ids=["long", "many images", "no row left", "no image left"],
)
def test_what_cannot_fit_is_none(lengths, images, rows):
    assert pack(lengths, images, rows, 10, 2) is None


def test_a_perfect_packing_is_found():
    assert pack([7, 6, 5, 5, 4, 3], [0] * 6, 3, 10, 0) == [[0, 5], [1, 4], [2, 3]]
    assert pack([], [], 2, 10, 0) == [[], []]


def test_rows_of_the_usual_mix_are_full(use):
    """Janus-Pro's stage 3: 5 : 1 : 4, rows of 4096, 128 of them."""
    rng = np.random.default_rng(0)
    n = 3000
    use(
        {
            "u": Folder(pathlib.Path("u"), "understanding", rng.integers(600, 1200, n), np.ones(n, int)),
            "t": Folder(pathlib.Path("t"), "text", rng.integers(50, 2000, n), np.zeros(n, int)),
            "g": Folder(pathlib.Path("g"), "generation", np.full(n, 640), np.zeros(n, int)),
        }
    )
    made = Mixture(config(ratio=(5, 1, 4), context=4096), batch_size=128, seed=0)
    for step in (0, 1, 1000):
        plan = made.plan(step)
        assert plan.groups * 10 == sum(map(len, plan.rows))
        assert sum(item.length for row in plan.rows for item in row) >= 0.95 * 128 * 4096


# ---------------------------------------------------------------- ratios, randomness, order


def test_ratio_is_exact_in_every_step_and_dropout_is_as_asked(use):
    use(some_folders("u", "t", "g", size=5000))
    made = Mixture(config(guidance_dropout=0.1, caption_cut=0.25), batch_size=6, seed=0)
    unconditional = cut = both = count = 0
    for step in range(1000):
        plan = made.plan(step)
        items = [item for row in plan.rows for item in row]
        kinds = collections.Counter(item.kind for item in items)
        assert plan.groups > 0
        assert kinds == {"understanding": 2 * plan.groups, "text": plan.groups, "generation": 2 * plan.groups}
        assert not any(item.unconditional or item.cut for item in items if item.kind != "generation")
        drawings = [item for item in items if item.kind == "generation"]
        count += len(drawings)
        unconditional += sum(item.unconditional for item in drawings)
        cut += sum(item.cut for item in drawings)
        both += sum(item.cut and item.unconditional for item in drawings)
    for found, share in ((unconditional, 0.1), (cut, 0.25), (both, 0.025)):
        assert abs(found - share * count) < 4 * math.sqrt(count * share * (1 - share))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropout_of_none_and_of_all(use, share):
    use(some_folders("u", "t", "g"))
    rows = Mixture(config(guidance_dropout=share, caption_cut=share), batch_size=4, seed=0).plan(0).rows
    drawings = [item for row in rows for item in row if item.kind == "generation"]
    assert drawings and all(item.unconditional == item.cut == bool(share) for item in drawings)


def test_a_plan_is_a_function_of_data_seed_and_step(use):
    use(some_folders("u", "t", "g"))
    made = Mixture(config(caption_cut=0.5), 4, seed=7)
    first = [content(made.plan(step)) for step in (5, 3, 5)]
    again = Mixture(config(caption_cut=0.5), 4, seed=7)
    assert [content(again.plan(step)) for step in (5, 3, 5)] == first
    assert first[0] == first[2] != first[1]
    assert content(Mixture(config(caption_cut=0.5), 4, seed=8).plan(5)) != first[0]


def test_every_sample_once_before_any_is_repeated(use):
    use(some_folders("u", "t", "g", size=30))
    made = Mixture(config(), batch_size=4, seed=0)
    for kind in ("understanding", "text", "generation"):
        seen, step = [], 0
        while len(seen) < 3 * 30:
            plan = made.plan(step)
            assert not plan.left_out, "the sizes of this test are such that all groups fit"
            # Within a step order is the packing's: compare what was seen by whole epochs as far as steps allow.
            seen += drawn(plan, kind)
            counts = collections.Counter(seen)
            assert max(counts.values()) <= math.ceil(len(seen) / 30)
            step += 1
        assert len(counts) == 30


def test_epochs_differ_in_order(use):
    stream = mixture.Stream([*some_folders("t", size=50).values()], (), 0)
    epochs = [[stream[e * 50 + i][1] for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize(
    "weights, shares", [((), (1 / 2, 1 / 2)), ((3.0, 1.0), (3 / 4, 1 / 4)), ((0.2, 0.6), (1 / 4, 3 / 4))]
)
def test_folder_weights_are_honored(use, weights, shares):
    use(some_folders("t1", "t2"))
    made = Mixture(config(ratio=(0, 1, 0), text=("t1", "t2"), text_weights=weights), batch_size=4, seed=0)
    counts = collections.Counter(name for step in range(60) for name, _ in drawn(made.plan(step), "text"))
    total = sum(counts.values())
    for name, share in zip(("t1", "t2"), shares, strict=True):
        assert abs(counts[name] / total - share) < 0.01
    assert {str(f.folder) for f in made.folders} == {"t1", "t2"}


def test_early_generation_gives_way_at_its_step(use):
    use(some_folders("u", "t", "g", "g_early1", "g_early2", size=60))
    data = config(early_generation=("g_early1", "g_early2"), early_steps=4, generation_weights=(1.0,))
    made = Mixture(data, batch_size=4, seed=0)
    names = [{name for name, _ in drawn(made.plan(step), "generation")} for step in range(8)]
    assert names[:4] == [{"g_early1", "g_early2"}] * 4
    assert names[4:] == [{"g"}] * 4
    assert len(made.folders) == 5
    # The other kinds go on where they were, and do not begin again.
    texts = [sample for step in range(8) for sample in drawn(made.plan(step), "text")]
    assert len(texts) <= 60
    assert len(set(texts)) == len(texts)


def test_a_kind_without_a_part_is_not_opened(use):
    use(some_folders("g"))
    plan = Mixture(config(ratio=(0, 0, 3), understanding=(), text=()), batch_size=2, seed=0).plan(0)
    assert {item.kind for row in plan.rows for item in row} == {"generation"}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, batch_size, told",
    [
        ({"text": ("g",)}, 8, "g has generation samples but is listed in data.text"),
        ({"context": 19}, 8, "g has samples of up to 20 tokens, more than data.context=19"),
        ({"images_per_row": 0}, 8, "u has samples of up to 1 images, more than data.images_per_row=0"),
        ({"ratio": (9, 9, 10)}, 2, "have no room for 9 understanding : 9 text : 10 generation samples"),
    ],
    ids=["kind", "length", "images", "batch"],
)
def test_what_cannot_be_mixed_is_told_in_one_line(use, changes, batch_size, told):
    use(some_folders("u", "t", "g"))
    with pytest.raises(ValueError) as caught:
        Mixture(config(**changes), batch_size, seed=0)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_folder_is_told():
    with pytest.raises(FileNotFoundError, match=r"nowhere.*train\.prepare"):
        Mixture(config(understanding=("nowhere",)), 8, seed=0)
