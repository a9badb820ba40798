"""Whole runs in a store, killed and resumed: what comes of them is what a run on a local disk comes to."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import params_of, write_checkpoint, write_data
from tests import emulated_stores
from tests.several import environment, launch, outcome
from tests.stores.conftest import upload
from train.overrides import load_config
from train.run import loop
from train.run.metrics import read_metrics
from train.step.earlier import complete_steps

TIMED = ("tokens_per_second", "seconds_per_step", "data_wait", "mfu")


class Run:
    """`python -m train.main --config debug`, 20 steps over `folders` with what it prints in `log`."""

    def __init__(self, workdir, folders: dict[str, str], cache: pathlib.Path, log: pathlib.Path):
        kinds = ("understanding", "text", "generation")
        data = [f"{place}.{kind}={folders[kind]}" for place in ("data", "evaluation") for kind in kinds]
        command = [
            "--config", "debug", "steps=20", f"workdir={workdir}", f"tokenizer={folders['tokenizer']}", *data,
            "samples.every=20", "samples.images=1", "evaluation.every=10",
        ]  # fmt: skip
        env = environment(1, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        self.log, self.errors = log, log.with_suffix(".err")
        with log.open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train.main", *command], stdout=out, stderr=errors, env=env
            )

    def kill_after(self, step: int):
        deadline = time.monotonic() + 900
        while not re.search(rf"^step {step}/20", self.log.read_text(), re.MULTILINE):
            assert self.process.poll() is None and time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.05)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> str:
        assert self.process.wait(900) == 0, self.errors.read_text()
        return self.log.read_text()


def history(workdir) -> list[dict]:
    return [{name: x for name, x in line.items() if not name.endswith(TIMED)} for line in read_metrics(workdir)]


TWO = """
from examples.tiny.run import tiny_config
from train.config import MeshConfig
def get_config():
    return tiny_config({folders!r}, "run", init_from={start!r}, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
"""


@pytest.mark.slow
def test_two_processes_share_a_workdir_in_a_store(store, tmp_path):
    """Each writes its own shards; process 0 completes the checkpoint and the export once both have."""
    folder, _ = store
    folders, start = write_data(tmp_path / "data"), write_checkpoint(tmp_path / "start")
    config = tmp_path / "two.py"
    config.write_text(TWO.format(folders=folders, start=str(start)))
    env = environment(4, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))
    for workdir in (tmp_path / "run", folder / "run"):
        told = outcome(launch(config, env, [tmp_path] * 2, *[[f"workdir={workdir}"]] * 2))
        assert [code for code, _, _ in told] == [0, 0], told
    ours, theirs = params_of(folder / "run"), params_of(tmp_path / "run")
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert history(folder / "run") == history(tmp_path / "run")
    one, two = (janus_jax.load(os.fspath(place / "run/export/4"), fused=False) for place in (folder, tmp_path))
    for mine, other in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
    # One process on other devices goes on from what the two have written.
    again = load_config(str(config), [f"workdir={folder / 'run'}", "steps=5", "mesh.tensor=1", "mesh.fsdp=4"])
    loop.train(again)
    assert max(complete_steps(folder / "run")) == 5


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> tuple[pathlib.Path, dict[str, str], pathlib.Path]:
    """The folder of the run on a local disk, its data, and the cache of compiled programs."""
    folder = tmp_path_factory.mktemp("disk")
    config = load_config("debug")
    folders = write_data(folder / "data", model=config.model, context=config.data.context)
    Run(folder / "run", folders, folder / "compiled", folder / "log").end()
    return folder / "run", folders, folder / "compiled"


@pytest.mark.slow
def test_a_killed_run_in_a_store_is_the_run_on_a_disk(store, on_disk, tmp_path, monkeypatch):
    """Data, tokenizer and workdir in a store that answers late, fails and hangs up."""
    monkeypatch.setenv("JANUS_JAX_CACHE", str(tmp_path / "cache"))
    folder, proxy = store
    local, folders, compiled = on_disk
    there = {name: str(upload(pathlib.Path(path), folder / name)) for name, path in folders.items()}
    with emulated_stores.slow(proxy, 0.2), proxy.failing(share=0.02) as faults:
        Run(folder / "run", there, compiled, tmp_path / "first").kill_after(10)
        assert max(complete_steps(folder / "run")) in (4, 8)
        told = Run(folder / "run", there, compiled, tmp_path / "second").end()
    assert min(faults.values()) > 3
    assert re.search(r"resuming after step [48]\n", told) and f"exported to {folder}/run/export/20" in told
    ours, theirs = params_of(folder / "run"), params_of(local)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert history(folder / "run") == history(local)
    # Of the steps in whose time nothing was compiled.
    waits = [line["train/data_wait"] for line in read_metrics(folder / "run") if "train/data_wait" in line]
    assert np.mean(waits[11:]) < 0.05, waits
    for name in ("samples/0000020.png", "export/20/tokenizer.json", "export/20/config.json"):
        assert (folder / "run" / name).read_bytes() == (local / name).read_bytes(), name
    names = {path.relative_to(folder / "run").parts[0] for path in (folder / "run").walk()}
    assert names == {
        "checkpoints",
        "export",
        "frozen",
        "metrics.jsonl",
        "run.json",
        "samples",
        "tensorboard",
        "curves.png",
    }
    # What is drawn from the export, in the store and on the disk.
    one, two = (janus_jax.load(os.fspath(place / "export" / "20")) for place in (folder / "run", local))
    (ours,), (theirs,) = (janus.generate_images(["a red bicycle"], seed=1, progress=False) for janus in (one, two))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
