"""Benchmarks of digits in public formats: right answers to what is asked, and what GenEval's rules say of drawings."""

from __future__ import annotations

import io
import json
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from evals.asking.plan import questions
from evals.items import Item
from evals.tasks import TASKS
from examples.digits import benchmarks, tasks
from examples.digits.data import WORDS, load_split, to_rgb, write_tokenizer
from examples.digits.judge import Judge
from janus_jax.processing.chat import Processor
from train.data.prepared import open_prepared
from train.overrides import load_config
from train.prepare import prepare
from train.raw.sources import open_source

MODEL = load_config("digits").stages[0].model
COUNT = 20


@pytest.fixture(scope="module")
def split() -> tuple[np.ndarray, np.ndarray]:
    """The first held-out digits."""
    images, labels = load_split("held_out")
    return images[:COUNT], labels[:COUNT]


@pytest.fixture(scope="module")
def lessons(split, tmp_path_factory) -> pathlib.Path:
    """As `write_lessons` writes them, of these digits instead of all those to be trained on."""
    folder = tmp_path_factory.mktemp("lessons")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load_split", lambda name: split)
        tasks.write_lessons(folder)
    return folder


def label_of(item: Item, split) -> int:
    shown = np.asarray(Image.open(io.BytesIO(item.images[0].read())))
    (found,) = {int(label) for image, label in zip(to_rgb(split[0]), split[1], strict=True) if (image == shown).all()}
    return found


def loaded(folder: pathlib.Path, name: str) -> list[Item]:
    found = TASKS[name].load(folder / "tasks", TASKS[name].protocols[0])
    assert not found.problems
    return found.items


def test_pope(lessons, split):
    items = loaded(lessons, "pope")
    assert sum(len(item.fields["category"]) for item in items) == 3 * 2 * COUNT
    for item in items:
        said = item.fields["question"].removeprefix("Is there a").removeprefix("n").split()[0]
        assert (WORDS.index(said) == label_of(item, split)) == (item.fields["answer"] == "yes")
    assert sum(item.fields["answer"] == "yes" for item in items) == COUNT
    right = {item.id: item.fields["answer"] for item in items}
    numbers = TASKS["pope"].score(items, right, "report").numbers
    assert {numbers[name].value for name in ("F1 random", "F1 popular", "F1 adversarial", "accuracy overall")} == {100}
    always = TASKS["pope"].score(items, dict.fromkeys(right, "Yes"), "report").numbers
    assert always["accuracy overall"].value == 50 and always["F1 random"].value == pytest.approx(200 / 3)


def test_mme(lessons, split):
    items = loaded(lessons, "mme")
    assert len(items) == 2 * COUNT and {item.fields["category"] for item in items} == set(tasks._MME)
    for item in items:
        label, text, category = label_of(item, split), item.fields["question"], item.fields["category"]
        truth = {
            "existence": f" {WORDS[label]} " in text,
            "OCR": f"image {label}?" in text,
            "commonsense_reasoning": ("odd" if label % 2 else "even") in text,
            "numerical_calculation": f"to {label + 1}?" in text,
        }[category]
        assert truth == (item.fields["answer"] == "yes"), text
    scores = TASKS["mme"].score(items, {item.id: item.fields["answer"] for item in items}, "report")
    assert scores.numbers["perception"].value == scores.numbers["cognition"].value == 400
    assert not any("do not have two questions" in note for note in scores.notes)


def test_mmbench(lessons, split):
    items = loaded(lessons, "mmbench")
    assert len(items) == 4 * COUNT and len({item.group for item in items}) == COUNT
    for item in items:
        label, options = label_of(item, split), item.fields["options"]
        assert len(set(options.values())) == 4
        assert options[item.fields["answer"]] in (WORDS[label], f"It is {label}")
    numbers = TASKS["mmbench"].score(items, {item.id: item.fields["answer"] for item in items}, "report").numbers
    assert numbers["circular"].value == numbers["vanilla-all"].value == 100
    # Whoever always says A is right once in each rotation.
    always = TASKS["mmbench"].score(items, dict.fromkeys([item.id for item in items], "A"), "report").numbers
    assert (always["vanilla-all"].value, always["circular"].value) == (25, 0)


