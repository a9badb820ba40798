"""Several real processes on one machine: the same run as in one, started, refused and stopped together."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.tiny.run import params_of, tiny_config, write_checkpoint, write_data
from janus_jax.config import PRESETS
from janus_jax.weights.adapters import peft_files
from tests.several import environment, free_port, launch, ours, outcome
from train.config import AdapterConfig, MeshConfig, SampleConfig
from train.run import faults, loop
from train.run.distributed import start as start_processes
from train.run.metrics import read_metrics

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start") / "model"))


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    """Of a process with four CPU devices."""
    return environment(4, JAX_DEFAULT_MATMUL_PRECISION="float32")


def write_config(path: pathlib.Path, folders: dict[str, str], start: str, **changes: str) -> pathlib.Path:
    """A config file that gives `tiny_config` with `changes`, which are Python expressions."""
    arguments = "".join(f", {key}={value}" for key, value in changes.items())
    path.write_text(
        "from examples.tiny.run import tiny_config\n"
        "from train.config import AdapterConfig, EvalConfig, MeshConfig, SampleConfig\n"
        "def get_config():\n"
        f"    return tiny_config({folders!r}, 'run', init_from={start!r}, mesh={MESH!r}{arguments})\n"
    )
    return path


def losses(folder: pathlib.Path, prefix: str = "train") -> list[float]:
    return [line[f"{prefix}/loss"] for line in read_metrics(folder) if f"{prefix}/loss" in line]


# ---------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def alone(folders, start, tmp_path_factory) -> pathlib.Path:
    """Six steps in one process on eight devices."""
    config = tiny_config(folders, tmp_path_factory.mktemp("alone"), init_from=start, mesh=MESH, steps=6)
    loop.train(config)
    return pathlib.Path(config.workdir)


@pytest.fixture(scope="module")
def shared(folders, start, env, tmp_path_factory) -> tuple[pathlib.Path, list]:
    """Four steps of the same run in two processes of four devices, with pictures, an evaluation and a checkpoint."""
    folder = tmp_path_factory.mktemp("shared")
    config = write_config(
        folder / "two.py", folders, start, samples="SampleConfig(every=4, prompts=('a red house',), images=2)"
    )
    return folder, outcome(launch(config, env, [folder, folder]))


@pytest.mark.slow
def test_two_processes_are_one_run(shared, alone):
    folder, told = shared
    assert [code for code, _, _ in told] == [0, 0], told
    np.testing.assert_allclose(losses(folder / "run"), losses(alone)[:4], rtol=1e-6)
    evaluated = [
        [line["eval/loss"] for line in read_metrics(f) if "eval/loss" in line] for f in (folder / "run", alone)
    ]
    np.testing.assert_allclose(evaluated[0], evaluated[1][:2], rtol=1e-6)
    assert (folder / "run" / "samples" / "0000004.png").exists()


@pytest.mark.slow
def test_only_process_0_talks(shared):
    _, told = shared
    assert "4 steps done" in told[0][1]
    assert ours(told[1][1]) == []


@pytest.mark.slow
def test_goes_on_in_one_process(shared, alone, folders, start, tmp_path):
    """From the checkpoint of two processes, on other devices, with the rows that are due."""
    folder, _ = shared
    shutil.copytree(folder / "run", tmp_path / "run")
    samples = SampleConfig(every=4, prompts=("a red house",), images=2)
    config = tiny_config(folders, tmp_path / "run", init_from=start, mesh=MeshConfig(fsdp=8), steps=6, samples=samples)
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    loop.train(config)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    ours, theirs = params_of(tmp_path / "run"), params_of(alone)
    for path, x in theirs.items():
        np.testing.assert_allclose(ours[path], x, atol=2e-5, rtol=1e-3, err_msg=path)


@pytest.mark.slow
def test_goes_on_in_four_processes(shared, alone, folders, start, env, tmp_path):
    folder, _ = shared
    shutil.copytree(folder / "run", tmp_path / "run")
    config = write_config(tmp_path / "four.py", folders, start, steps="6")
    told = outcome(launch(config, env | {"JAX_NUM_CPU_DEVICES": "2"}, [tmp_path] * 4))
    assert [code for code, _, _ in told] == [0] * 4, told
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-6)


@pytest.mark.slow
def test_an_adapter_in_two_processes(folders, start, env, tmp_path):
    """It is what one process trains, and process 0 alone writes it, once."""
    adapter = AdapterConfig(rank=2, targets=("decoder", "heads"), save=("gen_embed",))
    config = write_config(tmp_path / "two.py", folders, start, adapter=repr(adapter), steps="6")
    config.write_text(
        config.read_text() + "import jax\n"
        "from train.workdir import exports\n"
        "def counted(folder, *args, write=exports.write_adapter):\n"
        "    open('written', 'a').write(f'{jax.process_index()} ')\n"
        "    write(folder, *args)\n"
        "exports.write_adapter = counted\n"
    )
    told = outcome(launch(config, env, [tmp_path, tmp_path]))
    assert [code for code, _, _ in told] == [0, 0], told
    assert ours(told[1][1]) == [] and (tmp_path / "written").read_text() == "0 "

    whole = loop.train(tiny_config(folders, tmp_path / "one", init_from=start, mesh=MESH, adapter=adapter, steps=6))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-6)
    exported = tmp_path / "run" / "export" / "6"
    assert sorted(path.name for path in exported.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert (exported / peft_files.CONFIG).read_bytes() == (whole / peft_files.CONFIG).read_bytes()
    one, two = (load_file(folder / peft_files.WEIGHTS) for folder in (whole, exported))
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert np.abs(two[name] - x).max() <= 1e-6 * np.abs(x).max(), name
        assert x.any(), name


@pytest.mark.slow
def test_a_notice_to_one_ends_both(folders, start, env, tmp_path):
    config = write_config(tmp_path / "two.py", folders, start, steps="100000", save_every="100000")
    processes = launch(config, env, [tmp_path, tmp_path])
    for line in processes[0].stdout:
        if line.startswith("step 3/"):
            processes[1].send_signal(signal.SIGTERM)
            break
    told = outcome(processes)
    assert [code for code, _, _ in told] == [faults.AGAIN] * 2, told
    (saved,) = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert f"preempted; saved after step {saved}; run the same command to resume" in told[0][2]
    assert len(losses(tmp_path / "run")) >= 3


# ---------------------------------------------------------------- shipped configurations, for twenty steps


MESH_OVERRIDES = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


@pytest.mark.slow
def test_debug_in_two_processes(env, tmp_path):
    write_data(tmp_path / "data" / "debug", model=PRESETS["janus_tiny"], context=256)
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    for count, run in runs.items():
        overrides = [*MESH_OVERRIDES, "steps=20", "evaluation.every=20", "samples.every=0", f"workdir={run}"]
        own = env | {"JAX_NUM_CPU_DEVICES": str(8 // count)}
        told = outcome(launch("debug", own, [tmp_path] * count, *[overrides] * count))
        assert [code for code, _, _ in told] == [0] * count, told
    for prefix, count in (("train", 20), ("eval", 1)):
        one, two = (losses(run, prefix) for run in runs.values())
        assert len(one) == count
        np.testing.assert_allclose(two, one, rtol=1e-6)
    data = [json.loads((run / "run.json").read_text())["data"] for run in runs.values()]
    assert data[0] == data[1]


@pytest.mark.slow
def test_digits_in_two_processes(env, tmp_path):
    """Shortened. Process 0 prepares the data; the run in one process finds them, and the VQ tokenizer, done."""
    runs = {2: tmp_path / "two", 1: tmp_path / "one"}
    short = [
        "vq.steps=5",
        "split=validation",
        "images_per_class=1",
        "stages.0.steps=2",
        "stages.1.steps=2",
        "stages.2.steps=20",
    ]
    for stage in range(3):
        short += [f"stages.{stage}.log_every=1", f"stages.{stage}.samples.every=0"]
        short += [f"stages.{stage}.{override}" for override in MESH_OVERRIDES]
    for count, run in runs.items():
        if count == 1:
            for name in ("tokenizer", "vq", "sources", "prepared"):
                shutil.copytree(runs[2] / name, run / name)
        overrides = [*short, f"workdir={run}"]
        own = env | {"JAX_NUM_CPU_DEVICES": str(8 // count)}
        told = outcome(launch("digits", own, [tmp_path] * count, *[overrides] * count))
        assert [code for code, _, _ in told] == [0] * count, told
        assert "understanding" in told[0][1] and all(ours(out) == [] for _, out, _ in told[1:])
    for stage, count in (("stage1", 2), ("stage2", 2), ("stage3", 20)):
        one, two = (losses(runs[processes] / stage) for processes in (1, 2))
        assert len(one) == count
        np.testing.assert_allclose(two, one, rtol=1e-6)


# ---------------------------------------------------------------- refused together, before the first step


def refusal(told: list[tuple[int, str, str]]) -> str:
    """The one line that process 0 tells, with the exit code of bad input from all."""
    assert [code for code, _, _ in told] == [faults.BAD_INPUT] * len(told), told
    lines = [line for line in told[0][2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in told[0][2]
    assert not [line for line in told[1][2].splitlines() if line.startswith("error: ")]
    return lines[0]


@pytest.mark.slow
def test_another_configuration_is_found_out(folders, start, env, tmp_path):
    config = write_config(tmp_path / "two.py", folders, start)
    line = refusal(outcome(launch(config, env, [tmp_path] * 2, [], ["optimizer.learning_rate=0.5"])))
    assert "process 1 (" in line and "optimizer.learning_rate is 0.5 there, 0.003 on process 0" in line


@pytest.mark.slow
def test_other_data_and_missing_data_are_found_out(folders, start, env, tmp_path):
    """Folders of the same name that hold other samples, or none, on the second host."""
    hosts = [tmp_path / name for name in ("first", "second", "third")]
    for seed, host in enumerate(hosts[:2]):
        write_data(host / "data", count=12, seed=seed)
    hosts[2].mkdir()
    relative = {kind: f"data/{kind}" for kind in ("understanding", "text", "generation")}
    relative["tokenizer"] = folders["tokenizer"]
    config = write_config(tmp_path / "two.py", relative, start)
    line = refusal(outcome(launch(config, env, [hosts[0], hosts[1]])))
    assert "the data of process 1 (" in line and "differs from process 0's" in line and "data/" in line
    line = refusal(outcome(launch(config, env, [hosts[0], hosts[2]])))
    assert "process 1 (" in line and "data/understanding" in line
    assert not (hosts[0] / "run").exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_found_out(folders, start, env, tmp_path, monkeypatch):
    hosts = [tmp_path / name for name in ("first", "second")]
    for host in hosts:
        host.mkdir()
    config = write_config(tmp_path / "two.py", folders, start)
    config.write_text(config.read_text() + "from train.run import checkpoints\ncheckpoints._SEEN_WITHIN = 1\n")
    line = refusal(outcome(launch(config, env, hosts)))
    assert "workdir=run is not the folder that process 0 sees" in line and "storage that all hosts share" in line


def test_a_coordinator_that_does_not_answer(folders, start, env, tmp_path):
    config = write_config(tmp_path / "two.py", folders, start)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "train.main", "--config", str(config), "--coordinator", f"localhost:{free_port()}",
         "--processes", "2", "--process", "1", "--timeout", "3"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == faults.BAD_INPUT and time.monotonic() - began < 60
    assert "cannot be reached within 3 seconds (--timeout)" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"coordinator": "localhost:1"}, "go together"),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, "host:port"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "--processes 2, got 2"),
    ],
)
def test_flags_that_do_not_go_together(flags, told):
    with pytest.raises(ValueError, match=told):
        start_processes(**flags)


@pytest.mark.slow
def test_run_json_is_the_same_for_any_number_of_processes(shared, alone):
    runs = [json.loads((folder / "run.json").read_text()) for folder in (shared[0] / "run", alone)]
    assert runs[0]["data"] == runs[1]["data"]
