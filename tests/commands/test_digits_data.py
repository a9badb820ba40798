"""Digits: splits, the files that are written, through preparation to samples; tokenizer, judge, configuration."""

import dataclasses
import json
import pathlib
import re
import statistics
import sys

import numpy as np
import pytest
from PIL import Image

from examples.digits.config import DigitsConfig
from examples.digits.data import (
    IMAGE_SIZE,
    SHIFTS,
    SPLITS,
    WORDS,
    captions,
    load_split,
    questions,
    sentences,
    shifted,
    to_float,
    to_rgb,
    write_sources,
    write_tokenizer,
)
from examples.digits.judge import Judge
from examples.digits.rl.answers import write_questions
from examples.digits.rl.run import table
from examples.digits.spread import main as spread
from janus_jax.config import get_preset
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from train.data.prepared import open_prepared
from train.overrides import load_config
from train.prepare import prepare
from train.raw.sources import open_source
from train.validate import validate

CONFIG = load_config("digits")
MODEL = CONFIG.stages[0].model
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, MODEL.language.vocab_size, MODEL.vision.image_size, MODEL.vision.num_patches)
    return folder


@pytest.fixture(scope="module")
def processor(tokenizer_folder) -> Processor:
    return Processor.from_folder(tokenizer_folder, MODEL)


# ---------------------------------------------------------------- images


def test_splits_are_disjoint_and_stratified():
    splits = {name: load_split(name) for name in SPLITS}
    assert [len(labels) for _, labels in splits.values()] == [1257, 180, 360]
    keys = [image.tobytes() for images, _ in splits.values() for image in images]
    assert len(keys) == 1797 and len(set(keys)) == 1797, "an image is in two splits"
    for images, labels in splits.values():
        counts = np.bincount(labels)
        assert len(counts) == 10 and counts.max() - counts.min() <= 0.1 * len(labels) / 10 + 1
        assert images.dtype == np.uint8 and images.shape[1:] == (8, 8) and images.max() == 255
    again = load_split("held_out")
    np.testing.assert_array_equal(again[0], splits["held_out"][0])


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'test'; known: train, validation, held_out"):
        load_split("test")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"scikit-learn: pip install -e '.\[digits\]'"):
        load_split("train")


def test_shifted():
    image = np.zeros((1, 8, 8), np.uint8)
    image[0, 3, 4] = 200
    moved = shifted(image)
    assert [tuple(np.argwhere(m)[0]) for m in moved] == [(3 + down, 4 + right) for down, right in SHIFTS]
    edge = np.full((1, 8, 8), 7, np.uint8)
    np.testing.assert_array_equal(shifted(edge, [(1, 0)])[0, 0], 0)  # black moves in
    images, _ = load_split("validation")
    np.testing.assert_array_equal(shifted(images[:5])[4 * 5 :][:5], images[:5])  # the middle one is no shift


