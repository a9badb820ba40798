"""GenEval's verdict: whether a picture shows the objects of its prompt, their number, colors and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from evals.generation.detector import CLIP, DETECTOR, ColorClassifier, Detector
from evals.generation.geneval import CLASSES, check_prompt, kept, verdict
from janus_jax.io.messages import did_you_mean, one_line
from train.rl.rewards.functions import Metadata, needs_torch


class GenEval:
    """1 for a picture that is right, 0 for any other, by the rules of `evals.generation.geneval`.

    The metadata of each picture are a line of GenEval's evaluation_metadata.jsonl: tag, include, exclude.

    Args:
      detector, clip: as `evals.main --detector --clip`: a Mask2Former and a CLIP of transformers, folders or hub ids.
    Raises: ValueError in one line if they cannot be loaded.
    """

    def __init__(self, detector: str = DETECTOR, clip: str = CLIP):
        needs_torch()
        self._detect, self._classify = Detector.load(detector), ColorClassifier.load(clip)

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `train.rl.rewards`; float64 [N]. ValueError for metadata that are not GenEval's."""
        rows = [_row(prompt, each) for prompt, each in zip(prompts, metadata, strict=True)]
        return np.array([self._right(picture, row) for picture, row in zip(pictures, rows, strict=True)], np.float64)

    def _right(self, picture: np.ndarray, row: Mapping[str, Any]) -> bool:
        image = Image.fromarray(picture)
        objects = kept(self._detect(image), row["tag"])
        return verdict(objects, row, lambda name, there: self._classify(image, name, there))[0]


def _row(prompt: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    row, place = {"prompt": prompt, **metadata}, f"the metadata of {one_line(prompt, 60)!r}"
    check_prompt(row, place)
    for clause in (*row["include"], *row.get("exclude", ())):
        if clause["class"] not in CLASSES:
            name = clause["class"]
            hint = did_you_mean(name, CLASSES)
            raise ValueError(f"{place} ask for {one_line(name)!r}, which the detector does not know{hint}")
    return row
