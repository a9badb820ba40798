"""The judge of generated digits: a classifier that has seen nothing of the images that it is itself judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evals.generation.geneval import Detection, box_of
from examples.digits.data import IMAGE_SIZE, SHIFTS, WORDS, load_split, shifted, to_rgb

_INK = 64  # gray level above which a pixel is of a digit


class Judge:
    """A support vector machine on the 8 x 8 average pool of images; fitted when made, in seconds.

    It sees the training images at every shift, as the model that it is to judge does: without them it takes a digit
    that stands a pixel aside for another one.

    Args:
      splits: what it is fitted on.
      size: of the images that it judges, in pixels a side: a multiple of 8.
    """

    def __init__(self, splits: Sequence[str] = ("train",), size: int = IMAGE_SIZE):
        from sklearn.svm import SVC

        images, labels = load_split(*splits)
        self._size = size
        self._svm: Any = SVC(C=3, gamma=0.3)
        self._svm.fit(_features(to_rgb(shifted(images), size), size), np.tile(labels, len(SHIFTS)))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Labels [N] of uint8 images [N, size, size, 3]; ValueError for others."""
        return self._svm.predict(_features(images, self._size))

    def detect(self, image: Image.Image) -> dict[str, list[Detection]]:
        """As a detector of GenEval: the one digit that it takes `image` for, by name, where there is ink."""
        pixels = np.asarray(image.convert("RGB"))
        mask = pixels.mean(-1) > _INK
        return {WORDS[int(self.predict(pixels[None])[0])]: [Detection(box_of(mask), 1.0, mask)]}

    def accuracy(self, split: str) -> float:
        """Share of a split's own images that are recognized."""
        images, labels = load_split(split)
        return float(np.mean(self.predict(to_rgb(images, self._size)) == labels))


def _features(images: np.ndarray, size: int) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"the judge takes uint8 [N, {size}, {size}, 3], not {images.dtype} {images.shape}")
    pooled = images.astype(np.float64).reshape(len(images), 8, size // 8, 8, size // 8, 3).mean((2, 4, 5))
    return pooled.reshape(len(images), 64) / 255
