"""Rewards of users, of all sorts: named by import path, and called in worker processes too."""

from __future__ import annotations

import os
import pathlib
import time

import numpy as np


def first_value(pictures, prompts, metadata):
    """Each picture's first value, so that one sees which number is whose."""
    return [float(picture[0, 0, 0]) for picture in pictures]


def lengths(pictures, prompts, metadata, *, scale=1.0, key="extra"):
    """Of the prompts, and what the metadata say."""
    return np.array([len(prompt) for prompt in prompts]) * scale + np.array([each.get(key, 0) for each in metadata])


def stamped(pictures, prompts, metadata):
    """Each picture's first value, and a thousand times the process that is asked; on a CPU."""
    import jax

    time.sleep(0.05)
    return [
        float(picture[0, 0, 0]) + 1000 * os.getpid() if jax.default_backend() == "cpu" else -1.0 for picture in pictures
    ]


def broken(pictures, prompts, metadata):
    raise ZeroDivisionError("no pictures\nare good")


def short(pictures, prompts, metadata):
    return [1.0]


def text(pictures, prompts, metadata):
    return ["good"] * len(pictures)


def not_finite(pictures, prompts, metadata):
    """NaN for pictures that begin with 1, infinite for 2."""
    return [{1: np.nan, 2: np.inf}.get(int(p[0, 0, 0]), float(p[0, 0, 0])) for p in pictures]


class Flaky:
    """Fails as it is told, as often as it is told: `count` is a file's length, which other processes see too."""

    def __init__(self, file, times, how="raise"):
        self._file, self._times, self._how = pathlib.Path(file), times, how

    def __call__(self, pictures, prompts, metadata):
        with open(self._file, "ab") as file:
            file.write(b"x")
            if file.tell() > self._times:
                return [7.0] * len(pictures)
        if self._how == "die":
            os.kill(os.getpid(), 9)
        if self._how == "sleep":
            time.sleep(100)
        raise OSError("the judge is away")


class NoModel:
    def __init__(self, model):
        raise ValueError(f"{model} cannot be loaded")

    def __call__(self, pictures, prompts, metadata):
        return [0.0] * len(pictures)


not_called = 3


def answer_lengths(answers, prompts, metadata):
    """Of answers, in letters."""
    return [float(len(answer)) for answer in answers]
