"""GenEval's verdict as a reward, by a detector that knows what is in the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from evals.generation import detector
from evals.generation.geneval import Detection
from train.rl.config import RewardConfig
from train.rl.rewards import Rewards
from train.rl.rewards.geneval import GenEval

pytest.importorskip("transformers")

RED_CAT = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
TWO_DOGS = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 2}],
    "exclude": [{"class": "dog", "count": 3}],
}


class Detector:
    """As many dogs as a picture's first value says, and a cat in every one."""

    def __call__(self, image):
        count = np.asarray(image)[0, 0, 0]
        return {"dog": [Detection((0, 0, 4, 4), 0.95)] * count, "cat": [Detection((0, 0, 4, 4), 0.5)]}


class Classifier:
    """Red where a picture's second value is high."""

    def __call__(self, image, name, objects):
        return ["red" if np.asarray(image)[0, 0, 1] > 100 else "blue"] * len(objects)


@pytest.fixture
def known(monkeypatch):
    asked = []
    monkeypatch.setattr(detector.Detector, "load", lambda name: asked.append(name) or Detector())
    monkeypatch.setattr(detector.ColorClassifier, "load", lambda name: asked.append(name) or Classifier())
    return asked


def picture(dogs, green):
    return np.broadcast_to(np.array([dogs, green, 0], np.uint8), (8, 8, 3))


def test_verdicts(known):
    pictures = np.stack([picture(0, 200), picture(0, 50), picture(2, 0), picture(3, 0), picture(1, 0)])
    metadata = [RED_CAT, RED_CAT, TWO_DOGS, TWO_DOGS, TWO_DOGS]
    found = GenEval("d", "c")(pictures, ["x"] * 5, metadata)
    np.testing.assert_array_equal(found, [1, 0, 1, 0, 0])
    assert found.dtype == np.float64 and known == ["d", "c"]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "the metadata of 'a cat': it has no tag, include"),
        (RED_CAT | {"include": [{"class": "katze", "count": 1}]}, "ask for 'katze', which the detector does not know"),
        (RED_CAT | {"include": [{"class": "cta", "count": 1}]}, "did you mean cat?"),
    ],
)
def test_metadata_that_are_not_genevals(known, metadata, said):
    made = RewardConfig("train.rl.rewards.geneval:GenEval", options=("detector=d", "clip=c"), workers=0, tries=1)
    with Rewards([made]) as rewards, pytest.raises(ValueError) as error:
        rewards.result(rewards.start(picture(1, 1)[None], ["a cat"], [metadata]))
    assert str(error.value).startswith("reward GenEval has not scored any picture: the metadata of 'a cat'")
    assert said in str(error.value)
