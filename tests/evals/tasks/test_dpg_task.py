"""DPG-Bench of pictures that are there: what a judge is asked, and what its replies come to."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from evals import main
from evals.generation import layouts
from evals.tasks.dpg import Dpg
from tests.evals.generation.test_dpg import write
from tests.library.tiny_janus import folder  # noqa: F401


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "dpg_bench.csv")
    for name in ("a", "b", "z"):
        tiles = [Image.new("RGB", (6, 6), (40 * number, 0, ord(name))) for number in range(4)]
        layouts.write_dpg(tmp_path / "pictures", name, tiles)
    return tmp_path


@pytest.fixture
def task(data):
    return Dpg(data / "pictures", given=True)


def test_what_is_asked(data, task):
    loaded = task.load(data, "plain")
    assert loaded.source.endswith("dpg_bench.csv, 3 pictures (1 without questions, such as z.png): 24 questions")
    items = {item.id: item for item in loaded.items}
    item = items["a/3/4"]
    assert item.prompt == ("User: <image_placeholder>\nIs the cat on the mat?\nPlease answer yes or no.\n\nAssistant:")
    with Image.open(io.BytesIO(item.images[0].read())) as tile:
        assert tile.size == (6, 6) and tile.getpixel((0, 0)) == (80, 0, ord("a"))
    assert item.images[0].key == items["a/3/1"].images[0].key != items["a/2/4"].images[0].key
    assert item.group == "a" and item.fields["category"] == "relation - spatial"


def test_figures(data, task):
    items = task.load(data, "plain").items
    predictions = {item.id: "Yes." for item in items}
    assert task.score(items, predictions, "plain").numbers["overall"].value == 100
    # In tile 1 of picture a there is no cat, so neither its color nor its place count; b says nothing in tile 4.
    predictions |= {"a/1/1": "No, there is a dog.", "b/4/1": "maybe", "b/4/2": None}
    scores = task.score(items, predictions, "plain")
    assert scores.numbers["overall"].value == pytest.approx(100 * ((0.25 + 3) / 4 + 3 / 4) / 2)
    assert scores.numbers["entity"].value == pytest.approx(100 * 7 / 8)
    assert scores.numbers["attribute"].value == 100 and scores.numbers["global"].value == 75
    assert (scores.verdicts["a/1/1"].extracted, scores.verdicts["b/4/1"].outcome) == ("no", "wrong")
    assert scores.published == {} and scores.notes == [
        "published, by mPLUG: Janus 79.7, Janus-Pro-1B 82.6, Janus-Pro-7B 84.2"
    ]


def test_quirks(data, task):
    items = task.load(data, "quirks").items
    assert len(items) == 20 and "a/1/1" not in {item.id for item in items}
    predictions = {item.id: "yes" for item in items} | {"b/4/1": "no"}
    scores = task.score(items, predictions, "quirks")
    assert scores.notes[1:] == ["a is left out: question 2 depends on question 1, which is not there"]
    assert scores.numbers["overall"].value == pytest.approx(100 * 3.5 / 4)
    # The last tile alone.
    assert (scores.numbers["global"].value, scores.numbers["other"].value) == (0, 100)


def test_bad_input(data, task, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no data in .*empty; expected dpg_bench.csv \(github.com/TencentQQGYLab"):
        task.load(tmp_path / "empty", "plain")
    with pytest.raises(ValueError, match="dpg has no protocol report: the report's judge is mPLUG"):
        task.load(data, "report")
    Image.new("RGB", (12, 8)).save(data / "pictures" / "a.png")
    item = next(item for item in task.load(data, "plain").items if item.fields["item"] == "a")
    with pytest.raises(ValueError, match=r"a.png is 12 x 8, not a square of four pictures"):
        item.images[0].read()


@pytest.mark.slow
def test_through_the_command(folder, data, tmp_path):
    pictures, out = data / "pictures", tmp_path / "out"
    (pictures / "a.png").unlink()
    (pictures / "z.png").write_bytes(b"no picture")
    command = ["--model", str(folder), "--vqa", "self", "--pictures", str(pictures)]
    command += ["--tasks", "dpg", "--data", str(data), "--out", str(out)]
    assert main.main(command) == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["dpg"]["plain"]
    assert (found["answered"], found["headline"]) == (8, "overall")
    path = out / "dpg" / "predictions-plain.jsonl"
    head, *lines = path.read_text().splitlines()
    told = [json.dumps({**json.loads(line), "reply": "yes"}) for line in lines]
    path.write_text("\n".join([head, *told]) + "\n")
    assert main.main([*command, "--rescore"]) == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["dpg"]["plain"]
    assert found["numbers"]["overall"]["value"] == 100
