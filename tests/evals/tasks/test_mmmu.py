"""MMMU in its two formats, its prompts by protocol, and what replies score."""

from __future__ import annotations

import json
import random

import pytest

from evals.tasks import TASKS
from tests.evals.made import LETTER_REPLIES, OPTIONS, base64_of, picture, stored, write_parquet, write_tsv
from tests.evals.test_mmmu_rules import LETTERS, OPEN

MMMU = TASKS["mmmu"]
SUBJECTS = ("Art", "Accounting", "Finance", "Math")
DISCIPLINES = ("Art and Design", "Business", "Business", "Science")
# Gold and reply of an open question, and what VLMEvalKit makes of it: the gold as option A, or other answers.
KIT_OPEN = [
    ("24/7", "24/7", True),
    ("24/7", "It is 24/7", True),
    ("24/7", "A", True),
    ("24/7", "The answer is A", True),
    ("24/7", "B", False),
    ("24/7", "24", False),
    # 34 characters are twice what the gold and the words "Other Answers" have.
    ("24/7", "It is open 24/7 all through the ye", True),
    ("24/7", "It is open 24/7 all through the yea", False),
    ("Paris", "paris", True),
    ("Paris", "", False),
    ("D", "D", False),
    ("['1', 'one']", "one", False),
]


@pytest.fixture(scope="module")
def rows():
    found = []
    for number, case in enumerate(LETTER_REPLIES * 2):
        letter = case[1] if case[1] in OPTIONS else "C"
        cells = {"question": f"What is {number} in <image 1>?", **OPTIONS, "answer": letter, "split": "validation"}
        found.append(cells | {"category": SUBJECTS[number % 4], "l2-category": DISCIPLINES[number % 4]})
    for gold, _, _ in KIT_OPEN:
        cells = {"question": "What is it?", "answer": gold, "split": "validation"}
        found.append(cells | {"category": "Music", "l2-category": "Art and Design"})
    found.append({**found[0], "split": "dev"})
    for number, row in enumerate(found):
        row |= {"index": number, "image": str([base64_of(number), base64_of(3)]) if number == 1 else base64_of(number)}
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write_tsv(tmp_path_factory.mktemp("mmmu") / "MMMU_DEV_VAL.tsv", rows).parent


LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
LINES = "A. cat\nB. dog\nC. blue bird\nD. fish"
BRACKETS = "(A) cat\n(B) dog\n(C) blue bird\n(D) fish"
# Of the second question, which has two pictures in VLMEvalKit's table; of an open one.
PROMPTS = {
    "report": (
        f"User: <image_placeholder><image_placeholder>\nWhat is 1 in <image 1>?\n{LINES}\n\n{LETTER}\n\nAssistant:",
        "User: <image_placeholder>\nWhat is it?\nAnswer the question directly.\n\nAssistant:",
    ),
    "lmms-eval": (
        f"User: <image_placeholder>\nWhat is 1 in <image 1>?\n{LINES}\n\n{LETTER}\n\nAssistant:",
        f"User: <image_placeholder>\nWhat is it?\n\n{WORD}\n\nAssistant:",
    ),
    "official": (
        f"User: <image_placeholder>\nWhat is 1 in <image 1>?\n\n{BRACKETS}\n\n{LETTER}\n\nAssistant:",
        f"User: <image_placeholder>\nWhat is it?\n\n{WORD}\n\nAssistant:",
    ),
}
PROMPTS["vlmevalkit"] = PROMPTS["report"]


@pytest.mark.parametrize("protocol", MMMU.protocols)
def test_prompts(data, protocol):
    loaded = MMMU.load(data, protocol)
    assert (loaded.items[1].prompt, loaded.items[70].prompt) == PROMPTS[protocol]
    assert loaded.items[1].images[0].read() == picture(1)
    assert loaded.items[1].max_new_tokens == (2048 if protocol in ("report", "vlmevalkit") else 128)
    # The authors evaluated the validation split alone.
    assert len(loaded.items) == (83 if protocol == "vlmevalkit" else 82)
    assert ("without 1 of other splits" in loaded.source) == (protocol != "vlmevalkit")