def test_lessons_are_what_is_asked(lessons, tmp_path):
    """Token by token, once prepared: the model learns to answer exactly the prompts of `evals`."""
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder, MODEL.language.vocab_size, MODEL.vision.image_size, MODEL.vision.num_patches)
    benchmarks.with_old_roles(folder, tmp_path / "own")
    processor = Processor.from_folder(tmp_path / "own", MODEL)
    source = open_source(lessons / "lessons.jsonl")
    prepare(source, tmp_path / "out", "understanding", processor, context=192, batch_size=32, progress=False)
    samples = open_prepared(tmp_path / "out")
    items = [item for name in tasks.ASKED for item in loaded(lessons, name)]
    asked, problems = questions(items, processor)
    assert len(samples) - COUNT == len(asked) == len(items) and not problems
    for question, sample in list(zip(asked, samples, strict=False))[::7]:
        answered = np.asarray(sample.answers)
        assert tuple(sample.ids[~answered]) == question.ids
        said = processor.tokenizer.answer(sample.ids[answered].tolist())
        assert said.lower() == question.item.fields["answer"].lower()


def test_the_same_seed_asks_the_same(lessons, split, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "load_split", lambda name: split)
    tasks.write_tasks(tmp_path / "same")
    tasks.write_tasks(tmp_path / "other", seed=1)
    name = "MMBench_DEV_EN.tsv"
    text = (lessons / "tasks" / name).read_text()
    assert (tmp_path / "same" / name).read_text() == text != (tmp_path / "other" / name).read_text()


@pytest.fixture(scope="module")
def classifier() -> Judge:
    """Of digits in the middle alone, which is fitted sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.digits.judge.SHIFTS", ((0, 0),))
        patch.setattr("examples.digits.judge.shifted", lambda images: images)
        return Judge(("train",))


def test_drawn_digits_are_judged_by_the_rules_of_geneval(lessons, classifier, tmp_path):
    """Real digits stand for drawn ones: those that were asked for, then the next ones."""
    images, labels = load_split("held_out")
    images, labels = images[:100], labels[:100]
    known = classifier.predict(to_rgb(images)) == labels
    shown = {label: to_rgb(images[known & (labels == label)][:4]) for label in (0, 1, 2)}

    def drawing(shift: int) -> types.SimpleNamespace:
        def generate_images(prompts: list[str], count: int, **_) -> list[Image.Image]:
            asked = [number // 2 for number in range(len(prompts))]
            return [Image.fromarray(x) for label in asked for x in shown[label + shift][:count]]

        return types.SimpleNamespace(generate_images=generate_images)

    prompts, data = (lessons / "tasks" / tasks.PROMPTS).read_text().splitlines(keepends=True), tmp_path / "data"
    assert len(prompts) == 60
    (data / "geneval").mkdir(parents=True)
    (data / tasks.PROMPTS).write_text("".join(prompts[0:2] + prompts[6:8]))
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    numbers = benchmarks.judge_drawing(drawing(0), data, right, classifier, {"model": "right"}).numbers
    assert numbers["overall"].value == numbers["prompts with a correct picture"].value == 100
    assert numbers["overall"].count == 16
    assert benchmarks.judge_drawing(None, data, right, classifier, {"model": "right"}).numbers == numbers
    assert (right / "geneval" / "pictures" / "00003" / "samples" / "00003.png").exists()
    numbers = benchmarks.judge_drawing(drawing(1), data, wrong, classifier, {"model": "wrong"}).numbers
    assert numbers["overall"].value == 0
    line = json.loads((wrong / "geneval" / "export-digits" / "results.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "a handwritten 0" and line["reason"] == "expected zero>=1, found 0"
    assert json.loads(line["details"]).keys() == {"one"}
    assert "GenEval's rules, by the classifier of digits" in (wrong / "report.md").read_text()


def test_where_a_digit_is(classifier):
    image = np.zeros((16, 16, 3), np.uint8)
    image[3:12, 7:9] = 255
    (found,) = classifier.detect(Image.fromarray(image))["one"]
    assert found.box == (7, 3, 9, 12) and found.mask.sum() == 18


@pytest.mark.parametrize("module", [benchmarks, tasks])
def test_bad_input(module, tmp_path, capsys):
    given = ["--out", str(tmp_path)] if module is tasks else ["--model", "nowhere", "--out", str(tmp_path / "out")]
    assert module.main(given) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