def test_rgb_and_float():
    images, _ = load_split("validation")
    rgb = to_rgb(images[:3])
    assert rgb.shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3) and rgb.dtype == np.uint8
    assert (rgb[..., 0] == rgb[..., 2]).all()
    pooled = rgb[..., 0].reshape(3, 8, 2, 8, 2).mean((2, 4))
    assert np.abs(pooled - images[:3]).mean() < 12
    assert to_float(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"), ("validation",), seed=0, augment=False)


def test_sources_are_read(sources):
    read = {kind: open_source(path) for kind, path in sources.items()}
    assert {kind: len(source) for kind, source in read.items()} == {
        "understanding": 180,
        "text": len(sentences()),
        "generation": 180,
    }
    raw = read["generation"][0]
    assert any(raw.caption in captions(label) for label in range(10))
    question, answer = (message["content"] for message in read["understanding"][0].messages)
    assert (question.removeprefix("<image>\n"), answer) in [pair for label in range(10) for pair in questions(label)]


def test_texts_belong_to_their_images(sources):
    """By the judge, who has not seen these images, nearly every text names the digit of its image."""
    from janus_jax.processing.images import open_image

    judge = Judge()
    for kind in ("understanding", "generation"):
        source = open_source(sources[kind])
        raws = [source[i] for i in range(len(source))]
        said = judge.predict(np.stack([np.asarray(open_image(raw.images[0])) for raw in raws]))
        texts = [raw.messages[1]["content"] if kind == "understanding" else raw.caption for raw in raws]
        right = [str(label) in text or WORDS[label] in text for label, text in zip(said, texts, strict=True)]
        assert np.mean(right) > 0.95


def test_augmented_sources(tmp_path, monkeypatch):
    """Nine shifts of every image; noise on those to be understood, and none on those to be drawn."""
    few = load_split("train")[0][:4], load_split("train")[1][:4]
    monkeypatch.setattr("examples.digits.data.load_split", lambda *names: few)
    paths = write_sources(tmp_path / "a", ("train",), seed=0, augment=True)
    again = write_sources(tmp_path / "b", ("train",), seed=0, augment=True)
    other = write_sources(tmp_path / "c", ("train",), seed=1, augment=True)
    assert paths["generation"].read_bytes() == again["generation"].read_bytes()
    assert paths["understanding"].read_bytes() == again["understanding"].read_bytes()
    assert paths["generation"].read_bytes() != other["generation"].read_bytes()

    from janus_jax.processing.images import open_image

    wanted = {image.tobytes() for image in to_rgb(shifted(few[0]))}
    drawn, seen = (
        [np.asarray(open_image(source[i].images[0])) for i in range(len(source))]
        for source in (open_source(paths[kind]) for kind in ("generation", "understanding"))
    )
    assert len(drawn) == len(seen) == 36
    assert {image.tobytes() for image in drawn} == wanted
    assert not {image.tobytes() for image in seen} & wanted


def test_through_preparation(sources, processor, tmp_path):
    """Every sample survives, fits the rows, and is what inference will write."""
    context = CONFIG.stages[-1].data.context
    for kind, path in sources.items():
        encode = lambda images: np.zeros((len(images), MODEL.gen_vision.num_tokens), np.int32)  # noqa: E731
        report = prepare(
            open_source(path), tmp_path / kind, kind, processor,
            encode=encode if kind == "generation" else None, context=context, workers=1, progress=False,
        )  # fmt: skip
        assert report.kept == report.read and not report.dropped
        prepared = open_prepared(tmp_path / kind)
        assert prepared.kind == kind and prepared.lengths.max() <= context
    sample = open_prepared(tmp_path / "understanding")[0]
    start = int(np.argmax(sample.answers))
    asked, answer = processor.tokenizer.decode(sample.ids[:start]), processor.tokenizer.decode(sample.ids[start:])
    question = asked.rsplit("\n\n", 1)[0].rsplit("\n", 1)[1]
    assert (question, answer.strip()) in [pair for label in range(10) for pair in questions(label)]
    turns = [("user", f"<image_placeholder>\n{question}"), ("assistant", "")]
    assert processor.understanding_prompt(turns, 1) == sample.ids[:start].tolist()


# ---------------------------------------------------------------- tokenizer


def test_tokenizer(processor, tokenizer_folder):
    tokenizer = processor.tokenizer
    assert processor.roles == "pro"
    assert 256 < tokenizer.vocab_size <= MODEL.language.vocab_size
    assert len(tokenizer.encode(SYSTEM_PROMPT)) < 42  # 38 words and marks
    assert json.loads((tokenizer_folder / "preprocessor_config.json").read_text())["image_size"] == IMAGE_SIZE
    for text in (SYSTEM_PROMPT, "Ein großer Hund 🙂", *captions(7), *sentences()[:40]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for label in range(10):
        prompts = [processor.text_to_image_prompt(caption) for caption in captions(label)]
        assert max(map(len, prompts)) < 20
        assert len({tuple(prompt) for prompt in prompts}) == len(captions(label))


def test_tokenizer_is_deterministic(tokenizer_folder, tmp_path):
    write_tokenizer(tmp_path, MODEL.language.vocab_size, MODEL.vision.image_size, MODEL.vision.num_patches)
    name = "tokenizer.json"
    assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_tokenizer_needs_room(tmp_path):
    with pytest.raises(ValueError, match="a vocabulary of 200 has no room for 264 bytes and tags"):
        write_tokenizer(tmp_path, 200, 16, 16)


def test_questions_have_one_answer():
    for index in range(len(questions(0))):
        assert len({questions(label)[index][1] for label in range(10)}) == 10
        assert len({questions(label)[index][0] for label in range(10)}) == 1


# ---------------------------------------------------------------- judge


def test_larger_digits():
    """Other sizes than 16 x 16, from the pixels to the judge."""
    config = load_config("digits_large")
    size = config.image_size
    assert size == 24 and config.vq.model.num_tokens == 144
    images, labels = load_split("validation")
    judge = Judge(("train",), size)
    assert to_rgb(images[:2], size).shape == (2, size, size, 3)
    assert np.mean(judge.predict(to_rgb(images, size)) == labels) >= 0.97
    with pytest.raises(ValueError, match=r"the judge takes uint8 \[N, 24, 24, 3\], not"):
        judge.predict(to_rgb(images[:2]))
    odd = dataclasses.replace(config.vq.model, grid=11)
    with pytest.raises(ValueError, match="draws 22 pixels a side; digits need a multiple of their 8"):
        dataclasses.replace(config, vq=dataclasses.replace(config.vq, model=odd), stages=())


def test_judge():
    judge = Judge()
    assert judge.accuracy("validation") >= 0.97
    assert judge.accuracy("train") > 0.995
    assert judge.predict(to_rgb(load_split("train")[0][:5])).shape == (5,)
    for bad in (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 16, 16, 3)), np.zeros((16, 16, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"the judge takes uint8 \[N, 16, 16, 3\], not"):
            judge.predict(bad)


# ---------------------------------------------------------------- configuration


def test_stages_follow_one_another():
    runs = dataclasses.replace(CONFIG, workdir="elsewhere", seed=3).run_stages
    assert [run.stage for run in runs] == [1, 2, 3]
    assert all(validate(run) == [] for run in runs)
    assert all(run.workdir == f"elsewhere/{run.name}" and run.seed == 3 for run in runs)
    assert [run.init_from for run in runs] == ["", "elsewhere/stage1", "elsewhere/stage2"]
    assert [run.vq_from for run in runs] == ["elsewhere/vq", "", ""]
    for run in runs:
        folders = run.data.understanding + run.data.text + run.data.generation + run.evaluation.understanding
        assert all(folder.startswith("elsewhere/prepared/") for folder in folders)
        assert not any("held_out" in folder for folder in folders)
    assert dataclasses.replace(CONFIG, seed=3).run_vq == dataclasses.replace(CONFIG.vq, seed=3)


def test_overrides_reach_every_part():
    config = load_config("digits", ["seed=1", "vq.steps=5", "stages.2.steps=7", "workdir=w"])
    assert (config.run_vq.seed, config.run_vq.steps, config.run_stages[2].steps) == (1, 5, 7)
    with pytest.raises(ValueError, match="the VQ model of stage1 is not that of vq"):
        load_config("digits", ["vq.model.codebook_size=64"])


def test_model_can_be_written_and_read():
    from janus_jax.config import original_config, parse_config

    assert parse_config(original_config(MODEL)) == MODEL
    assert MODEL.language.width < get_preset("janus_pro_1b").language.width
    assert isinstance(CONFIG, DigitsConfig)


# ---------------------------------------------------------------- several seeds


FIGURES = {
    "split": "held_out",
    "questions": 8,
    "images_per_class": 5,
    "guidance": 2.5,
    "temperature": 0.8,
    "judge": 1.0,
    "reconstruction": 0.99,
    "generation": 0.96,
    "lowest_class": 0.8,
    "distinct": 50,
    "seconds": {"data": 60.0, "stage1": 120.0},
    "cpu_seconds": 300.0,
}


def test_questions_about_dark_pictures(tmp_path):
    """One for each training picture, in a rewarded wording, with the right answer to it; and as prompts of answers."""
    config = load_config("grpo_digits", [f"workdir={tmp_path}", "parts=answers"])
    write_questions(config)
    lines = [json.loads(line) for line in (config.questions / "questions.jsonl").read_text().splitlines()]
    images, labels = load_split("train")
    assert len(lines) == len(labels) and len({line["prompt"] for line in lines}) == 3
    for line, image, label in list(zip(lines, to_rgb(images), labels, strict=True))[::200]:
        assert (line["prompt"], line["answer"]) in questions(int(label))[:3]
        np.testing.assert_array_equal(np.asarray(Image.open(config.questions / line["images"])), image // 2)
    (run,) = config.runs("model").values()
    assert run.answers and run.init_from == "model" and run.grpo.prompts == (str(config.questions / "questions.jsonl"),)
    share = {"rewarded": 0.7, "other_wording": 0.6, "bright": 1.0}
    told = table({"answers": {"before": share, "after": share | {"rewarded": 0.9}, "kl": 0.1, "seconds": 9.0}})
    assert told.splitlines()[2].split() == ["after", "90.0%", "60.0%", "100.0%"]


def write_runs(folder, *changes):
    for index, changed in enumerate(changes):
        path = folder / str(index) / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(FIGURES | changed))
    return [str(folder / str(index)) for index in range(len(changes))]


def test_spread(tmp_path, capsys):
    changes = [
        {"seed": 2, "understanding": 0.97},
        {"seed": 0, "understanding": 0.99},
        {"seed": 1, "understanding": 0.95},
    ]
    assert spread(write_runs(tmp_path, *changes)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | seed 0 | seed 1 | seed 2 | mean | standard deviation | range |"
    assert "| understanding, 8 questions | 99.0% | 95.0% | 97.0% | 97.0% | 2.0 | 95.0% to 99.0% |" in lines
    assert any(line.startswith("| generation, 50 images, guidance 2.5, temperature 0.8 | 96.0% |") for line in lines)
    assert "| minutes, the whole command | 3.0 | 3.0 | 3.0 | 3.0 | 0.0 | 3.0 to 3.0 |" in lines
    assert "| minutes of two cores' work | 2.5 | 2.5 | 2.5 | 2.5 | 0.0 | 2.5 to 2.5 |" in lines


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"guidance": 3.0}, "guidance is 3.0 in .*, 2.5 in the first run: they cannot be averaged"),
        ({"split": "validation"}, "split is validation in .*, held_out in the first run"),
        ({"seed": 0}, "is of seed 0, as is another one"),
        ({"understanding": "98%"}, "does not hold the figures of `train.main --config digits`"),
        ({"seconds": [1, 2]}, "does not hold the figures"),
    ],
)
def test_runs_that_cannot_be_averaged(changed, told, tmp_path, capsys):
    right = {"seed": 0, "understanding": 0.97}
    assert spread(write_runs(tmp_path, right, right | {"seed": 1} | changed)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(told, line) and "1/results.json" in line


def test_no_run(tmp_path, capsys):
    assert spread([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'results.json'}: No such file or directory\n"


def test_what_the_readme_says():
    """The README repeats RESULTS, whose means are those of its five seeds."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    rows = {}
    for line in (ROOT / "benchmarks" / "RESULTS.md").read_text().split("\n## Digits")[1].split("\n## ")[0].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(name.split(",")[0], cells)
    for kind in ("understanding", "generation"):
        *values, mean, deviation, extent = rows[kind]
        values = [float(value.rstrip("%")) for value in values]
        assert len(values) == 5
        assert float(mean.rstrip("%")) == pytest.approx(statistics.mean(values), abs=0.1)
        assert float(deviation) == pytest.approx(statistics.stdev(values), abs=0.1)
        assert extent == f"{min(values)}% to {max(values)}%"
        assert float(mean.rstrip("%")) >= 97
        assert f"{mean} ({extent})" in readme
    assert f"{rows['lowest class'][-1]}" in readme
