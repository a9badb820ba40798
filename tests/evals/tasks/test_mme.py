"""MME in its three formats, its prompts by protocol, and what replies score."""

from __future__ import annotations

import pytest

from evals.tasks import TASKS
from evals.tasks.mme import COGNITION, PERCEPTION
from tests.evals.made import YES_NO_REPLIES, base64_of, picture, stored, write_parquet, write_tsv

MME = TASKS["mme"]
COLUMN = {"report": 1, "vlmevalkit": 1, "lmms-eval": 3, "official": 3}
CATEGORIES = (*PERCEPTION, *COGNITION)


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "index": number,
            "image": base64_of(number // 2),
            "image_path": f"{number // 2}.jpg",
            "question": f"Is this thing {number}? Please answer yes or no.",
            "answer": ("Yes", "No")[number % 2],
            "category": CATEGORIES[number // 2 % 14],
        }
        for number in range(2 * len(YES_NO_REPLIES))
    ]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mme")
    write_tsv(folder / "LMUData" / "MME.tsv", rows)
    return folder


WORD = "Answer the question using a single word or phrase."
PROMPTS = {
    "report": f"User: <image_placeholder>\nIs this thing 0? Please answer yes or no.\n{WORD}\n\nAssistant:",
    "vlmevalkit": f"User: <image_placeholder>\nIs this thing 0? Please answer yes or no.\n{WORD}\n\nAssistant:",
    "lmms-eval": f"User: <image_placeholder>\nIs this thing 0?\n{WORD}\n\nAssistant:",
    "official": "User: <image_placeholder>\nIs this thing 0? Please answer yes or no.\n\nAssistant:",
}


@pytest.mark.parametrize("protocol", MME.protocols)
def test_prompts(data, protocol):
    loaded = MME.load(data, protocol)
    assert loaded.items[0].prompt == PROMPTS[protocol]
    assert loaded.items[0].max_new_tokens == (16 if protocol == "lmms-eval" else 2048)
    assert loaded.items[0].group == loaded.items[1].group != loaded.items[2].group


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("protocol", MME.protocols)
def test_verdicts_and_figures(data, rows, protocol, shift):
    """With a shift, the two questions of a picture get different replies, so that some pictures have both right."""
    items = MME.load(data, protocol).items
    cases = [case for case in YES_NO_REPLIES for _ in range(2)]
    cases = cases[shift:] + cases[:shift]
    predictions = {item.id: case[0] for item, case in zip(items, cases, strict=True)}
    scores = MME.score(items, predictions, protocol)
    said = [case[COLUMN[protocol]] for case in cases]
    assert [scores.verdicts[item.id].extracted for item in items] == said
    right = [one == row["answer"].lower() for one, row in zip(said, rows, strict=True)]
    assert [scores.verdicts[item.id].outcome == "right" for item in items] == right
    by_category = {}
    for category in CATEGORIES:
        pairs = [right[n : n + 2] for n in range(0, len(rows), 2) if rows[n]["category"] == category]
        questions = [one for pair in pairs for one in pair]
        by_category[category] = 100 * (sum(questions) / len(questions) + sum(map(all, pairs)) / len(pairs))
        assert scores.numbers[category].value == pytest.approx(by_category[category])
        assert scores.numbers[category].count == 2 * len(pairs)
    assert scores.numbers["perception"].value == pytest.approx(sum(by_category[name] for name in PERCEPTION))
    assert scores.numbers["cognition"].value == pytest.approx(sum(by_category[name] for name in COGNITION))
    assert scores.numbers["accuracy"].value == pytest.approx(100 * sum(right) / len(right))
    assert scores.headline == "perception" and not scores.notes


def test_a_part_of_the_categories_is_said(data):
    items = MME.load(data, "report").items[:5]
    scores = MME.score(items, dict.fromkeys((item.id for item in items), "yes"), "report")
    # existence and count: 50 % of questions, no picture with both; position: its one question right.
    assert scores.numbers["perception"].value == pytest.approx(50 + 50 + 100)
    assert "cognition" not in scores.numbers
    assert scores.notes == ["1 of 3 pictures do not have two questions", "perception is of 3 categories of 10"]
    assert scores.published == {"Janus": 1338.0, "Janus-Pro-1B": 1444.0, "Janus-Pro-7B": 1567.1}


def test_export(data):
    items = MME.load(data, "official").items
    files = MME.export(items, {item.id: "Yes,\nit\tis" for item in items}, "official")
    assert sorted(files) == sorted(f"{name}.txt" for name in CATEGORIES)
    assert files["existence.txt"].splitlines()[:2] == [
        "0.jpg\tIs this thing 0? Please answer yes or no.\tYes\tYes, it is",
        "0.jpg\tIs this thing 1? Please answer yes or no.\tNo\tYes, it is",
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_the_official_folder(tmp_path, nested):
    folder = tmp_path / "MME_Benchmark_release_version" / "color"
    texts, pictures = (folder / "questions_answers_YN", folder / "images") if nested else (folder, folder)
    for each in (texts, pictures):
        each.mkdir(parents=True, exist_ok=True)
    for number, suffix in ((1, "jpg"), (2, "png")):
        (pictures / f"{number:04}.{suffix}").write_bytes(picture(number))
    for number in (1, 2, 3):
        lines = [f"Is it {answer}? Please answer yes or no.\t{answer.capitalize()}" for answer in ("yes", "no")]
        (texts / f"{number:04}.txt").write_text("\n".join(lines) + "\n")
    loaded = MME.load(tmp_path, "official")
    assert [item.id for item in loaded.items] == [f"color/{n:04}/{q}" for n in (1, 2) for q in (1, 2)]
    assert loaded.items[2].images[0].read() == picture(2)
    assert [problem.reason.rpartition("/")[2] for problem in loaded.problems] == ["0003.txt is missing"] * 2
    scores = MME.score(
        loaded.items, dict(zip([i.id for i in loaded.items], ["yes", "no", "yes", "yes"], strict=True)), "official"
    )
    assert scores.numbers["color"].value == pytest.approx(75 + 50)


def test_the_hubs_parquet(tmp_path):
    rows = [
        {"question_id": f"code_reasoning/{n // 2:04}.png", "image": stored(n // 2), "question": f"Is it {n}?"}
        | {"answer": ("Yes", "No")[n % 2], "category": "code_reasoning"}
        for n in range(4)
    ]
    write_parquet(tmp_path / "lmms-lab" / "MME" / "data" / "test-00000-of-00001.parquet", rows)
    items = MME.load(tmp_path, "lmms-eval").items
    assert [item.group for item in items[::2]] == [f"code_reasoning/code_reasoning/000{n}.png" for n in (0, 1)]
    scores = MME.score(items, dict(zip("0123", ["yes", "no", "no", "no"], strict=True)), "lmms-eval")
    assert scores.numbers["cognition"].value == pytest.approx(75 + 50)
