"""Benchmarks of digits in public formats: `python -m examples.digits.tasks --out runs/digits_tasks`.

Questions about one split's pictures as POPE (its JSON lines), MME (its folders) and MMBench (VLMEvalKit's table) ask
them, and prompts as GenEval has them: the folder is a `--data` of `evals.main`.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evals.items import Item, Scores
from evals.tasks import TASKS
from evals.tasks.geneval import GenEval
from examples.digits.data import SPLITS, WORDS, captions, load_split, png, questions, to_rgb
from janus_jax.io.messages import print_any_text, print_error
from janus_jax.processing.chat import IMAGE_PLACEHOLDER

ASKED = ("pope", "mme", "mmbench")
PROMPTS = pathlib.Path("geneval", "evaluation_metadata.jsonl")
_ROTATION = 10**6  # between the indices of a question's rotations, as in MMBench's table
_LETTERS = "ABCD"
_ARTICLES = {word: "an" if word == "eight" else "a" for word in WORDS}
# Of each category of MME, a question with the answer yes and one with the answer no.
_MME = {
    "existence": "Is there {a} {word} in this image?",
    "OCR": "Is the digit in the image {digit}?",
    "commonsense_reasoning": "Is the digit in the image {parity}?",
    "numerical_calculation": "Is the digit in the image plus one equal to {successor}?",
}


def write_tasks(folder: pathlib.Path, split: str = "held_out", seed: int = 0) -> None:
    """Writes all four benchmarks of the pictures of `split` into `folder`, the same ones for the same seed.

    Every picture is asked about once in each split of POPE with either answer, twice in one category of MME, and in
    each rotation of one question of MMBench. The wrong digits of POPE are any (random), the most frequent ones of the
    training pictures (popular), and the most alike (adversarial).
    """
    images, labels = load_split(split)
    pictures = [png(image) for image in to_rgb(images)]
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write_pope(folder / "POPE", pictures, labels.tolist(), rng)
    _write_mme(folder / "MME_Benchmark_release_version", pictures, labels.tolist(), rng)
    _write_mmbench(folder / "MMBench_DEV_EN.tsv", pictures, labels.tolist(), rng)
    _write_lines(folder / PROMPTS, _prompts())


# ---------------------------------------------------------------- the four formats


def _write_pope(folder: pathlib.Path, pictures: Sequence[bytes], labels: Sequence[int], rng: np.random.Generator):
    """coco_pope_random.json and its siblings, with the pictures in val2014."""
    popular, alike = _popular(), _alike()
    names = [f"digit_{number:04d}.png" for number in range(len(pictures))]
    (folder / "val2014").mkdir(parents=True)
    for name, picture in zip(names, pictures, strict=True):
        (folder / "val2014" / name).write_bytes(picture)
    wrong = {
        "random": lambda label: int(rng.choice([other for other in range(10) if other != label])),
        "popular": lambda label: int(rng.choice([other for other in popular if other != label][:3])),
        "adversarial": lambda label: alike[label],
    }
    for split, other_than in wrong.items():
        rows = []
        for name, label in zip(names, labels, strict=True):
            for digit, answer in ((label, "yes"), (other_than(label), "no")):
                text = f"Is there {_named(digit)} in the image?"
                rows.append({"question_id": len(rows) + 1, "image": name, "text": text, "label": answer})
        _write_lines(folder / f"coco_pope_{split}.json", rows)


def _write_mme(folder: pathlib.Path, pictures: Sequence[bytes], labels: Sequence[int], rng: np.random.Generator):
    """A folder for each category, with a text beside each picture."""
    for category in _MME:
        (folder / category).mkdir(parents=True)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        category = list(_MME)[number % len(_MME)]
        other = int(rng.choice([each for each in range(10) if (each - label) % 2]))
        lines = [f"{_mme(category, label)}\tYes\n", f"{_mme(category, other)}\tNo\n"]
        (folder / category / f"{number:04d}.png").write_bytes(picture)
        # The one with yes is not always the first.
        (folder / category / f"{number:04d}.txt").write_text("".join(lines[:: int(rng.choice((1, -1)))]))


def _mme(category: str, label: int) -> str:
    values = {
        "a": _ARTICLES[WORDS[label]],
        "word": WORDS[label],
        "digit": label,
        "parity": "odd" if label % 2 else "even",
        "successor": label + 1,
    }
    return f"{_MME[category].format(**values)} Please answer yes or no."


def _write_mmbench(path: pathlib.Path, pictures: Sequence[bytes], labels: Sequence[int], rng: np.random.Generator):
    """VLMEvalKit's table: the rotations of a question refer to the picture of the first."""
    header = ["index", "image", "question", *_LETTERS, "answer", "category", "l2-category", "split"]
    rows = []
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        others = rng.choice([each for each in range(10) if each != label], len(_LETTERS) - 1, replace=False)
        digits = rng.permutation([label, *others]).tolist()
        by_word = number % 2
        question = "Which digit is in the image?" if by_word else "Which number is written here?"
        category = "digit_word" if by_word else "digit_numeral"
        for turn in range(len(_LETTERS)):
            turned = digits[turn:] + digits[:turn]
            options = [WORDS[digit] if by_word else f"It is {digit}" for digit in turned]
            image = number if turn else base64.b64encode(picture).decode()
            answer = _LETTERS[turned.index(label)]
            ability = "finegrained_perception (instance-level)"
            rows.append([number + turn * _ROTATION, image, question, *options, answer, category, ability, "dev"])
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]), encoding="utf-8")


