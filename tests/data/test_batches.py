"""Arrays of a batch against what was worked out by hand, and batches made by processes."""

import dataclasses
import pathlib

import numpy as np
import pytest

from examples.tiny.run import MODEL, write_data
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import understanding_pixels_uint8
from train.config import TASKS, DataConfig
from train.data.batches import Assembler, load_batches
from train.data.mixture import Item, Mixture, Plan
from train.data.prepared import open_prepared
from train.data.samples import Sample

CONTEXT = 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def processor(folders) -> Processor:
    return Processor.from_folder(folders["tokenizer"], MODEL)


@pytest.fixture(scope="module")
def data(folders) -> DataConfig:
    kinds = {kind: (folders[kind],) for kind in ("understanding", "text", "generation")}
    return DataConfig(
        **kinds, ratio=(2, 1, 2), context=CONTEXT, images_per_row=4, guidance_dropout=0.3, caption_cut=0.3
    )


def assembler(data: DataConfig, processor: Processor, batch_size: int = 4) -> Assembler:
    tokenizer = processor.tokenizer
    return Assembler(Mixture(data, batch_size, 0), processor.settings, tokenizer.pad_id, tokenizer.image_placeholder_id)


@pytest.fixture(scope="module")
def made(data, processor) -> Assembler:
    return assembler(data, processor)


@dataclasses.dataclass
class Fixed:
    """A mixture whose every step is one row of `items`."""

    data: DataConfig
    items: list[Item]

    @property
    def ratio(self) -> dict[str, int]:
        return dict.fromkeys({item.kind for item in self.items}, 1)

    def plan(self, step: int) -> Plan:
        return Plan([self.items], 1, 0)


class Samples(list):
    """Samples that stand in for a prepared folder; an exception is raised where one stands."""

    folder = pathlib.Path("some/folder")

    def stored(self, indices):
        return None  # as of a local folder

    def __getitem__(self, index: int) -> Sample:
        if isinstance(found := super().__getitem__(index), Exception):
            raise found
        return found


def row_of(processor: Processor, samples: list, **changes):
    """The one row of `samples`, (sample, what its item is beside) each, and the report."""
    folder, items = Samples(sample for sample, _ in samples), []
    for index, (sample, extra) in enumerate(samples):
        of_sample = {} if isinstance(sample, Exception) else {
            "kind": sample.kind, "length": sample.length, "images": len(sample.images)
        }  # fmt: skip
        items.append(Item(**{"folder": folder, "index": index, **of_sample, **extra}))
    data = dataclasses.replace(DataConfig(context=CONTEXT, images_per_row=4), **changes)
    tokenizer = processor.tokenizer
    make = Assembler(Fixed(data, items), processor.settings, tokenizer.pad_id, tokenizer.image_placeholder_id)
    batch, report = make(0)
    return {name: x[0] for name, x in batch.items()}, report


def text(*ids: int, answers: list[int] = ()) -> Sample:
    return Sample("text", np.array(ids, np.int32), np.isin(np.arange(len(ids)), answers))


# ---------------------------------------------------------------- by hand


def test_text_rows(processor):
    samples = [(text(1, 10, 11, 12, answers=[2, 3]), {}), (text(1, 20, 21, answers=[2]), {})]
    row, report = row_of(processor, samples)
    pad = processor.tokenizer.pad_id
    assert row["ids"][:6].tolist() == [1, 10, 11, 1, 20, pad]
    assert row["targets"][:6].tolist() == [10, 11, 12, 20, 21, 0]
    assert row["positions"][:6].tolist() == [0, 1, 2, 0, 1, 0]
    assert row["segment_ids"][:6].tolist() == [1, 1, 1, 2, 2, 0]
    assert row["tasks"][:6].tolist() == [TASKS["text"]] * 5 + [0]
    assert not row["segment_ids"][5:].any() and (row["ids"][5:] == pad).all()
    assert not row["is_code"].any() and not row["is_image"].any()
    assert row["images"].shape == (0, 32, 32, 3), "no understanding, no images"
    assert (report["tokens"], report["samples"], report["images"]) == (5, 2, 0)
    assert report["sample_length"] == pytest.approx((9 + 4) / 5)

    answers, _ = row_of(processor, samples, text_loss="answers")
    assert answers["tasks"][:5].tolist() == [0, TASKS["text"], TASKS["text"], 0, TASKS["text"]]


