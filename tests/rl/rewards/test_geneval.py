"""GenEval's verdict as a reward: by a detector that knows what is in the pictures, and by random ones of evals."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from evals.generation import detector
from evals.generation.detector import ColorClassifier
from evals.generation.geneval import Detection, verdict
from evals.tasks.geneval import seen
from tests.evals.generation.test_detector import clip, mask2former, small  # noqa: F401
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


@pytest.mark.slow
def test_as_evals_sees_it(mask2former, clip, small, tmp_path, monkeypatch):
    """Small random models, from folders: the verdict is that on what `evals` writes down of the same pictures."""
    mask2former.save_pretrained(tmp_path / "detector")
    pictures = np.random.default_rng(2).integers(0, 256, (2, 24, 24, 3), np.uint8)
    # Random weights are never sure: of what they see, everything counts.
    monkeypatch.setattr("evals.generation.geneval.Thresholds.__init__.__defaults__", (0.0, 0.0, 16, 1.0, 0.1))
    reward = GenEval(str(tmp_path / "detector"), str(clip))
    detect, classify = detector.Detector.load(str(tmp_path / "detector")), ColorClassifier.load(str(clip))
    (name, *_) = detect(Image.fromarray(pictures[0]))
    clauses = [{"class": name, "count": 1}, {"class": name, "count": 90}]
    clauses += [{"class": name, "count": 1, "color": color} for color in ("red", "white")]
    found, expected = [], []
    for clause in clauses:
        row = {"tag": "colors", "prompt": "x", "include": [clause]}
        found.append(reward(pictures, ["x"] * 2, [row] * 2).tolist())
        expected.append([])
        for picture in pictures:
            image = Image.fromarray(picture)
            told = json.loads(seen(row, detect(image), lambda *asked, image=image: classify(image, *asked)))
            there = {key: [Detection(tuple(box), score) for *box, score in own] for key, own in told["objects"].items()}
            right, _ = verdict(there, row, lambda key, own, told=told: told["colors"][key][: len(own)])
            expected[-1].append(float(right))
    assert found == expected and found[0][0] == 1 and found[1] == [0, 0]
