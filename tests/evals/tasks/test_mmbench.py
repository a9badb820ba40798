"""MMBench in its two formats, its prompts by protocol, and its three figures."""

from __future__ import annotations

import random

import pytest

from evals.tasks import TASKS
from tests.evals.made import LETTER_REPLIES, OPTIONS, base64_of, picture, stored, write_parquet, write_tsv

MMBENCH = TASKS["mmbench"]
COLUMN = {"report": 1, "vlmevalkit": 1, "lmms-eval": 2}
ABILITIES = ("coarse_perception", "logic_reasoning", "finegrained_perception (cross-instance)")


def answer_of(case, other=0):
    """What the reply is taken to mean by VLMEvalKit, if that is an option; another one with `other`."""
    letter = case[1] if case[1] in OPTIONS else "D"
    return "ABCD"[("ABCD".index(letter) + other) % 4]


@pytest.fixture(scope="module")
def rows():
    """35 questions and one rotated copy of each, whose reply is the next one; a third of the copies is wrong."""
    found = []
    for number, case in enumerate(LETTER_REPLIES):
        cells = {"question": f"What is {number}?", "hint": f"Hint {number}." if number % 2 else "", **OPTIONS}
        cells |= {"category": f"category {number % 4}", "l2-category": ABILITIES[number % 3], "split": "dev"}
        following = LETTER_REPLIES[(number + 1) % len(LETTER_REPLIES)]
        found.append({"index": number, "image": base64_of(number), **cells, "answer": answer_of(case)})
        copy = {"index": number + 1_000_000, "image": str(number), "answer": answer_of(following, number % 3 == 0)}
        found.append(cells | copy)
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmbench")
    write_tsv(folder / "MMBench_DEV_EN.tsv", rows)
    return folder


LETTER = "Answer with the option's letter from the given choices directly."
LINES = "A. cat\nB. dog\nC. blue bird\nD. fish"
PROMPTS = {
    "report": [
        f"User: <image_placeholder>\nWhat is 0?\n{LINES}\n\n{LETTER}\n\nAssistant:",
        f"User: <image_placeholder>\nHint: Hint 1.\nWhat is 1?\n{LINES}\n\n{LETTER}\n\nAssistant:",
    ],
    "lmms-eval": [
        f"User: <image_placeholder>\nWhat is 0? There are several options:\n{LINES}\n\n{LETTER}\n\nAssistant:",
        f"User: <image_placeholder>\nHint 1. What is 1? There are several options:\n{LINES}\n\n{LETTER}\n\nAssistant:",
    ],
}
PROMPTS["vlmevalkit"] = PROMPTS["report"]


@pytest.mark.parametrize("protocol", MMBENCH.protocols)
def test_prompts(data, protocol):
    items = MMBENCH.load(data, protocol).items
    assert [items[0].prompt, items[2].prompt] == PROMPTS[protocol]
    assert items[1].group == items[0].group == items[0].id == "0"
    assert items[1].images[0].read() == picture(0)


@pytest.mark.parametrize("protocol", MMBENCH.protocols)
def test_verdicts_and_figures(data, rows, protocol):
    items = MMBENCH.load(data, protocol).items
    cases = [LETTER_REPLIES[(n + k) % len(LETTER_REPLIES)] for n in range(len(LETTER_REPLIES)) for k in (0, 1)]
    predictions = {item.id: case[0] for item, case in zip(items, cases, strict=True)}
    scores = MMBENCH.score(items, predictions, protocol)
    said = [scores.verdicts[item.id].extracted for item in items]
    expected = [case[COLUMN[protocol]] for case in cases]
    # lmms-eval draws letters where it finds none, see below.
    assert [one for one, other in zip(said, expected, strict=True) if other or protocol != "lmms-eval"] == [
        other for other in expected if other or protocol != "lmms-eval"
    ]
    right = [one == row["answer"] for one, row in zip(said, rows, strict=True)]
    assert [scores.verdicts[item.id].outcome == "right" for item in items] == right
    pairs = [right[n : n + 2] for n in range(0, len(right), 2)]
    figures = {
        "vanilla-first": [pair[0] for pair in pairs],
        "vanilla-all": [one for pair in pairs for one in pair],
        "circular": [all(pair) for pair in pairs],
    }
    for name, values in figures.items():
        assert scores.numbers[name].value == pytest.approx(100 * sum(values) / len(values))
        assert scores.numbers[name].count == len(values)
        size = len(values) // len(pairs)
        for third, ability in enumerate(("CP", "LR", "FP-C")):
            some = [value for n, value in enumerate(values) if n // size % 3 == third]
            assert scores.numbers[f"{name} {ability}"].value == pytest.approx(100 * sum(some) / len(some))
    assert scores.headline == {"report": "vanilla-all"}.get(protocol, "circular")
    quarter = [value for n, value in enumerate(figures["circular"]) if n % 4 == 2]
    if protocol != "report":
        assert scores.numbers["circular category 2"].value == pytest.approx(100 * sum(quarter) / len(quarter))
    if protocol != "lmms-eval":
        # 21 of 35 replies are read as a letter of an option.
        assert sum(figures["vanilla-first"]) == 21
        assert scores.numbers["vanilla-first"].value == pytest.approx(60)


def test_a_real_rotation(tmp_path):
    rows = []
    for copy in range(4):
        letters = {letter: list(OPTIONS.values())[(n - copy) % 4] for n, letter in enumerate("ABCD")}
        answer = next(letter for letter, text in letters.items() if text == "dog")
        rows.append(
            {"index": 241 + copy * 1_000_000, "question": "What?", "answer": answer, "category": "c", **letters}
        )
        rows[-1]["image"] = "241" if copy else base64_of(1)
    items = MMBENCH.load(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows).parent, "vlmevalkit").items
    assert [item.fields["answer"] for item in items] == ["B", "C", "D", "A"]
    figures = {
        ("dog", "dog", "dog", "dog"): (100, 100, 100),
        ("B", "B", "B", "B"): (100, 25, 0),
        ("C", "C", "D", "A"): (0, 75, 0),
        ("B", "C", "D", "hm"): (100, 75, 0),
    }
    for replies, expected in figures.items():
        numbers = MMBENCH.score(items, dict(zip([i.id for i in items], replies, strict=True)), "vlmevalkit").numbers
        assert tuple(numbers[name].value for name in ("vanilla-first", "vanilla-all", "circular")) == expected
    # Judged row by row.
    predictions = dict(zip([item.id for item in items], ["B", "C", "D", "hm"], strict=True))
    (request,) = MMBENCH.judge_requests(items, predictions, "vlmevalkit")
    assert request.id == "3000241" and request.fallback in ("A", "B", "C", "D", "Z") and len(request.attempts) == 3
    text = request.attempts[0].messages[0]["content"]
    assert text.endswith(
        "Example 3: \nQuestion: What??\nOptions: There are several options: \nA. dog\nB. blue bird\nC. fish\nD. cat\n\n"
        "Answer: hm\nYour output: "
    )
    assert MMBENCH.parse_judgement(request, "A.") == "A" and MMBENCH.parse_judgement(request, "hm") is None
    for judgements, circular, outcome in (
        ({}, 0, "unjudged"),
        ({"3000241": "A"}, 100, "right"),
        ({"3000241": "Z"}, 0, "wrong"),
    ):
        scores = MMBENCH.score(items, predictions, "vlmevalkit", judgements)
        assert scores.numbers["circular"].value == circular and scores.verdicts["3000241"].outcome == outcome