def test_verdicts_and_figures_by_vlmevalkits_rules(data, rows):
    items = MMMU.load(data, "vlmevalkit").items
    replies = [case[0] for case in LETTER_REPLIES * 2] + [case[1] for case in KIT_OPEN] + ["A"]
    scores = MMMU.score(items, {item.id: reply for item, reply in zip(items, replies, strict=True)}, "vlmevalkit")
    said = [scores.verdicts[item.id].extracted for item in items]
    assert said[:70] == [case[1] for case in LETTER_REPLIES * 2]
    right = [scores.verdicts[item.id].outcome == "right" for item in items]
    assert right[70:82] == [case[2] for case in KIT_OPEN]
    # As in the test of MMBench, 21 of 35 replies are letters; 6 of the 12 open ones are right.
    assert sum(right[:70]) == 42 and sum(right[70:82]) == 6
    numbers = scores.numbers
    assert numbers["validation"].value == pytest.approx(100 * 48 / 82) and numbers["validation"].count == 82
    assert (numbers["dev"].value, numbers["dev"].count) == (100, 1)
    assert (numbers["multiple-choice"].value, numbers["open"].value) == (60, 50)
    for subject in (*SUBJECTS, "Music"):
        some = [value for value, row in zip(right[:82], rows, strict=False) if row["category"] == subject]
        assert numbers[subject].value == pytest.approx(100 * sum(some) / len(some))
    for discipline in ("Art and Design", "Business", "Science"):
        some = [value for value, row in zip(right[:82], rows, strict=False) if row["l2-category"] == discipline]
        assert numbers[discipline].value == pytest.approx(100 * sum(some) / len(some))
        assert numbers[discipline].count == len(some)
    assert MMMU.score(items[:1], {"0": "A"}, "report").published["Janus-Pro-7B"] == 41.0


