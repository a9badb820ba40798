"""What the adapters of `examples.digits.tune` learn from."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from examples.digits import tune
from examples.digits.data import QUESTIONS, load_split


@pytest.mark.slow
def test_data(tmp_path):
    """Every digit as it is and mirrored, under captions that say so; and as many old questions as new ones."""
    files = tune.write_data(tmp_path / "data")
    _, labels = load_split("train")
    drawn = [json.loads(line) for line in files["mirrored"].read_text().splitlines()]
    assert len(drawn) == 4 * len(labels)
    assert all(one["caption"].endswith(", mirrored") == ("mirrored" in one["image"]) for one in drawn)
    judge = tune.Judge()
    for back, least, most in ((False, 0.95, 1.0), (True, 0.2, 0.6)):
        pictures = [np.asarray(Image.open(tmp_path / "data" / f"{i:04d}_0.png")) for i in range(len(labels))]
        seen = np.stack(pictures)[:, :, :: -1 if back else 1]
        assert least <= np.mean(judge.predict(seen) == labels) <= most, "a mirrored digit is not the digit"
    asked = [json.loads(line) for line in files["even"].read_text().splitlines()]
    answers = {}
    for one in asked:
        question, answer = (turn["value"] for turn in one["conversations"])
        answers.setdefault(question.removeprefix("<image>\n"), []).append((int(one["image"][:4]), answer))
    assert answers.keys() == {tune.EVEN, *(question for question, _ in QUESTIONS)}
    assert len(answers[tune.EVEN]) == len(labels) == len(asked) // 2
    assert all(answer == ("odd" if labels[i] % 2 else "even") for i, answer in answers[tune.EVEN])