def test_lmms_eval_draws_letters_in_the_order_of_the_indices(data):
    items = MMBENCH.load(data, "lmms-eval").items[:8]
    answers = [item.fields["answer"] for item in items]
    chance = random.Random(2680)
    drawn = ["ABCDE"[chance.randint(0, 4)] for _ in range(8)]
    # The second group is lost by its copy; a group ends with its first wrong letter.
    predictions = dict.fromkeys((item.id for item in items), "hm")
    predictions[items[3].id] = "E"
    scores = MMBENCH.score(list(reversed(items)), predictions, "lmms-eval")
    said, at = [], 0
    for group in range(4):
        if group == 1:
            said += ["", "E"]
            continue
        said.append(drawn[at])
        at += 1
        said.append(drawn[at] if said[-1] == answers[2 * group] else "")
        at += said[-1] != ""
    assert [scores.verdicts[item.id].extracted for item in items] == said
    assert scores.notes[0] == f"{at} letters are drawn by chance, as lmms-eval does where its judge fails"


def test_the_hubs_parquet(tmp_path):
    row = {"index": 5, "question": "What?", "hint": "nan", "answer": "B", "A": "cat", "B": "dog", "C": "nan", "D": None}
    row |= {"category": "c", "image": stored(1), "L2-category": "logic_reasoning", "split": "dev"}
    copy = {**row, "index": 1_000_005, "A": "dog", "B": "cat", "answer": "A"}
    write_parquet(tmp_path / "MMBench" / "en" / "dev-00000-of-00001.parquet", [row, copy])
    write_parquet(tmp_path / "MMBench" / "cn" / "dev-00000-of-00001.parquet", [{**row, "index": 6}])
    items = MMBENCH.load(tmp_path, "lmms-eval").items
    assert [item.id for item in items] == ["5", "1000005"] and items[1].group == "5"
    assert items[0].fields["options"] == {"A": "cat", "B": "dog"}
    assert items[0].prompt.startswith(
        "User: <image_placeholder>\nWhat? There are several options:\nA. cat\nB. dog\n\nAns"
    )
    numbers = MMBENCH.score(items, {"5": "B", "1000005": "dog"}, "report").numbers
    assert numbers["circular LR"].value == 100


def test_bad_input(tmp_path):
    row = {"index": 1, "question": "Q", "answer": "E", "category": "c", **OPTIONS, "image": base64_of(1)}
    write_tsv(
        tmp_path / "MMBench_DEV_EN.tsv", [row, {**row, "index": 2, "question": "<image_placeholder>?", "answer": "A"}]
    )
    found = MMBENCH.load(tmp_path, "report").problems
    # Without an answer nothing can be scored, not even as wrong.
    assert [problem.item is None for problem in found] == [True, False]
    assert {problem.id: problem.reason for problem in found} == {
        "1": "its answer 'E' is none of its options A, B, C, D",
        "2": "the question has <image_placeholder> in its text",
    }
    with pytest.raises(ValueError, match="no protocol official: MMBench's own evaluation is VLMEvalKit's; take"):
        MMBENCH.load(tmp_path, "official")
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [{k: v for k, v in row.items() if k != "answer"}])
    with pytest.raises(ValueError, match=r"MMBench_DEV_EN.tsv has no column answer; it has index, question, category"):
        MMBENCH.load(tmp_path, "report")
