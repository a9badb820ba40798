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
from flax import traverse_util

import janus_jax
from examples.tiny.run import MODEL, params_of, random_params, tiny_config, write_data
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.weights.checkpoint import load_params
from janus_jax.weights.store_arrays import read_tree
from tests import emulated_stores
from tests.several import environment, free_port, outcome
from tests.stores.conftest import upload
from train.overrides import load_config
from train.run.metrics import read_metrics
from train.step import earlier
from train.step.earlier import complete_steps
from train.step.leaves import split

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


_TWO = """
import sys
import jax, numpy as np
from examples.tiny.run import MODEL, random_params, tiny_config
from janus_jax.sharding import make_mesh, param_shardings
from train.run import distributed
from train.run.checkpoints import Workdir
from train.step.leaves import split
from train.step.state import TrainState

workdir, tokenizer, coordinator, process = sys.argv[1:]
distributed.start(coordinator, 2, int(process))
absent = dict.fromkeys(("understanding", "text", "generation"), "absent")
config = tiny_config(absent | {"tokenizer": tokenizer}, workdir)
mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1})
whole = random_params(MODEL)
shardings = param_shardings(whole, mesh)
params = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), whole, shardings)
trained, frozen = split(params, config.stage)
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
count = jax.jit(lambda: jax.numpy.int32(2), out_shardings=everywhere)()
with jax.set_mesh(mesh), Workdir(config, {}) as opened:
    opened.save_frozen(frozen)
    for step in (2, 4):
        opened.note_damaged(step, [f"a sample of process {process}"])
        opened.save(step, TrainState(count, trained, {"mu": trained}, count))
    opened.wait()
    print(opened.export(4, trained, frozen))
"""


@pytest.mark.slow
def test_two_processes_share_a_workdir_in_a_store(store, tmp_path):
    """Each writes its own shards; process 0 completes the checkpoint and the export once both have."""
    folder, _ = store
    write_tokenizer(tmp_path, image_size=MODEL.vision.image_size, num_image_tokens=MODEL.vision.num_patches)
    door = f"localhost:{free_port()}"
    command = [sys.executable, "-c", _TWO, str(folder / "run"), str(tmp_path), door]
    told = outcome([
        subprocess.Popen(
            [*command, str(process)], env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for process in range(2)
    ])  # fmt: skip
    assert [code for code, _, _ in told] == [0, 0], told
    assert told[0][1].endswith(f"{folder}/run/export/4\n") and complete_steps(folder / "run") == [2, 4]
    for process in range(2):
        lines = (folder / "run" / f"damaged-{process}.txt").read_text().splitlines()
        assert lines == [f"step {step}: left out a sample of process {process}" for step in (2, 4)]
    names = [path.name for path in (folder / "run/checkpoints/4").walk()]
    assert names.count("part-1") == 1 and not any(name.startswith("shared-") for name in names)
    whole, found = random_params(MODEL), params_of(folder / "run")
    flat = {"/".join(path): array for path, array in traverse_util.flatten_dict(whole).items()}
    assert found.keys() == flat.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    config = tiny_config(dict.fromkeys(("understanding", "text", "generation", "tokenizer"), "absent"), folder / "run")
    trained, _ = split(whole, config.stage)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), trained)
    rest = read_tree(earlier.whole(folder / "run/checkpoints/4") / "rest", {"opt_state": {"mu": abstract}})
    for ours, wanted in zip(jax.tree.leaves(rest), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), wanted)
    exported = load_params(folder / "run/export/4", as_numpy=True)
    for ours, wanted in zip(jax.tree.leaves(exported), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, wanted.astype(ours.dtype))


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
