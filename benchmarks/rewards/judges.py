"""Rewards that take a known time: one waits, as for a judge elsewhere, and one computes on a core."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from train.rl.rewards.functions import Metadata


def waits(pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata, *, seconds: float) -> np.ndarray:
    """The mean of each picture, after `seconds` for each in which nothing is computed."""
    time.sleep(seconds * len(pictures))
    return pictures.reshape(len(pictures), -1).mean(axis=1)


def computes(pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata, *, seconds: float) -> np.ndarray:
    """The same after `seconds` of a core for each picture, half of them in Python's own loop."""
    end = time.thread_time() + seconds * len(pictures)
    while time.thread_time() < end:
        np.sort(pictures, axis=None)  # outside of Python's lock
        sum(range(20_000))
    return pictures.reshape(len(pictures), -1).mean(axis=1)
