"""Judges of drawn digits as rewards, and one of another kind that nothing is rewarded by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.digits.data import SHIFTS, load_split, shifted, to_rgb
from examples.digits.judge import Judge

_SPLITS = ("train", "validation")


class Recognized:
    """The reward: 1 for a picture that the judge takes for the digit that its prompt asks for, else 0."""

    def __init__(self):
        self._judge = Judge(_SPLITS)

    def __call__(
        self, pictures: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        return self.right(pictures, [each["digit"] for each in metadata])

    def right(self, pictures: np.ndarray, digits: Sequence[int]) -> np.ndarray:
        """Float64 [N], 1 or 0."""
        if not len(pictures):
            return np.zeros(0)
        return (self._judge.predict(pictures) == np.asarray(digits)).astype(np.float64)


class Neighbors:
    """A judge of another kind: the vote of the three nearest training images, at every shift."""

    def __init__(self):
        from sklearn.neighbors import KNeighborsClassifier

        images, labels = load_split(*_SPLITS)
        self._nearest = KNeighborsClassifier(3).fit(
            self._features(to_rgb(shifted(images))), np.tile(labels, len(SHIFTS))
        )

    def right(self, pictures: np.ndarray, digits: Sequence[int]) -> np.ndarray:
        """Float64 [N], 1 or 0."""
        return (self._nearest.predict(self._features(pictures)) == np.asarray(digits)).astype(np.float64)

    @staticmethod
    def _features(pictures: np.ndarray) -> np.ndarray:
        return pictures.astype(np.float32).reshape(len(pictures), 8, 2, 8, 2, 3).mean((2, 4, 5)).reshape(-1, 64)
