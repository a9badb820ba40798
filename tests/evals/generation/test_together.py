"""Drawn and looked at by small random models of every kind, through the command, on one process and on two."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.evals.generation.test_detector import clip, mask2former  # noqa: F401
from tests.evals.generation.test_drawn import data  # noqa: F401
from tests.evals.generation.test_vqa import blip  # noqa: F401
from tests.library.tiny_janus import folder, nearly_equal  # noqa: F401
from tests.several import environment, free_port, ours, outcome

DRAWN = ("geneval", "dpg")


def start(out: pathlib.Path, devices: int, *more: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "evals.main", "--out", out, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = environment(devices, JAX_DEFAULT_MATMUL_PRECISION="float32")
    return subprocess.Popen([str(each) for each in command], env=env, **pipes)


def pictures(out: pathlib.Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(each for name in DRAWN for each in (out / name / "pictures").rglob("*.png")):
        with Image.open(path) as picture:
            found[str(path.relative_to(out))] = np.asarray(picture)
    return found


def replies(out: pathlib.Path) -> dict[str, str]:
    lines = [line for path in out.rglob("predictions-*.jsonl") for line in path.read_text().splitlines()[1:]]
    return {line["id"]: line["reply"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_two_processes_draw_and_score_as_one(folder, data, mask2former, clip, blip, tmp_path):
    """Each has a disk of its own; both end with the pictures, and the first one with replies and results."""
    mask2former.save_pretrained(tmp_path / "detector")
    given = ("--model", folder, "--data", data, "--tasks", "geneval,dpg", "--vqa", "self")
    given += ("--detector", tmp_path / "detector", "--clip", clip)
    one, first, second = (tmp_path / name for name in ("one", "first", "second"))
    alone = outcome([start(one, 1, *given)])
    assert alone[0][0] == 0, alone
    several = (*given, "--mesh", "data=4", "--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process")
    ended = outcome([start(out, 2, *several, index) for index, out in enumerate((first, second))])
    assert [code for code, *_ in ended] == [0, 0], ended
    assert not ours(ended[1][1])
    expected = pictures(one)
    assert len(expected) == 2 * 5 + 2
    for out in (first, second):
        found = pictures(out)
        assert found.keys() == expected.keys()
        assert all(nearly_equal(found[name][None], expected[name][None]) for name in expected)
    assert len(replies(one)) == 8 + 24 and replies(first) == replies(one) and not replies(second)
    tasks = [json.loads((out / "results.json").read_text())["tasks"] for out in (one, first)]
    for name, protocol in (("geneval", "transformers"), ("dpg", "plain")):
        numbers = [each[name][protocol]["numbers"] for each in tasks]
        assert numbers[0] == numbers[1] and numbers[0]["overall"]["count"] == {"geneval": 8, "dpg": 2}[name]
    assert not (second / "results.json").exists()
    # Killed between drawing and looking, and started again.
    killed = tmp_path / "killed"
    process = start(killed, 1, *given)
    while process.poll() is None and not (killed / "geneval" / "pictures" / "00001" / "grid.png").exists():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    ended = outcome([start(killed, 1, *given)])
    assert ended[0][0] == 0 and replies(killed) == replies(one), ended
    assert {name: each.tobytes() for name, each in pictures(killed).items()} == {
        name: each.tobytes() for name, each in expected.items()
    }
    # The same pictures by another judge, of transformers.
    judged = tmp_path / "judged"
    given = ("--pictures", one / "dpg" / "pictures", "--tasks", "dpg", "--data", data, "--vqa", blip)
    again = outcome([start(judged, 1, *given)])
    assert again[0][0] == 0, again
    (found,) = json.loads((judged / "results.json").read_text())["tasks"]["dpg"].values()
    assert found["answered"] == 24 and found["judge"] == blip.name and found["published"] == {}
