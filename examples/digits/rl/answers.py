"""Questions about dark pictures of digits, which the trained model reads badly, and how many of them it gets right."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

import janus_jax
from examples.digits.data import QUESTIONS, load_split, png, questions, to_rgb
from examples.digits.rl.config import QUESTIONS as NAME
from examples.digits.rl.config import DigitsRlConfig

REWARDED = 3  # of the wordings of a question; the others are only asked afterwards


def pictures(brightness: float, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 pictures [N, 16, 16, 3] of `splits`, darker by the factor `brightness`, and their digits [N]."""
    images, labels = load_split(*splits)
    return (to_rgb(images) * brightness).astype(np.uint8), labels


def write_questions(config: DigitsRlConfig) -> None:
    """Writes the training pictures with one rewarded question each, and its right answer."""
    folder = config.questions
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(config.seed), []
    for number, (picture, label) in enumerate(zip(*pictures(config.dark, "train"), strict=True)):
        name = f"images/{number:04d}.png"
        (folder / name).write_bytes(png(picture))
        question, answer = questions(int(label))[rng.integers(REWARDED)]
        lines.append({"prompt": question, "images": name, "answer": answer})
    (folder / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def right_answers(model: pathlib.Path, brightness: float) -> dict[str, float]:
    """Shares of right answers, taken greedily, about pictures that no training has seen.

    'rewarded' and 'other_wording' are of dark pictures, by whether the wording is among the rewarded ones; 'bright' is
    of all wordings about the same pictures as they were trained on.
    """
    janus = janus_jax.load(model, dtype="float32", progress=False)

    def share(factor: float, wordings: Sequence[int]) -> float:
        images, labels = pictures(factor, "held_out")
        asked = [
            (image, *questions(int(label))[i]) for image, label in zip(images, labels, strict=True) for i in wordings
        ]
        given = janus.chat_batch([question for _, question, _ in asked], [[image] for image, *_ in asked], 16)
        return float(np.mean([said == right for said, (*_, right) in zip(given, asked, strict=True)]))

    every = range(len(QUESTIONS))
    return {
        "rewarded": share(brightness, every[:REWARDED]),
        "other_wording": share(brightness, every[REWARDED:]),
        "bright": share(1.0, every),
    }