def test_generation_rows(processor):
    t = processor.tokenizer
    boi, n = t.begin_of_image_id, MODEL.gen_vision.num_tokens
    prompt, short = [1, 30, 31, 32, boi], [1, 30, boi]
    codes = np.arange(100, 100 + n, dtype=np.int32) % 64
    sample = Sample(
        "generation", np.array(prompt, np.int32), np.zeros(5, bool), codes=codes, short_ids=np.array(short, np.int32)
    )
    plain = dataclasses.replace(sample, short_ids=np.zeros(0, np.int32))
    for drawn, extra, ids in (
        (sample, {}, prompt),
        (sample, {"cut": True}, short),
        (plain, {"cut": True}, prompt),
        (sample, {"unconditional": True}, processor.unconditional(prompt)),
        (sample, {"unconditional": True, "cut": True}, processor.unconditional(short)),
    ):
        row, _ = row_of(processor, [(drawn, extra), (text(1, 7, 8), {})])
        end = len(ids) + n - 1
        assert row["ids"][:end].tolist() == [*ids, *codes[:-1]], "the last code is no input"
        assert np.flatnonzero(row["is_code"]).tolist() == list(range(len(ids), end))
        learned = np.flatnonzero(row["tasks"] == TASKS["generation"])
        assert learned.tolist() == list(range(len(ids) - 1, end)), "the first code is predicted at begin_of_image"
        assert len(learned) == n
        assert row["targets"][learned].tolist() == codes.tolist()
        assert not row["tasks"][: len(ids) - 1].any()
        assert (row["segment_ids"][:end] == 1).all() and row["positions"][:end].tolist() == list(range(end))
        # A shorter caption leaves its place empty, and what follows stays where it was planned.
        planned = sample.length
        assert not row["segment_ids"][end:planned].any() and not row["tasks"][end:planned].any()
        assert row["ids"][planned : planned + 2].tolist() == [1, 7]


def test_understanding_rows(data, processor):
    folder = open_prepared(data.understanding[0])
    samples = [folder[i] for i in range(3)]
    row, _ = row_of(processor, [(sample, {}) for sample in samples], context=512, images_per_row=6)
    patches, start, images = MODEL.vision.num_patches, 0, []
    for segment, sample in enumerate(samples, 1):
        stop = start + sample.length
        assert row["ids"][start:stop].tolist() == sample.ids[:-1].tolist()
        assert row["targets"][start:stop].tolist() == sample.ids[1:].tolist()
        assert (row["segment_ids"][start:stop] == segment).all()
        assert ((row["tasks"][start:stop] == TASKS["understanding"]) == sample.answers[1:]).all()
        images += [understanding_pixels_uint8(image, processor.settings) for image in sample.images]
        start = stop
    assert row["is_image"].sum() == patches * len(images)
    assert (row["ids"][row["is_image"]] == processor.tokenizer.image_placeholder_id).all()
    assert (row["images"][: len(images)] == np.stack(images)).all()
    assert not row["images"][len(images) :].any()
    # Every answer ends with EOS, which is learned.
    assert row["targets"][np.flatnonzero(row["tasks"])[-1]] == processor.tokenizer.eos_id


def test_damaged_samples_leave_their_place_empty_and_are_named(data, processor):
    folder = open_prepared(data.understanding[0])
    good, last = folder[0], folder[1]
    broken = dataclasses.replace(folder[1], images=(b"no image", *folder[1].images[1:]))
    lost = ValueError("the record is damaged")
    planned = {"kind": "understanding", "length": 9, "images": 1}
    row, report = row_of(processor, [(good, {}), (broken, {}), (lost, planned), (last, {})], context=512)
    a, b = good.length, good.length + broken.length + 9
    assert (row["segment_ids"][:a] == 1).all()
    for name in ("segment_ids", "tasks", "is_image", "targets", "positions"):
        assert not row[name][a:b].any(), name
    assert (row["segment_ids"][b : b + last.length] == 4).all()
    # The images close up, since placeholders are what counts them.
    pixels = [understanding_pixels_uint8(image, processor.settings) for image in (*good.images, *last.images)]
    assert (row["images"][: len(pixels)] == np.stack(pixels)).all()
    assert len(report["problems"]) == 2
    assert report["problems"][0].startswith("some/folder, sample 1: ") and "image" in report["problems"][0]
    assert report["problems"][1] == "some/folder, sample 2: the record is damaged"


# ---------------------------------------------------------------- batches of a mixture


def same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_rows_of_a_host_are_those_of_the_whole_batch(made):
    whole, report = made(3)
    part, part_report = made(3, [1, 3])
    same(part, {name: x[[1, 3]] for name, x in whole.items()})
    assert part_report == report, "counts are of all rows, so that every host reports alike"
    assert whole["ids"].shape == (4, CONTEXT) and whole["images"].shape == (4, 4, 32, 32, 3)
    assert report["tokens"] >= (whole["segment_ids"] > 0).sum() > 0


def test_threads_and_processes_make_the_same_batches(made):
    expected = [made(step, [0, 2]) for step in range(2, 7)]
    for workers in (0, 2):
        got = list(load_batches(made, [0, 2], 2, 7, workers))
        assert [step for step, _, _ in got] == list(range(2, 7))
        for (_, batch, report), (wanted, wanted_report) in zip(got, expected, strict=True):
            same(batch, wanted)
            assert report == wanted_report
    step, batch, _ = next(load_batches(made, [0, 2], 4, 7, 0))
    assert step == 4
    same(batch, expected[2][0])


def test_no_step_no_batch(made):
    assert list(load_batches(made, [0], 4, 4, 0)) == []


def test_tasks_are_numbered_from_one():
    assert TASKS == {"understanding": 1, "text": 2, "generation": 3}