def test_a_judge_reads_what_the_rules_do_not(data):
    items = MMMU.load(data, "report").items
    predictions = {"70": "always open", "0": "hm", "1": "B"}
    requests = MMMU.judge_requests(items, predictions, "report")
    assert [request.id for request in requests] == ["0", "70"]
    text = requests[1].attempts[0].messages[0]["content"]
    assert "Options: There are several options: \nA. 24/7\nB. Other Answers\n\nAnswer: always open" in text
    scores = MMMU.score(items, predictions, "report", {"70": "A"})
    assert [scores.verdicts[name].outcome for name in ("70", "0", "1")] == ["right", "unjudged", "right"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    options = "['a cat', 'a dog', 'a blue bird', 'a fish']"
    base = {"explanation": "", "img_type": "['Photographs']", "topic_difficulty": "Easy", "subfield": "Any"}
    for subject, number in (("Art_Theory", 1), ("Math", 2)):
        rows = [
            {"id": f"validation_{subject}_{n}", "question": f"Which of <image 1> and <image 3> is {n}?", **base}
            | {"options": options, "answer": "ABCD"[n % 4], "question_type": "multiple-choice"}
            | {"image_1": stored(number), "image_2": stored(9) if n == 0 else None, "image_3": stored(8)}
            for n in range(15)
        ]
        for gold, _, _ in OPEN[:18] if subject == "Math" else OPEN[18:]:
            row = {"id": f"validation_{subject}_{len(rows)}", "question": "How much?", **base, "options": "[]"}
            row |= {"answer": str(gold), "question_type": "open", "image_1": stored(7)}
            rows.append(row)
        write_parquet(folder / "MMMU" / subject / "validation-00000-of-00001.parquet", rows)
        write_parquet(folder / "MMMU" / subject / "dev-00000-of-00001.parquet", rows[:1])
    return folder


def test_the_hubs_parquet(hub):
    items = {item.id: item for item in MMMU.load(hub, "lmms-eval").items}
    assert len(items) == 30 + len(OPEN)
    item = items["validation_Art_Theory_0"]
    assert [image.read() for image in item.images] == [picture(1), picture(8)]
    assert item.fields["discipline"] == "Art and Design" and item.fields["category"] == "Art_Theory"
    assert item.prompt == (
        "User: <image_placeholder><image_placeholder>\nWhich of <image 1> and <image 3> is 0?\n"
        f"A. a cat\nB. a dog\nC. a blue bird\nD. a fish\n\n{LETTER}\n\nAssistant:"
    )
    kit = {item.id: item for item in MMMU.load(hub, "report").items}
    assert [image.read() for image in kit[item.id].images] == [picture(1), picture(9), picture(8)]
    assert len(kit["validation_Art_Theory_1"].images) == 2


@pytest.mark.parametrize(("protocol", "column", "seed"), [("official", 1, 42), ("lmms-eval", 2, 0)])
def test_verdicts_and_figures_by_mmmus_rules(hub, protocol, column, seed):
    """All cases of letters and of open replies, at once: chance is drawn in the order of the questions."""
    items = MMMU.load(hub, protocol).items
    choices = [item for item in items if item.fields["kind"] == "multiple-choice"]
    opens = [item for item in items if item.fields["kind"] == "open"]
    cases = OPEN[18:] + OPEN[:18]
    predictions = {item.id: case[0] for item, case in zip(choices, LETTERS, strict=True)}
    predictions |= {item.id: case[1] for item, case in zip(opens, cases, strict=True)}
    scores = MMMU.score(items, predictions, protocol)
    chance = random.Random(seed)
    said = [case[column] if isinstance(case[column], str) else chance.choice("ABCD") for case in LETTERS]
    assert [scores.verdicts[item.id].extracted for item in choices] == said
    right = [one == item.fields["answer"] for one, item in zip(said, choices, strict=True)]
    assert [scores.verdicts[item.id].outcome == "right" for item in choices] == right
    assert [scores.verdicts[item.id].outcome == "right" for item in opens] == [case[2] for case in cases]
    total = sum(right) + sum(case[2] for case in cases)
    assert scores.numbers["validation"].value == pytest.approx(100 * total / len(items))
    drawn = sum(isinstance(case[column], tuple) for case in LETTERS)
    assert scores.notes == [f"{drawn} letters are drawn by chance, with seed {seed}"]
    assert list(scores.numbers) == [
        *("validation", "multiple-choice", "open", "Art and Design", "Science", "Art_Theory", "Math"),
    ]


def test_export(hub):
    items = MMMU.load(hub, "official").items
    names = ["validation_Art_Theory_0", "validation_Math_15", "validation_Art_Theory_1"]
    predictions = dict(zip(names, ["The answer is (B)", "It is open 24/7", None], strict=True))
    (text,) = MMMU.export([item for item in items if item.id in names], predictions, "official").values()
    assert json.loads(text) == dict(zip(names, ["B", "It is open 24/7", ""], strict=True))


def test_bad_input(tmp_path):
    row = {"index": 1, "question": "Q", "answer": "E", "category": "Art", "split": "validation", **OPTIONS}
    rows = [row | {"image": base64_of(1)}, row | {"index": 2, "answer": "NA"}, row | {"index": 3, "answer": "A"}]
    loaded = MMMU.load(write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows).parent, "report")
    problems = [problem.reason for problem in loaded.problems]
    assert problems[:2] == ["its answer 'E' is none of its options A, B, C, D", "it has no answer"]
    assert problems[2].endswith("MMMU_DEV_VAL.tsv:4 has no picture")
    write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", [{k: v for k, v in row.items() if k != "split"} | {"image": "x"}])
    with pytest.raises(ValueError, match="has no column split"):
        MMMU.load(tmp_path, "report")
