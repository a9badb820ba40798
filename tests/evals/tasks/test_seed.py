"""SEED-Bench in its three formats, its prompts by protocol, and what replies score."""

from __future__ import annotations

import json

import pytest

from evals.tasks import TASKS
from evals.tasks.seed import TYPES
from tests.evals.made import LETTER_REPLIES, OPTIONS, base64_of, picture, stored, write_parquet, write_tsv

SEED = TASKS["seed"]
COLUMN = {"report": 1, "vlmevalkit": 1, "lmms-eval": 3}


@pytest.fixture(scope="module")
def rows():
    """Each reply to a question whose answer is the letter that VLMEvalKit finds, and to one with the next."""
    found = []
    for number in range(2 * len(LETTER_REPLIES)):
        letter = LETTER_REPLIES[number // 2][1]
        letter = letter if letter in OPTIONS else "C"
        answer = "ABCD"[("ABCD".index(letter) + number % 2) % 4]
        row = {"index": number, "image": base64_of(number // 3), "question": f"What is {number}?", **OPTIONS}
        found.append({**row, "answer": answer, "category": TYPES[number % 9]})
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seed")
    write_tsv(folder / "SEEDBench_IMG.tsv", rows)
    return folder


LETTER = "Answer with the option's letter from the given choices directly."
LINES = "A. cat\nB. dog\nC. blue bird\nD. fish"
PROMPTS = {
    "report": f"User: <image_placeholder>\nWhat is 0?\n{LINES}\n\n{LETTER}\n\nAssistant:",
    "vlmevalkit": f"User: <image_placeholder>\nWhat is 0?\n{LINES}\n\n{LETTER}\n\nAssistant:",
    "lmms-eval": f"User: <image_placeholder>\nWhat is 0?\n{LINES}\n{LETTER}\n\nAssistant:",
}


@pytest.mark.parametrize("protocol", SEED.protocols)
def test_prompts(data, protocol):
    items = SEED.load(data, protocol).items
    assert items[0].prompt == PROMPTS[protocol]
    assert items[0].images[0].key == items[2].images[0].key != items[3].images[0].key


@pytest.mark.parametrize("protocol", SEED.protocols)
def test_verdicts_and_figures(data, rows, protocol):
    items = SEED.load(data, protocol).items
    cases = [case for case in LETTER_REPLIES for _ in (0, 1)]
    scores = SEED.score(items, {item.id: case[0] for item, case in zip(items, cases, strict=True)}, protocol)
    said = [case[COLUMN[protocol]] for case in cases]
    assert [scores.verdicts[item.id].extracted for item in items] == said
    right = [one == row["answer"] for one, row in zip(said, rows, strict=True)]
    assert [scores.verdicts[item.id].outcome == "right" for item in items] == right
    assert scores.numbers["accuracy"].value == pytest.approx(100 * sum(right) / 70)
    assert list(scores.numbers) == ["accuracy", *TYPES]
    for number, name in enumerate(TYPES):
        some = [value for n, value in enumerate(right) if n % 9 == number]
        assert scores.numbers[name].value == pytest.approx(100 * sum(some) / len(some))
    if protocol == "report":
        assert sum(right) == 21
        assert scores.published == {"Janus": 63.7, "Janus-Pro-1B": 68.3, "Janus-Pro-7B": 72.1}


def test_the_official_file(tmp_path):
    folder = tmp_path / "SEED-Bench"
    (folder / "SEED-Bench-image").mkdir(parents=True)
    (folder / "SEED-Bench-image" / "12_34").write_bytes(picture(1))
    (folder / "SEED-Bench-image" / "56_78.jpg").write_bytes(picture(2))
    question = {"answer": "B", "choice_a": "cat", "choice_b": "dog", "choice_c": "blue bird", "choice_d": "fish"}
    question |= {"data_type": "image", "question": "What is it?"}
    rows = [
        {**question, "question_id": "101", "data_id": "12_34", "question_type_id": 1},
        {**question, "question_id": "102", "data_id": "56_78", "question_type_id": 9},
        {**question, "question_id": "103", "data_id": "video.webm", "data_type": "video", "question_type_id": 10},
        {**question, "question_id": "104", "data_id": "90_12", "question_type_id": 5},
    ]
    path = folder / "SEED-Bench.json"
    path.write_text(json.dumps({"questions": rows, "question_type": {"Scene Understanding": 1}}))
    loaded = SEED.load(tmp_path, "report")
    assert loaded.source.endswith(
        "SEED-Bench.json (without 1 questions about videos): 2 questions, 1 more cannot be asked"
    )
    assert [item.images[0].read() for item in loaded.items] == [picture(1), picture(2)]
    assert loaded.problems[0].id == "104" and loaded.problems[0].reason.endswith("SEED-Bench-image/90_12 is missing")
    numbers = SEED.score(loaded.items, {"101": "B", "102": "cat"}, "report").numbers
    assert (numbers["Scene Understanding"].value, numbers["Text Understanding"].value) == (100, 0)
    path.write_text(json.dumps({"questions": [{"answer": "A"}]}))
    with pytest.raises(ValueError, match=r"SEED-Bench.json: question 0 has no choice_a, data_id, data_type, question"):
        SEED.load(tmp_path, "report")


def test_the_hubs_parquet(tmp_path):
    row = {"answer": "B", "choice_a": "cat", "choice_b": "dog", "choice_c": "blue bird", "choice_d": "fish"}
    row |= {"data_type": "image", "question": "What is 0?", "question_id": "1", "image": [stored(1)]}
    rows = [row, {**row, "question_id": "2", "data_type": "video", "image": [stored(2)] * 8}]
    write_parquet(tmp_path / "SEED-Bench" / "data" / "test-00000-of-00001.parquet", rows)
    (item,) = SEED.load(tmp_path, "lmms-eval").items
    assert item.prompt == PROMPTS["lmms-eval"] and item.images[0].read() == picture(1)
    assert SEED.score([item], {"1": "b. the dog"}, "lmms-eval").numbers["accuracy"].value == 100
