"""DPG-Bench: dependencies, zeros that spread, both quirks of the original, and its pictures."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from evals.generation import dpg, layouts
from evals.generation.dpg import Picture, Question

HEADER = (
    "item_id text keywords proposition_id dependency category_broad category_detailed tuple question_natural_language"
)
ROWS = [
    ("a", 1, "0", "entity - whole (cat)", "Is there a cat?"),
    ("a", 2, "1", "attribute - color (cat, red)", "Is the cat red?"),
    ("a", 3, "0", "entity - whole (mat)", "Is there a mat?"),
    ("a", 4, "1, 3", "relation - spatial (cat, mat, on)", "Is the cat on the mat?"),
    ("b", 1, "0", "global - (photo)", "Is it a photo?"),
    ("b", 2, "0", "other - text (hi)", 'Does it say "hi", twice?'),
]


def write(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split())
        for item, number, dependency, what, question in rows:
            writer.writerow([item, "a long\ntext", "", number, dependency, "", "", what, question])
    return path


@pytest.fixture
def questions(tmp_path):
    return dpg.read_questions(write(tmp_path / "dpg_bench.csv"))


def test_questions(questions):
    assert [each.number for each in questions["a"]] == [1, 2, 3, 4]
    assert questions["a"][3] == Question(4, "Is the cat on the mat?", (1, 3), "relation - spatial")
    assert questions["b"][0].category == "global -" and questions["b"][1].text == 'Does it say "hi", twice?'


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("yyyy", 1.0),
        ("nnnn", 0.0),
        # The cat is not there: neither its color nor its place count.
        ("nyyy", 0.25),
        ("ynyy", 0.75),
        ("yyny", 0.5),
        ("yyyn", 0.75),
    ],
)
def test_a_question_counts_only_with_those_it_depends_on(questions, answers, expected):
    replies = {n + 1: {"y": "yes", "n": "no"}[each] for n, each in enumerate(answers)}
    value, alone = dpg.score(questions["a"], replies)
    assert value == expected
    assert alone == {n + 1: float(each == "y") for n, each in enumerate(answers)}


def test_only_yes_is_yes(questions):
    replies = dict(zip((1, 2, 3, 4), ("yes", "Yes", "yes.", "yes"), strict=True))
    assert dpg.score(questions["a"], replies)[1] == {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}


def test_zeros_spread_to_those_behind_alone():
    def chain(*parents):
        return [Question(n + 1, "?", (parent,), "entity - whole") for n, parent in enumerate(parents)]

    replies = {1: "no", 2: "yes", 3: "yes"}
    assert dpg.score(chain(0, 1, 2), replies)[0] == 0
    # The first depends on the third, which becomes 0 only after it was looked at.
    replies = {1: "yes", 2: "no", 3: "yes"}
    assert dpg.score(chain(3, 0, 2), replies)[0] == pytest.approx(1 / 3)


YES = {1: "yes", 2: "yes", 3: "yes", 4: "yes"}


def test_figures_with_and_without_the_quirk_of_the_last_tile(questions):
    no_cat, no_mat = {**YES, 1: "no"}, {**YES, 3: "no"}
    pictures = [
        Picture("a", [no_cat, no_mat, YES, no_mat]),
        Picture("b", [{1: "yes", 2: "no"}, {1: "no", 2: "yes"}]),
        Picture("c", [YES]),
    ]
    numbers, failed = dpg.summarize(questions, pictures)
    assert failed == {"c": "there are no questions about it"}
    values = {name: number.value for name, number in numbers.items()}
    # Picture a: 1/4, 1/2, 1, 1/2; picture b: a half twice.
    assert values == pytest.approx(
        {
            **{"overall": 100 * (2.25 / 4 + 0.5) / 2, "global": 50, "entity": 100 * 5 / 8, "attribute": 100},
            **{"relation": 100, "other": 50, "attribute - color": 100, "entity - whole": 62.5, "global -": 50},
            **{"other - text": 50, "relation - spatial": 100},
        }
    )
    assert numbers["entity"].count == 8
    quirky, _ = dpg.summarize(questions, pictures, quirks=True)
    assert quirky["overall"].value == values["overall"]
    names = ("global", "entity", "attribute", "relation", "other")
    assert [quirky[name].value for name in names] == pytest.approx([0, 50, 100, 100, 100])
    assert quirky["entity"].count == 2


def test_the_quirk_of_the_first_row(tmp_path):
    questions = dpg.read_questions(write(tmp_path / "dpg_bench.csv"), quirks=True)
    assert [each.number for each in questions["a"]] == [2, 3, 4]
    pictures = [Picture("a", [YES]), Picture("b", [{1: "yes", 2: "yes"}])]
    numbers, failed = dpg.summarize(questions, pictures, quirks=True)
    assert failed == {"a": "question 2 depends on question 1, which is not there"}
    assert (numbers["overall"].value, numbers["overall"].count) == (100, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "x", "0", "e", "?")], r"dpg_bench.csv:3: proposition_id and dependency must be whole numbers"),
        ([("a", 1, "", "e", "?")], r"dpg_bench.csv:3: proposition_id and dependency"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        dpg.read_questions(write(tmp_path / "dpg_bench.csv", rows))


def test_missing_columns_answers_and_tiles(tmp_path, questions):
    (tmp_path / "dpg_bench.csv").write_text("item_id,propositon_id,dependency,tuple,question_natural_language\n")
    with pytest.raises(ValueError, match=r"has no column proposition_id; did you mean propositon_id\?"):
        dpg.read_questions(tmp_path / "dpg_bench.csv")
    _, failed = dpg.summarize(questions, [Picture("a", [{1: "yes"}]), Picture("b", [])])
    assert failed == {"a": "no answer to question 2", "b": "it has no tiles"}


def test_pictures(tmp_path):
    tiles = [Image.new("RGB", (4, 4), (60 * n, 0, 9)) for n in range(4)]
    layouts.write_dpg(tmp_path / "out", "COCOval1", tiles)
    with Image.open(tmp_path / "out" / "COCOval1.png") as picture:
        assert picture.size == (8, 8)
        corners = np.asarray(picture)[::4, ::4, 0].ravel()
        assert corners.tolist() == [0, 60, 120, 180]
        read = layouts.dpg_tiles(picture, 4)
        assert [each.tobytes() for each in read] == [each.tobytes() for each in tiles]
        assert len(layouts.dpg_tiles(picture, 4, 2)) == 2
    with pytest.raises(ValueError, match="COCOval1: DPG-Bench takes four pictures of a prompt, got 3"):
        layouts.write_dpg(tmp_path, "COCOval1", tiles[:3])
    with pytest.raises(ValueError, match="a grid needs pictures of one size"):
        layouts.grid([tiles[0], Image.new("RGB", (5, 4))], 2)


def test_published_figures():
    assert dpg.PUBLISHED["Janus-Pro-7B"] == {
        **{"overall": 84.19, "global": 86.90, "entity": 88.90, "attribute": 89.40, "relation": 89.32, "other": 89.48}
    }
