"""POPE in its three formats, its prompts by protocol, and what replies score."""

from __future__ import annotations

import json

import pytest

from evals.tasks import TASKS
from tests.evals.made import YES_NO_REPLIES, base64_of, picture, stored, write_parquet, write_tsv

POPE = TASKS["pope"]
# Columns of YES_NO_REPLIES by protocol.
COLUMN = {"report": 1, "vlmevalkit": 1, "lmms-eval": 2, "official": 4}
CATEGORIES = ("random", "popular,adversarial", "adversarial,popular,random", "random,popular")


@pytest.fixture(scope="module")
def rows():
    """Each reply to a question that is answered with yes, and to one that is answered with no."""
    return [
        {
            "index": number,
            "image": base64_of(number) if number % 6 == 0 else str(number // 6 * 6),
            "question": f"Is there a thing {number} in the image? Please answer yes or no.",
            "answer": ("Yes", "No")[number % 2],
            "category": CATEGORIES[number // 2 % 4],
        }
        for number in range(2 * len(YES_NO_REPLIES))
    ]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pope")
    write_tsv(folder / "POPE.tsv", rows)
    return folder


PROMPTS = {
    "report": "User: <image_placeholder>\nIs there a thing 0 in the image?\n"
    "Answer the question using a single word or phrase.\n\nAssistant:",
    "lmms-eval": "User: <image_placeholder>\nIs there a thing 0 in the image?\n"
    "Answer the question using a single word or phrase.\n\nAssistant:",
    "official": "User: <image_placeholder>\nIs there a thing 0 in the image?\n\nAssistant:",
}
PROMPTS["vlmevalkit"] = PROMPTS["report"]


@pytest.mark.parametrize("protocol", POPE.protocols)
def test_prompts(data, protocol):
    loaded = POPE.load(data, protocol)
    assert loaded.items[0].prompt == PROMPTS[protocol]
    assert loaded.items[0].max_new_tokens == (128 if protocol == "lmms-eval" else 2048)
    assert not loaded.problems
    assert "POPE.tsv (random 50, popular 50, adversarial 34): 68 questions" in loaded.source


def test_pictures_are_shared_through_references(data):
    items = POPE.load(data, "report").items
    assert [item.images[0].key for item in items[:6]] == [items[0].images[0].key] * 6
    assert items[6].images[0].key != items[0].images[0].key
    assert items[7].images[0].read() == picture(6)


@pytest.mark.parametrize("protocol", POPE.protocols)
def test_verdicts_and_figures(data, rows, protocol):
    items = POPE.load(data, protocol).items
    cases = [case for case in YES_NO_REPLIES for _ in range(2)]
    predictions = {item.id: case[0] for item, case in zip(items, cases, strict=True)}
    scores = POPE.score(items, predictions, protocol)
    said = [case[COLUMN[protocol]] for case in cases]
    assert [scores.verdicts[item.id].extracted for item in items] == said
    gold = [row["answer"].lower() for row in rows]
    outcomes = ["right" if one == other else "wrong" for one, other in zip(said, gold, strict=True)]
    assert [scores.verdicts[item.id].outcome for item in items] == outcomes
    # Counted over the questions of each split, one by one.
    for split in ("random", "popular", "adversarial", "overall"):
        counted = [
            (one, other)
            for one, other, row in zip(said, gold, rows, strict=True)
            for name in row["category"].split(",")
            if split in (name, "overall")
        ]
        hits = sum(one == other == "yes" for one, other in counted)
        false = sum(one == "yes" and other == "no" for one, other in counted)
        missed = sum(
            other == "yes" and (one == "no" if protocol == "lmms-eval" else one != "yes") for one, other in counted
        )
        expected = {
            "F1": 2 * hits / (2 * hits + false + missed),
            "accuracy": sum(one == other for one, other in counted) / len(counted),
            "precision": hits / (hits + false),
            "recall": hits / (hits + missed),
            "yes": sum(one == "yes" for one, _ in counted) / len(counted),
        }
        for name, value in expected.items():
            number = scores.numbers[f"{name} {split}"]
            assert number.value == pytest.approx(100 * value) and number.count == len(counted)
            assert number.low <= number.value <= number.high
    mean = sum(scores.numbers[f"F1 {split}"].value for split in ("random", "popular", "adversarial")) / 3
    assert scores.numbers["F1 mean of splits"].value == pytest.approx(mean)


def test_headlines_and_published_figures(data):
    items = POPE.load(data, "report").items
    # In random 3 hits, 1 false and 1 missed; with each question as often as it is in splits 5 hits, 1 false, 6 missed.
    replies = ["yes", "yes", "no", "no", "yes", "no", "no", "no", "yes", "maybe", "maybe", "no"]
    predictions = {item.id: reply for item, reply in zip(items, replies, strict=False)}
    scores = POPE.score(items, predictions, "report")
    assert scores.unanswered == 56 and scores.headline == "F1 random"
    assert scores.numbers["F1 random"].value == pytest.approx(75)
    assert scores.published == {"Janus": 87.0, "Janus-Pro-1B": 86.2, "Janus-Pro-7B": 87.4}
    scores = POPE.score(items, predictions, "vlmevalkit")
    assert scores.headline == "F1 overall"
    assert scores.numbers["F1 overall"].value == pytest.approx(1000 / 17)
    assert POPE.score(items, predictions, "official").headline == "F1 mean of splits"


def test_a_judge_decides_what_the_rules_do_not(data):
    items = POPE.load(data, "report").items[:4]
    predictions = {"0": "yes", "1": "**No**", "2": "A dog.", "3": None}
    requests = POPE.judge_requests(items, predictions, "report")
    assert [request.id for request in requests] == ["1", "2"]
    assert [attempt.temperature for attempt in requests[0].attempts] == [0.0, 0.5, 1.0, 1.5, 2.0]
    text = requests[0].attempts[0].messages[0]["content"]
    assert text.endswith(
        "Example 3: \nQuestion: Is there a thing 1 in the image? Please answer yes or no.?\n"
        "Answer: **No**\nYour output: "
    )
    assert POPE.parse_judgement(requests[0], "No.") == "no" and POPE.parse_judgement(requests[0], "Unknown") is None
    outcomes = {
        None: ["right", "wrong", "wrong", "wrong"],
        "none yet": ["right", "unjudged", "unjudged", "wrong"],
        "all": ["right", "right", "wrong", "wrong"],
    }
    judged = {None: None, "none yet": {}, "all": {"1": "no", "2": requests[1].fallback}}
    for name, expected in outcomes.items():
        verdicts = POPE.score(items, predictions, "report", judged[name]).verdicts
        assert [verdicts[item.id].outcome for item in items] == expected
    assert POPE.judge_requests(items, predictions, "official") == []


# ---------------------------------------------------------------- the official release and the Hub's


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "POPE" / "coco"
    folder.mkdir(parents=True)
    for split, images in {"random": (1, 2), "popular": (1, 3), "adversarial": (1, 2)}.items():
        lines = [
            {"question_id": n + 1, "image": f"COCO_val2014_{image}.jpg", "text": f"Is there a {n}?", "label": label}
            for n, (image, label) in enumerate([(images[0], "yes"), (images[1], "no")])
        ]
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "val2014").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "val2014" / f"COCO_val2014_{number}.jpg").write_bytes(picture(number))
    return tmp_path


