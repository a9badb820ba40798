"""Whole runs of two processes whose devices look like an accelerator's: branches that the CPU never takes."""

from __future__ import annotations

import pathlib
import signal

import numpy as np
import pytest
from PIL import Image

from examples.tiny.run import MODEL, params_of, write_checkpoint, write_data
from tests.several import environment, launch, outcome
from train.run.metrics import read_metrics


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    """Of a process with one device, which looks like a TPU's."""
    return environment(1, JANUS_JAX_EMULATE="tpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("config")
    folders = write_data(folder / "data", count=12)
    start = str(write_checkpoint(folder / "start"))
    kinds = {kind: (folders[kind],) for kind in ("understanding", "text", "generation")}
    path = folder / "two.py"
    path.write_text(
        "from examples.tiny.run import tiny_config\n"
        "from train.config import EvalConfig, MeshConfig, SampleConfig\n"
        "def get_config():\n"
        f"    return tiny_config({folders!r}, 'run', init_from={start!r}, mesh=MeshConfig(fsdp=2), attention='xla',\n"
        f"        stage=1, steps=2, batch_size=4, evaluation=EvalConfig(**{kinds!r}, every=2, batches=1),\n"
        "        samples=SampleConfig(every=2, prompts=('a red house', 'a tree'), images=1))\n"
    )
    return path


def start(config: pathlib.Path, env: dict[str, str], folder: pathlib.Path, *overrides: str):
    return launch(config, env, [folder] * 2, *[list(overrides)] * 2, module="tests.emulated")


def check(folder: pathlib.Path, steps: int):
    """The run in `folder` has all that its `steps` steps give."""
    lines = read_metrics(folder)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    assert [line["step"] for line in lines if "eval/loss" in line] == list(range(2, steps + 1, 2))
    assert {line["train/failures"] for line in trained} == {0} and not (folder / "failures.txt").exists()
    for step in range(2, steps + 1, 2):
        sheet = Image.open(folder / "samples" / f"{step:07d}.png")
        assert sheet.height > 2 * MODEL.gen_vision.image_size and len(sheet.getcolors(1 << 16)) > 10
    assert (folder / "export" / str(steps) / "config.json").exists()
    left = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert not left & {"lease.json", "tries.json", "failed"}


@pytest.mark.slow
def test_trains_evaluates_draws_and_saves(config, env, tmp_path):
    told = outcome(start(config, env, tmp_path))
    assert [code for code, _, _ in told] == [0, 0], told
    assert "2 steps done" in told[0][1] and "failed" not in told[0][1]
    check(tmp_path / "run", 2)


@pytest.mark.slow
def test_killed_and_resumed_it_comes_to_the_same(config, env, tmp_path):
    told = outcome(start(config, env, tmp_path, "steps=6", "workdir=whole"))
    assert [code for code, _, _ in told] == [0, 0], told
    check(tmp_path / "whole", 6)
    for step in (3, 5):
        processes = start(config, env, tmp_path, "steps=6", "workdir=run")
        for line in processes[0].stdout:
            if line.startswith(f"step {step}/"):
                break
        for process in processes:
            process.send_signal(signal.SIGKILL)
        assert [code for code, _, _ in outcome(processes)] == [-signal.SIGKILL] * 2
    told = outcome(start(config, env, tmp_path, "steps=6", "workdir=run"))
    assert [code for code, _, _ in told] == [0, 0], told
    assert "resuming after step 4" in told[0][1]
    check(tmp_path / "run", 6)
    ours, theirs = params_of(tmp_path / "run"), params_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)
