"""GenEval's verdicts on detections given by hand, its figures, and its folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from evals.generation import geneval, layouts
from evals.generation.geneval import Detection, Result, Thresholds


def at(x, y, score=0.8, size=40):
    """An object whose center is at (x, y)."""
    return Detection((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def prompt(tag, include, exclude=()):
    made = {"tag": tag, "include": include, "prompt": "a photo"}
    return made | ({"exclude": list(exclude)} if exclude else {})


ONE = prompt("single_object", [{"class": "bench", "count": 1}])
TWO = prompt("two_object", [{"class": "bench", "count": 1}, {"class": "dog", "count": 1}])
COUNT = prompt("counting", [{"class": "cup", "count": 3}], [{"class": "cup", "count": 4}])
COLOR = prompt("colors", [{"class": "cup", "count": 1, "color": "red"}])
LEFT = prompt(
    "position", [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}]
)  # "a photo of a cup left of a dog"
BOTH = prompt(
    "color_attr", [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]
)
RED, BLUE = 100.0, 200.0  # where red and blue objects stand, for the classifier below


def colors_of(name, objects):
    return [{RED: "red", BLUE: "blue"}.get((each.box[0] + each.box[2]) / 2, "white") for each in objects]


CASES = [
    (ONE, {"bench": [at(0, 0)]}, ""),
    (ONE, {"dog": [at(0, 0)]}, "expected bench>=1, found 0"),
    (ONE, {}, "expected bench>=1, found 0"),
    # The score must exceed the threshold.
    (ONE, {"bench": [at(0, 0, 0.3)]}, "expected bench>=1, found 0"),
    (ONE, {"bench": [at(0, 0, 0.3001)]}, ""),
    (ONE, {"bench": [at(0, 0)] * 20}, ""),
    (TWO, {"bench": [at(0, 0)], "dog": [at(0, 0)]}, ""),
    (TWO, {"bench": [at(0, 0)]}, "expected dog>=1, found 0"),
    (TWO, {"bench": [at(0, 0)], "dog": [at(0, 0, 0.2)]}, "expected dog>=1, found 0"),
    (TWO, {}, "expected bench>=1, found 0\nexpected dog>=1, found 0"),
    # Counting: exactly three above 0.9.
    (COUNT, {"cup": [at(0, 0, 0.95)] * 3}, ""),
    (COUNT, {"cup": [at(0, 0, 0.95)] * 2}, "expected cup>=3, found 2"),
    (COUNT, {"cup": [at(0, 0, 0.95)] * 4}, "expected cup<4, found 4"),
    (COUNT, {"cup": [at(0, 0, 0.95)] * 3 + [at(0, 0, 0.9)]}, ""),
    (COUNT, {"cup": [at(0, 0, 0.95)] * 3 + [at(0, 0, 0.901)]}, "expected cup<4, found 4"),
    (COUNT, {"cup": [at(0, 0, 0.95)] * 2 + [at(0, 0, 0.9)]}, "expected cup>=3, found 2"),
    # Of twenty cups sixteen are kept.
    (COUNT, {"cup": [at(0, 0, 0.95)] * 20}, "expected cup<4, found 16"),
    (COLOR, {"cup": [at(RED, 0)]}, ""),
    (COLOR, {"cup": [at(BLUE, 0)]}, "expected red cup>=1, found 0 red; and 1 blue"),
    # Only the best object is looked at.
    (COLOR, {"cup": [at(RED, 0, 0.7), at(BLUE, 0, 0.8)]}, "expected red cup>=1, found 0 red; and 1 blue"),
    (COLOR, {"cup": [at(RED, 0, 0.9), at(BLUE, 0, 0.8)]}, ""),
    # Of equal scores the later one is better.
    (COLOR, {"cup": [at(BLUE, 0, 0.8), at(RED, 0, 0.8)]}, ""),
    (COLOR, {"cup": [at(RED, 0, 0.8), at(BLUE, 0, 0.8)]}, "expected red cup>=1, found 0 red; and 1 blue"),
    (COLOR, {}, "expected cup>=1, found 0"),
    (LEFT, {"dog": [at(300, 100)], "cup": [at(100, 100)]}, ""),
    (LEFT, {"dog": [at(100, 100)], "cup": [at(300, 100)]}, "expected cup left of target, found right of target"),
    (LEFT, {"dog": [at(100, 100)], "cup": [at(100, 300)]}, "expected cup left of target, found below target"),
    (LEFT, {"dog": [at(100, 100)], "cup": [at(100, 100)]}, "expected cup left of target, found  target"),
    (LEFT, {"dog": [at(300, 300)], "cup": [at(100, 100)]}, ""),
    (LEFT, {"dog": [at(100, 300)], "cup": [at(300, 100)]},
     "expected cup left of target, found right of and above target"),
    # The cup is more than half of the distance to the left, and not: sizes of 40 take 8 pixels from each axis.
    (LEFT, {"dog": [at(200, 0)], "cup": [at(0, 200)]}, ""),
    (LEFT, {"dog": [at(108, 200)], "cup": [at(0, 0)]}, "expected cup left of target, found above target"),
    (LEFT, {"cup": [at(100, 100)]}, "expected dog>=1, found 0\nno target for cup to be left of"),
    (LEFT, {"dog": [at(300, 100)]}, "expected cup>=1, found 0"),
    (BOTH, {"cup": [at(RED, 0)], "dog": [at(BLUE, 0)]}, ""),
    (BOTH, {"cup": [at(BLUE, 0)], "dog": [at(RED, 0)]}, "expected red cup>=1, found 0 red; and 1 blue\n"
     "expected blue dog>=1, found 0 blue; and 1 red"),
    (BOTH, {"cup": [at(RED, 0)], "dog": [at(0, 0)]}, "expected blue dog>=1, found 0 blue; and 1 white"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "found", "reason"), CASES)
def test_verdicts(wanted, found, reason):
    kept = geneval.kept(found, wanted["tag"])
    assert geneval.verdict(kept, wanted, colors_of) == (not reason, reason)


def test_counts_above_one_look_at_as_many():
    wanted = prompt("colors", [{"class": "cup", "count": 2, "color": "red"}])
    some = {"cup": [at(RED, 0, 0.9), at(BLUE, 0, 0.8), at(RED, 0, 0.7)]}
    reason = "expected red cup>=2, found 1 red; and 1 red, 1 blue"
    assert geneval.verdict(geneval.kept(some, "colors"), wanted, colors_of) == (False, reason)
    wanted = prompt("position", [{"class": "dog", "count": 2}, {"class": "cup", "count": 1, "position": ["above", 0]}])
    for second, correct in ((300, True), (0, False)):
        found = {"dog": [at(0, 300), at(100, second)], "cup": [at(50, 100)]}
        assert geneval.verdict(geneval.kept(found, "position"), wanted, colors_of)[0] is correct


# Boxes of 10 by 10: 0.1 of both sizes are 2 pixels.
@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 0, set()),
        (2, 2, set()),
        (2.0009, 0, set()),
        (2.002, 0, set()),
        (4, 0, set()),  # 2 of 4 pixels: half of the distance, not more
        (4.01, 0, {"right of"}),
        (-4.01, 0, {"left of"}),
        (0, 4.01, {"below"}),
        (0, -4.01, {"above"}),
        (50, 50, {"right of", "below"}),
        (-50, -50, {"left of", "above"}),
        # On the diagonal from 4 + 2 * 2 ** 0.5 = 6.828 pixels on.
        (6.8, 6.8, set()),  # 4.8 of 9.617 pixels
        (6.84, 6.84, {"right of", "below"}),  # 4.84 of 9.673
        (20, 100, {"below"}),
    ],
)
def test_relations(x, y, expected):
    box = (x - 5, y - 5, x + 5, y + 5)
    assert geneval.relations(box, (-5, -5, 5, 5)) == expected
    assert geneval.relations((*box, 0.9), (-5, -5, 5, 5)) == expected


def test_overlapping_objects():
    found = {"cup": [at(0, 0, 0.8), at(0, 0, 0.9), at(100, 0, 0.7), at(110, 0, 0.6)]}
    assert [each.score for each in geneval.kept(found, "colors")["cup"]] == [0.9, 0.8, 0.7, 0.6]
    half = geneval.kept(found, "colors", Thresholds(overlap=0.5))["cup"]
    assert [each.score for each in half] == [0.9, 0.7]
    # Pixels at the edge count: boxes 0 to 9 and 5 to 14 share 5 of 15 columns.
    assert geneval.overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(1 / 3)
    assert geneval.overlap((0, 0, 9, 9), (20, 0, 29, 9)) == 0


def test_masks_and_crops():
    mask = np.zeros((16, 24), bool)
    mask[3:7, 10:20] = True
    assert geneval.box_of(mask) == (10, 3, 20, 7)
    assert geneval.box_of(np.zeros((4, 4), bool)) == (0, 0, 0, 0)
    mask[3, 10] = False
    image = Image.new("RGB", (24, 16), (255, 0, 0))
    crop = geneval.color_crop(image, Detection((9.6, 2.6, 20.4, 7.4), 0.9, mask))
    assert crop.size == (10, 4)
    assert crop.getpixel((0, 0)) == (0x99, 0x99, 0x99) and crop.getpixel((1, 0)) == (255, 0, 0)
    assert geneval.color_crop(image, Detection((0, 0, 5, 5), 0.9)).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="a mask of"):
        geneval.color_crop(image, Detection((0, 0, 5, 5), 0.9, mask.T))
    texts = geneval.color_texts("computer mouse")
    assert len(texts) == 10 and texts[1] == [
        *("a photo of a orange computer mouse", "a photo of a orange-colored computer mouse"),
        "a photo of a orange object",
    ]


def test_figures_and_results():
    results = []
    for wanted, rights in ((ONE, [1, 1, 1, 0]), (TWO, [0, 0, 0, 0]), (COLOR, [1, 0])):
        results += [Result(f"{n}.png", wanted, bool(right), "", {}) for n, right in enumerate(rights)]
    numbers = geneval.summarize(results)
    values = {name: number.value for name, number in numbers.items()}
    assert values == pytest.approx(
        {
            **{"overall": 100 * (0.75 + 0 + 0.5) / 3, "single_object": 75, "two_object": 0, "colors": 50},
            **{"correct pictures": 40, "prompts with a correct picture": 200 / 3},
        }
    )
    assert numbers["single_object"].count == 4 and numbers["overall"].count == 10
    row = json.loads(Result("a.png", COLOR, False, "why", {"cup": [at(RED, 20)]}).line())
    assert json.loads(row.pop("metadata")) == COLOR
    assert json.loads(row.pop("details")) == {"cup": [[80, 0, 120, 40, 0.8]]}
    assert row == {"filename": "a.png", "tag": "colors", "prompt": "a photo", "correct": False, "reason": "why"}
    assert geneval.PUBLISHED["Janus-Pro-7B"]["overall"] == pytest.approx(
        sum(geneval.PUBLISHED["Janus-Pro-7B"][tag] for tag in geneval.TAGS) / 6, abs=0.5
    )


BAD = [
    ("[]", "not a JSON object"),
    ('{"tag": "colors", "prompt": "a"}', "it has no include"),
    ('{"tag": 1, "prompt": "a", "include": []}', "tag and prompt must be texts"),
    ('{"tag": "x", "prompt": "a", "include": {}}', "include must be a list"),
    ('{"tag": "x", "prompt": "a", "include": [{"class": "cup"}]}', "include 0 must have a class and a count"),
    ('{"tag": "x", "prompt": "a", "include": [{"class": "cup", "count": 1, "color": "gray"}]}', "has the color 'gray'"),
    ('{"tag": "x", "prompt": "a", "include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}', "an earlier"),
    ('{"tag": "x", "prompt": "a"', "is not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_prompts_are_named(tmp_path, line, message):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(ONE) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"evaluation_metadata.jsonl:3.*{message}"):
        geneval.read_prompts(path)


def test_prompts_and_their_folders(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (ONE, LEFT, COUNT)))
    assert geneval.read_prompts(path) == [ONE, LEFT, COUNT]
    pictures = [Image.new("RGB", (5, 3), (50 * n, 10, 20)) for n in range(4)]
    layouts.write_geneval(tmp_path / "out", 1, LEFT, pictures)
    folder = tmp_path / "out" / "00001"
    assert sorted(str(each.relative_to(folder)) for each in folder.rglob("*.*")) == [
        *("grid.png", "metadata.jsonl", "samples/00000.png", "samples/00001.png", "samples/00002.png"),
        "samples/00003.png",
    ]
    assert (folder / "metadata.jsonl").read_bytes() == json.dumps(LEFT).encode()
    with Image.open(folder / "samples" / "00002.png") as read:
        assert read.tobytes() == pictures[2].tobytes()
    expected = np.zeros((3 + 4, 4 * 7 + 2, 3), np.uint8)
    for n in range(4):
        expected[2:5, 2 + 7 * n : 7 + 7 * n] = (50 * n, 10, 20)
    with Image.open(folder / "grid.png") as read:
        assert np.array_equal(np.asarray(read), expected)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        geneval.read_prompts(path)
