"""Pictures of the benchmarks of drawing: what is drawn, where it lies, what goes on and what is refused."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from evals.generation import draw
from evals.generation.drawing import draw_all, settle, write_map
from evals.generation.prompts import BENCHMARKS
from tests.library.tiny_janus import folder, nearly_equal  # noqa: F401

PROMPTS = [f"a photo of {n} cups" for n in range(5)]


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    rows = [{"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": each} for each in PROMPTS]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


class Brush:
    """Pictures that show prompt and number by their color; stops after so many calls."""

    def __init__(self, calls=100):
        self.calls, self.asked = calls, []

    def __call__(self, prompts, count):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked.append(list(prompts))
        return [Image.new("RGB", (4, 4), (len(prompt), number, 7)) for prompt in prompts for number in range(count)]


def read(name, prompts, out, samples=None):
    reader, default = BENCHMARKS[name]
    return reader(prompts, out, samples or default)


def test_geneval_goes_on_where_it_was(geneval, tmp_path):
    out = tmp_path / "out"
    drawings = read("geneval", geneval, out)
    first = Brush(calls=2)
    with pytest.raises(KeyboardInterrupt):
        draw_all(drawings, first, "geneval", per_call=8, progress=False)
    assert first.asked == [PROMPTS[:2], PROMPTS[2:4]]
    # Killed between two files of a folder: it is drawn again.
    (out / "00003" / "grid.png").unlink()
    (out / "00003" / "samples" / "00002.png").unlink()
    second = Brush()
    draw_all(drawings, second, "geneval", per_call=8, progress=False)
    assert second.asked == [PROMPTS[3:]]
    for number, prompt in enumerate(PROMPTS):
        assert json.loads((out / f"{number:05}" / "metadata.jsonl").read_text())["prompt"] == prompt
        for sample in range(4):
            with Image.open(out / f"{number:05}" / "samples" / f"{sample:05}.png") as picture:
                assert picture.getpixel((0, 0)) == (len(prompt), sample, 7)
    draw_all(drawings, Brush(calls=0), "geneval", per_call=8, progress=False)


def test_dpg(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "whoops1.txt").write_text("A cat.\n")
    (tmp_path / "prompts" / "7.txt").write_text("A dog ran.")
    drawings = read("dpg", tmp_path / "prompts", tmp_path / "out")
    assert [(each.prompt, each.last.name) for each in drawings] == [("A dog ran.", "7.png"), ("A cat.", "whoops1.png")]
    draw_all(drawings, Brush(), "dpg", per_call=1, progress=False)
    with Image.open(tmp_path / "out" / "whoops1.png") as picture:
        assert [picture.getpixel(at) for at in ((0, 0), (4, 0), (0, 4), (7, 7))] == [(6, n, 7) for n in range(4)]
    with pytest.raises(ValueError, match="DPG-Bench takes 4 pictures of a prompt, got --samples 2"):
        read("dpg", tmp_path / "prompts", tmp_path / "out", 2)
    with pytest.raises(ValueError, match="is not a folder of prompts"):
        read("dpg", tmp_path / "out", tmp_path / "out")


def test_wise_and_geneval_2(tmp_path):
    (tmp_path / "wise").mkdir()
    (tmp_path / "wise" / "cultural.json").write_text('[{"Prompt": "A feast", "prompt_id": 12, "Category": "x"}]')
    drawings = read("wise", tmp_path / "wise", tmp_path / "out")
    draw_all(drawings, Brush(), "wise", per_call=64, progress=False)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["12.png"]
    (tmp_path / "wise" / "bad.json").write_text('[{"Prompt": "A feast"}]')
    with pytest.raises(ValueError, match=r"bad.json: prompt 0 must have Prompt and prompt_id"):
        read("wise", tmp_path / "wise", tmp_path / "out")
    (tmp_path / "geneval2_data.jsonl").write_text('{"prompt": "a"}\n{"prompt": "bc"}\n')
    drawings = read("geneval2", tmp_path / "geneval2_data.jsonl", tmp_path / "two")
    draw_all(drawings, Brush(), "geneval2", per_call=64, progress=False)
    write_map(tmp_path / "two", drawings)
    files = json.loads((tmp_path / "two" / "images.json").read_text())
    assert files == {"a": str(tmp_path / "two" / "00000.png"), "bc": str(tmp_path / "two" / "00001.png")}
    with pytest.raises(ValueError, match="this benchmark takes 1 picture of a prompt, got --samples 4"):
        read("geneval2", tmp_path / "geneval2_data.jsonl", tmp_path / "two", 4)


def test_pictures_drawn_otherwise_are_refused(tmp_path):
    settle(tmp_path / "out", {"model": "a", "files": "12", "seed": 42})
    settle(tmp_path / "out", {"model": "b", "files": "12", "seed": 42})
    with pytest.raises(ValueError, match="out holds pictures that were drawn otherwise: seed 42, not 43"):
        settle(tmp_path / "out", {"model": "a", "files": "12", "seed": 43})


def test_bad_input_is_one_line(geneval, tmp_path, capsys):
    command = ["--model", str(tmp_path), "--benchmark", "geneval", "--out", str(tmp_path / "out")]
    for more, message in (
        (["--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--prompts", str(geneval), "--samples", "0"], "--samples must be"),
        (["--prompts", str(geneval)], "config.json"),
    ):
        assert draw.main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_draws_what_the_pipeline_draws(folder, geneval, tmp_path, capsys):
    from janus_jax import load

    out = tmp_path / "out"
    command = ["--model", str(folder), "--benchmark", "geneval", "--prompts", str(geneval), "--out", str(out)]
    assert draw.main([*command, "--limit", "2"]) == 0
    assert "2 of 5 prompts are drawn" in capsys.readouterr().out
    expected = load(folder).generate_images(PROMPTS[:2], 4, seed=42)
    drawn = []
    for number in (0, 1):
        for sample in range(4):
            with Image.open(out / f"{number:05}" / "samples" / f"{sample:05}.png") as picture:
                drawn.append(np.asarray(picture))
    assert nearly_equal(np.stack(drawn), np.stack(expected))
    assert draw.main([*command, "--limit", "3", "--seed", "1"]) == 2
    assert "seed 42, not 1" in capsys.readouterr().err