def _prompts() -> list[dict[str, Any]]:
    """Every phrasing for every digit: one object, of the class of that name."""
    return [
        {"tag": "single_object", "include": [{"class": word, "count": 1}], "prompt": caption}
        for label, word in enumerate(WORDS)
        for caption in captions(label)
    ]


def _named(label: int) -> str:
    return f"{_ARTICLES[WORDS[label]]} {WORDS[label]}"


def _popular() -> list[int]:
    """The digits, those first that most of the training pictures show."""
    _, labels = load_split("train")
    return np.argsort(-np.bincount(labels, minlength=10), kind="stable").tolist()


def _alike() -> list[int]:
    """For each digit the one whose mean picture is nearest to its own, in the training pictures."""
    images, labels = load_split("train")
    means = np.stack([images[labels == label].mean(0).ravel() for label in range(10)])
    distances = ((means[:, None] - means) ** 2).sum(-1) + np.diag(np.full(10, np.inf))
    return distances.argmin(1).tolist()


def _write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class DigitsGenEval(GenEval):
    """GenEval's rules, on what the classifier of digits has seen (`Judge.detect`)."""

    title = "GenEval's rules, by the classifier of digits"
    protocols = ("digits",)
    classes = WORDS

    def score(self, *args: Any, **options: Any) -> Scores:
        return dataclasses.replace(super().score(*args, **options), notes=[])  # figures of others, on other prompts


# ---------------------------------------------------------------- what teaches them


def write_lessons(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes the same kinds of questions about the training pictures as training data of `understanding`.

    Their texts are those of `evals` to the letter. A question of `data.questions` about each picture is added, without
    which the digit's name would be learned anew. Returns: the file, in LLaVA's schema.
    """
    data, path = folder / "tasks", folder / "lessons.jsonl"
    if path.exists():
        return path
    shutil.rmtree(folder, ignore_errors=True)
    write_tasks(data, "train", seed)
    (folder / "pictures").mkdir()
    records = []

    def add(name: str, picture: bytes, question: str, answer: str):
        (folder / "pictures" / f"{name}.png").write_bytes(picture)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"image": f"pictures/{name}.png", "system": "", "conversations": turns})

    for name in ASKED:
        task = TASKS[name]
        for item in task.load(data, task.protocols[0]).items:
            add(f"{name}_{item.id.replace('/', '_')}", item.images[0].read(), _question(item), _answer(item))
    images, labels = load_split("train")
    for number, (image, label) in enumerate(zip(to_rgb(images), labels, strict=True)):
        question, answer = questions(int(label))[number % len(questions(int(label)))]
        add(f"named_{number}", png(image), f"<image>\n{question}", answer)
    _write_lines(path, records)
    return path


def _question(item: Item) -> str:
    """What the user says in the item's prompt, with LLaVA's tag for the picture."""
    start, end = "User: ", "\n\nAssistant:"
    if not (item.prompt.startswith(start) and item.prompt.endswith(end)):
        raise ValueError(f"{item.id}: a prompt of another form: {item.prompt!r}")
    return item.prompt[len(start) : -len(end)].replace(IMAGE_PLACEHOLDER, "<image>")


def _answer(item: Item) -> str:
    return item.fields["answer"].capitalize()


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m examples.digits.tasks", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--split", default="held_out", choices=SPLITS, help="the pictures that are asked about")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True)
        write_tasks(args.out, args.split, args.seed)
    except (OSError, ValueError) as error:
        print_error(error)
        return 2
    print(f"written to {args.out}; ask them with python -m evals.main --tasks {','.join(ASKED)} --data {args.out} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
