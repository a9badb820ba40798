"""GQA in its three formats, its prompts by protocol, and what replies score."""

from __future__ import annotations

import json

import pytest

from evals.tasks import TASKS
from tests.evals.made import base64_of, picture, stored, write_parquet, write_tsv

GQA = TASKS["gqa"]
# Answer, reply, and whether it is right: exactly, without punctuation, without a last period.
CASES = [
    ("yes", "yes", 1, 1, 1),
    ("yes", "Yes", 1, 1, 1),
    ("yes", "YES", 1, 1, 1),
    ("yes", " yes\n", 1, 1, 1),
    ("yes", "Yes.", 0, 1, 1),
    ("yes", "Yes...", 0, 1, 1),
    ("yes", "yes!", 0, 1, 0),
    ("yes", "yes,", 0, 1, 0),
    ("yes", '"Yes"', 0, 1, 0),
    ("yes", "**yes**", 0, 1, 0),
    ("yes", "yes, it is", 0, 0, 0),
    ("yes", "no", 0, 0, 0),
    ("yes", "", 0, 0, 0),
    ("yes", ".", 0, 0, 0),
    ("no", "no", 1, 1, 1),
    ("no", "No.", 0, 1, 1),
    ("no", "not", 0, 0, 0),
    ("t-shirt", "t-shirt", 1, 1, 1),
    ("t-shirt", "T-shirt.", 0, 1, 1),
    ("t-shirt", "tshirt", 0, 1, 0),
    ("t-shirt", "t shirt", 0, 0, 0),
    ("traffic light", "traffic light", 1, 1, 1),
    ("traffic light", "Traffic Light", 1, 1, 1),
    ("traffic light", "traffic  light", 0, 0, 0),
    ("traffic light", "traffic lights", 0, 0, 0),
    ("traffic light", "a traffic light", 0, 0, 0),
    ("couch", "sofa", 0, 0, 0),
    ("dog", "dogs", 0, 0, 0),
    ("dog", "Dog", 1, 1, 1),
    ("2", "2", 1, 1, 1),
    ("2", "2.", 0, 1, 1),
    ("2", "two", 0, 0, 0),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each case twice, the second time with a line break behind the reply."""
    rows = [
        {"index": n, "image": base64_of(n // 2), "question": f"What is {n}?", "answer": CASES[n % len(CASES)][0]}
        for n in range(2 * len(CASES))
    ]
    return write_tsv(tmp_path_factory.mktemp("gqa") / "GQA_TestDev_Balanced.tsv", rows).parent


WORD = "Answer the question using a single word or phrase."
PROMPTS = {
    "report": f"User: <image_placeholder>What is 0?\n{WORD}\n\nAssistant:",
    "vlmevalkit": f"User: <image_placeholder>What is 0?\n{WORD}\n\nAssistant:",
    "lmms-eval": f"User: <image_placeholder>\nWhat is 0?\n{WORD}\n\nAssistant:",
    "official": f"User: <image_placeholder>\nWhat is 0?\n{WORD}\n\nAssistant:",
}


@pytest.mark.parametrize("protocol", GQA.protocols)
def test_prompts(data, protocol):
    item = GQA.load(data, protocol).items[0]
    assert item.prompt == PROMPTS[protocol]
    assert item.max_new_tokens == {"lmms-eval": 16, "official": 128}.get(protocol, 2048)


@pytest.mark.parametrize(("protocol", "column"), [("report", 2), ("vlmevalkit", 2), ("lmms-eval", 3), ("official", 4)])
def test_verdicts_and_figures(data, protocol, column):
    items = GQA.load(data, protocol).items
    cases = CASES * 2
    ends = [""] * len(CASES) + ["\n"] * len(CASES)
    predictions = {item.id: case[1] + end for item, case, end in zip(items, cases, ends, strict=True)}
    scores = GQA.score(items, predictions, protocol)
    assert [scores.verdicts[item.id].score for item in items] == [case[column] for case in cases]
    values = [scores.numbers[name].value for name in list(scores.numbers)[:3]]
    assert values == pytest.approx([100 * 10 / 32, 100 * 20 / 32, 100 * 15 / 32])
    assert scores.numbers[scores.headline].value == values[column - 2]
    assert all(number.count == 64 for number in scores.numbers.values())


def test_verdicts_say_what_was_compared(data):
    items = GQA.load(data, "official").items[:3]
    scores = GQA.score(items, {"0": "Yes.", "1": "No!", "2": None}, "official")
    assert [scores.verdicts[name].extracted for name in "012"] == ["yes", "no!", ""]
    assert scores.verdicts["2"].outcome == "wrong"
    assert json.loads(
        GQA.export(items[:2], {"0": "Yes.", "1": "No!"}, "official")["testdev_balanced_predictions.json"]
    ) == [
        {"questionId": "0", "prediction": "yes"},
        {"questionId": "1", "prediction": "no!"},
    ]


def test_the_official_file(tmp_path):
    (tmp_path / "gqa" / "images").mkdir(parents=True)
    (tmp_path / "gqa" / "questions").mkdir()
    (tmp_path / "gqa" / "images" / "n12.jpg").write_bytes(picture(1))
    question = {"question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is.", "isBalanced": True}
    types = {"structural": "verify", "semantic": "attr", "detailed": ["verify", "Attr"]}
    rows = {
        "20110": {**question, "imageId": "n12", "types": types},
        "20111": {**question, "imageId": "n12", "types": {**types, "structural": "query"}, "answer": "no"},
        "20112": {**question, "imageId": "n13"},
    }
    path = tmp_path / "gqa" / "questions" / "testdev_balanced_questions.json"
    path.write_text(json.dumps(rows))
    loaded = GQA.load(tmp_path, "report")
    assert loaded.items[0].images[0].read() == picture(1)
    assert loaded.problems[0].reason.endswith("gqa/images/n13.jpg is missing")
    numbers = GQA.score(loaded.items, {"20110": "yes", "20111": "yes"}, "report").numbers
    assert [numbers[name].value for name in ("structural verify", "structural query", "semantic attr")] == [100, 0, 50]
    path.write_text('{"1": {"question": "Q", "answer": "a"}}')
    with pytest.raises(ValueError, match=r"testdev_balanced_questions.json: the question 1 has no imageId"):
        GQA.load(tmp_path, "report")


def test_the_hubs_parquet(tmp_path):
    folder = tmp_path / "lmms-lab___GQA"
    rows = [
        {"id": str(n), "imageId": image, "question": "What is 0?", "answer": "a", "fullAnswer": "A."}
        for n, image in enumerate(("n1", "n1", "n2"))
    ]
    write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    with pytest.raises(ValueError, match="has no testdev_balanced_images beside it"):
        GQA.load(tmp_path, "lmms-eval")
    write_parquet(folder / "testdev_balanced_images" / "testdev-0.parquet", [{"id": "n1", "image": stored(1)}])
    loaded = GQA.load(tmp_path, "lmms-eval")
    assert [item.prompt for item in loaded.items] == [PROMPTS["lmms-eval"]] * 2
    assert loaded.items[1].images[0].read() == picture(1)
    assert "refers to the picture n2, which is not there" in loaded.problems[0].reason