def test_official_files_are_merged_and_exported_as_its_script_reads_them(official):
    loaded = POPE.load(official, "official")
    assert [item.id for item in loaded.items] == ["random-1", "random-2", "popular-2"]
    assert [item.fields["category"] for item in loaded.items] == [
        ["random", "popular", "adversarial"],
        ["random", "adversarial"],
        ["popular"],
    ]
    assert loaded.items[2].images[0].read() == picture(3)
    predictions = {"random-1": "Yes", "random-2": "No", "popular-2": "Yes, it is"}
    files = POPE.export(loaded.items, predictions, "official")
    assert files["coco_pope_popular_answers.json"] == (
        '{"question": "Is there a 0?", "answer": "Yes"}\n{"question": "Is there a 1?", "answer": "Yes, it is"}\n'
    )
    assert files["coco_pope_adversarial_answers.json"].count("\n") == 2
    numbers = POPE.score(loaded.items, predictions, "official").numbers
    assert numbers["accuracy overall"].count == 6 and numbers["accuracy overall"].value == pytest.approx(500 / 6)


def test_a_missing_picture_is_a_problem_and_a_missing_split_an_error(official):
    (official / "val2014" / "COCO_val2014_3.jpg").unlink()
    loaded = POPE.load(official, "report")
    (problem,) = loaded.problems
    assert problem.id == "popular-2" and problem.reason.endswith("val2014/COCO_val2014_3.jpg is missing")
    # Scored as wrong only if asked: the item is there, and None is its prediction.
    predictions = {"random-1": "yes", "random-2": "no", "popular-2": None}
    assert POPE.score(loaded.items, predictions, "report").numbers["accuracy overall"].count == 5
    every = POPE.score([*loaded.items, problem.item], predictions, "report")
    assert every.numbers["accuracy popular"].value == 50 and every.numbers["yes popular"].value == 100
    (official / "POPE" / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(FileNotFoundError, match="coco_pope_popular"):
        POPE.load(official, "report")


def test_a_line_without_a_label_is_named(official):
    path = official / "POPE" / "coco" / "coco_pope_random.json"
    path.write_text('{"image": "a.jpg", "text": "Is there a cat?"}\n')
    with pytest.raises(ValueError, match=r"coco_pope_random.json:1 has no label"):
        POPE.load(official, "report")


def test_the_hubs_parquet(tmp_path):
    rows = [
        {"id": str(n), "question_id": str(n // 2), "question": "Is there a cat?", "answer": "no", "image": stored(7)}
        | {"image_source": "COCO_7", "category": category}
        for n, category in enumerate(["adversarial", "popular", "random"])
    ]
    rows.append({**rows[0], "id": "9", "question": "Is there a dog?", "answer": "yes"})
    folder = tmp_path / "datasets--lmms-lab--POPE" / "snapshots" / "abc"
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    write_parquet(folder / "Full" / "random-00000-of-00001.parquet", rows[2:3])
    loaded = POPE.load(tmp_path, "lmms-eval")
    assert [item.fields["category"] for item in loaded.items] == [["adversarial", "popular", "random"], ["adversarial"]]
    assert loaded.items[0].images[0].key == loaded.items[1].images[0].key
    assert loaded.items[0].images[0].read() == picture(7)


def test_rows_that_cannot_be_scored(tmp_path):
    row = {"image": base64_of(1), "question": "Is there a cat?", "answer": "Yes", "category": "random"}
    rows = [{**row, "index": 1, "answer": "maybe"}, {**row, "index": 2, "category": ""}, {**row, "index": 3}]
    loaded = POPE.load(write_tsv(tmp_path / "POPE.tsv", rows).parent, "report")
    assert [(problem.reason, problem.item) for problem in loaded.problems] == [
        ("its answer is 'maybe', neither yes nor no", None),
        ("it has no category", None),
    ]
    assert [item.id for item in loaded.items] == ["3"]


def test_what_is_missing_is_named_with_where_it_is_published(tmp_path):
    with pytest.raises(ValueError, match=r"POPE: no data in .*; expected POPE.tsv .*; or coco_pope_random.json"):
        POPE.load(tmp_path, "report")
    with pytest.raises(ValueError, match=r"is not a folder"):
        POPE.load(tmp_path / "nowhere", "report")
    with pytest.raises(ValueError, match=r"pope has no protocol 'oficial'; did you mean official\?; its"):
        POPE.load(tmp_path, "oficial")
