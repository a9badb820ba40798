"""Benchmarks during training: figures in the metrics, gone on with, on meshes and processes, refused in time."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals import main as evals_main
from evals.tasks import TASKS
from examples.tiny.run import random_params, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import make_mesh
from tests.evals.asking.toy import Toy, without_model
from tests.evals.asking.toy import write_data as write_toy
from tests.library.tiny_janus import raises_one_line
from tests.several import environment, launch, outcome
from train.config import AdapterConfig, EvalConfig, EvalsConfig, MeshConfig, TrainConfig
from train.run import loop
from train.run.callbacks import Moment, Run
from train.run.checkpoints import Workdir
from train.run.failures import Failures
from train.run.faults import Watchdog
from train.run.metrics import Metrics, read_metrics
from train.step.leaves import split
from train.step.state import TrainState
from train.validate import validate
from train.watch import benchmarks, dry_run

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", Toy())

    def mesh(shape):
        return make_mesh(shape, jax.devices()[: math.prod(abs(size) for size in shape.values())])

    monkeypatch.setattr(loop, "make_mesh", mesh)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"), count=12)


@pytest.fixture(scope="module")
def start(folders, tmp_path_factory) -> str:
    folder = write_checkpoint(tmp_path_factory.mktemp("start") / "model")
    for path in pathlib.Path(folders["tokenizer"]).iterdir():
        shutil.copy(path, folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_toy(tmp_path_factory.mktemp("toy") / "toy"))


@pytest.fixture
def config(folders, start, data, tmp_path) -> TrainConfig:
    return tiny_config(
        folders, tmp_path / "run", init_from=start, evaluation=EvalConfig(),
        evals=EvalsConfig(every=2, tasks=("toy",), data=data),
    )  # fmt: skip


def still(config: TrainConfig) -> TrainConfig:
    """Two steps that change nothing, so that roundings do not matter."""
    rate = dataclasses.replace(config.optimizer, learning_rate=1e-12)
    return dataclasses.replace(config, optimizer=rate, steps=2)


def figures(config: TrainConfig) -> dict[int, float]:
    lines = [line for line in read_metrics(config.workdir) if "evals/toy/items" in line]
    return {line["step"]: line["evals/toy/accuracy"] for line in lines}


def replies(folder: pathlib.Path) -> dict[str, str]:
    _, *lines = (folder / "toy" / "predictions-report.jsonl").read_text().splitlines()
    return {line["id"]: line["reply"] for line in map(json.loads, lines)}


# ---------------------------------------------------------------- a run


@pytest.fixture
def start_at(config, monkeypatch):
    """Calls the callback as a run does that resumes after some steps, or comes to them; nothing is compiled for it."""
    without_model(monkeypatch)
    mesh = make_mesh({}, jax.devices()[:1])
    processor = Processor.from_folder(config.tokenizer, config.model)
    parameters = random_params()

    def start(done: int, hook: str = "resume", scale: float = 1.0):
        trained, frozen = split(jax.tree.map(lambda x: jnp.asarray(x * np.float32(scale)), parameters), config.stage)
        state = TrainState(jnp.int32(done), trained, {}, jnp.int32(0))
        with Workdir(config, {}) as workdir, jax.set_mesh(mesh), Watchdog(0) as watchdog:
            failures = Failures(workdir.folder)
            with Metrics(workdir.folder, config.steps, done, failures=failures, writers=()) as metrics:
                run = Run(config, mesh, processor, workdir, metrics, failures, watchdog)
                callback = benchmarks.Benchmarks(run, benchmarks.load_tasks(config.evals))
                getattr(callback, hook)(Moment(done, state, frozen, last=done == config.steps))
            return watchdog

    return start


def forget_figures(config: TrainConfig):
    path = pathlib.Path(config.workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"evals/' not in line))


def test_a_run_asks_and_goes_on_with_it(config, start_at, data, monkeypatch, capsys):
    """Figures and files every two steps; what an earlier start has asked is not asked again, what fails is told."""
    asked, real = [], benchmarks.Respondent.ask
    monkeypatch.setattr(benchmarks.Respondent, "ask", lambda self, items: asked.extend(items) or real(self, items))
    for done in (1, 2, 3):
        start_at(done, "after", scale=done)
    assert start_at(4, "after", scale=4)._doing == "asking toy after step 4: 0 items left"
    folder, out = pathlib.Path(config.workdir), pathlib.Path(config.workdir) / "evals" / "0000004"
    whole = figures(config)
    assert list(whole) == [2, 4] and len(asked) == 40
    line = read_metrics(folder)[-1]
    assert line["evals/toy/items"] == 20 and line["evals/toy/seconds"] > 0
    told = capsys.readouterr().out
    assert f"step 4/4  evals  toy/accuracy {whole[4]:.4g}\n" in told and "toy/items" not in told
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["model"] == "tiny, step 4" and results["model"]["dtype"] == "float32"
    assert results["tasks"]["toy"]["report"]["numbers"]["accuracy"]["value"] == whole[4]
    earlier = json.loads((folder / "evals" / "0000002" / "results.json").read_text())
    assert results["model"]["parameters"] != earlier["model"]["parameters"]

    # It is a folder of the command, which makes the page of it.
    assert evals_main.main(["--tasks", "toy", "--data", data, "--out", str(out), "--rescore"]) == 0
    again = json.loads((out / "results.json").read_text())
    assert again == results and (out / "report.html").exists()

    # As if it had been killed in the middle of asking after the last step.
    there, path = replies(out), out / "toy" / "predictions-report.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    forget_figures(config)
    start_at(4, scale=4)
    assert len(asked) == 49 and replies(out) == there and figures(config) == {4: whole[4]}
    start_at(4, scale=4)
    assert len(asked) == 49

    # With other parameters, as after another way to the same step, nothing of the earlier replies is kept.
    start_at(4, "after", scale=3)
    assert len(asked) == 69 and json.loads((out / "model.json").read_text()) != results["model"]

    forget_figures(config)
    path.write_text("no JSON\n")
    capsys.readouterr()
    start_at(4, scale=3)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: the benchmarks after step 4 (ValueError: ") and "predictions-report.jsonl" in line
    assert not figures(config) and "predictions-report.jsonl" in (folder / "failures.txt").read_text()


def test_what_cannot_be_asked_is_told(config, start_at, data, capsys, tmp_path, monkeypatch):
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    (bad / "1.png").write_bytes(b"no picture")
    monkeypatch.setattr(benchmarks, "local_only", lambda _: bad)
    start_at(4, "after")
    told = capsys.readouterr().out
    assert "note: toy: 6 items could not be asked and are left out; the first is 1-0: " in told and "1.png" in told
    assert read_metrics(config.workdir)[-1]["evals/toy/items"] == 14


@pytest.mark.slow
def test_a_whole_run(config):
    loop.train(dataclasses.replace(config, evals=dataclasses.replace(config.evals, limit=6)))
    folder = pathlib.Path(config.workdir)
    assert list(figures(config)) == [2, 4]
    assert [len(replies(folder / "evals" / f"{step:07d}")) for step in (2, 4)] == [6, 6]
    assert not (folder / "failures.txt").exists()
    first, second = (json.loads((folder / "evals" / f"{step:07d}" / "model.json").read_text()) for step in (2, 4))
    assert first["parameters"] != second["parameters"]


def test_parameters_are_told_apart():
    mesh = make_mesh({"fsdp": 8})
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
    bits = int(benchmarks._bits({"a": jnp.asarray(x)}))
    assert int(benchmarks._bits({"a": split})) == bits
    x[3, 3] = np.nextafter(x[3, 3], 1)
    assert int(benchmarks._bits({"a": jnp.asarray(x)})) != bits


def test_names_of_figures():
    assert benchmarks.plain("F1 mean of splits") == "f1_mean_of_splits"
    assert benchmarks.plain("vanilla-all FP-C") == "vanilla_all_fp_c"


# ---------------------------------------------------------------- refused before the first step


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tasks": ("pop",)}, "evals: unknown task pop; did you mean pope?"),
        (
            {"tasks": ("toy", "mmvet")},
            "evals: mmvet is scored by a judge alone, which a run does not ask; leave it out",
        ),
        ({"tasks": ("geneval",)}, "evals: geneval is drawn, and others look at it: score an export with evals.main"),
        ({"protocol": "terze"}, "evals: toy has no protocol 'terze'; did you mean terse?"),
        ({"tasks": ("pope",)}, "evals: POPE: no data in "),
        ({"data": "nowhere", "tasks": ("mme",)}, "evals: nowhere is not a folder"),
        ({"data": "gs://bucket/data"}, "evals: gs://bucket/data is in a store"),
    ],
)
def test_what_a_run_cannot_ask(config, changes, match):
    asked = dataclasses.replace(config.evals, **changes)
    with raises_one_line(re.escape(match)):
        benchmarks.load_tasks(asked)
    found = dry_run.Findings()
    assert not dry_run._evals(found, dataclasses.replace(config, evals=asked)) and not found.rows
    assert len(found.problems) == 1 and match in found.problems[0]


def test_what_a_dry_run_says(config, data):
    found = dry_run.Findings()
    (asked,) = dry_run._evals(found, config)
    assert found.rows == [("evals", f"toy (report): {data}/toy.json: 20 questions")] and not found.problems
    other = dataclasses.replace(asked, loaded=dataclasses.replace(asked.loaded, items=asked.loaded.items[1:]))
    assert benchmarks.fingerprints([asked]) != benchmarks.fingerprints([other])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tasks": ()}, "evals.every=2, but evals.tasks is empty"),
        ({"data": ""}, "evals.every=2, but evals.data names no folder"),
        ({"every": -1}, "evals.every must be at least 0 (0 for never), got -1"),
        ({"limit": -1}, "evals.limit must be at least 0 (0 for all), got -1"),
        ({"batch_size": -4}, "evals.batch_size must be at least 0 (0 for as many as fit), got -4"),
    ],
)
def test_settings_that_cannot_work(config, changes, match):
    with raises_one_line(re.escape(match)):
        validate(dataclasses.replace(config, evals=dataclasses.replace(config.evals, **changes)))


def test_settings_that_are_probably_not_intended(config):
    def remarks(**changes: int) -> list[str]:
        told = validate(dataclasses.replace(config, evals=dataclasses.replace(config.evals, **changes)))
        return [remark for remark in told if "evals" in remark]

    assert remarks() == remarks(every=4) == []
    assert remarks(every=3)[0].startswith("evals.every=3 is no multiple of save_every=2: ")
    assert remarks(every=0) == ["evals.tasks=toy are not asked: evals.every is 0"]


# ---------------------------------------------------------------- with the model


@pytest.fixture(scope="module")
def expected(start, data, tmp_path_factory) -> dict[str, str]:
    """What `evals.main` gets of the model that runs start from."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "toy", Toy())
        assert evals_main.main(["--model", start, "--tasks", "toy", "--data", data, "--out", str(out)]) == 0
    found = replies(out)
    assert len(found) == 20 and len(set(found.values())) > 5
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), MESH])
def test_replies_are_those_of_the_command(config, expected, mesh):
    """Also with the parameters split as in training."""
    config = dataclasses.replace(still(config), mesh=mesh)
    loop.train(config)
    assert replies(pathlib.Path(config.workdir) / "evals" / "0000002") == expected
    assert not (pathlib.Path(config.workdir) / "failures.txt").exists()


@pytest.mark.slow
def test_an_adapter_too(config, expected):
    """Which changes nothing as long as it has learned nothing."""
    adapter = AdapterConfig(rank=2, targets=("decoder",))
    config = dataclasses.replace(still(config), adapter=adapter)
    loop.train(config)
    assert replies(pathlib.Path(config.workdir) / "evals" / "0000002") == expected


@pytest.mark.slow
def test_two_processes(config, expected, tmp_path):
    """On a mesh over both they get what one gets, and process 0 has the files."""
    path = tmp_path / "two.py"
    config = dataclasses.replace(still(config), mesh=MESH, workdir="run")
    path.write_text(
        "import evals.tasks\n"
        "from janus_jax.config import *\n"
        "from tests.evals.asking.toy import Toy\n"
        "from train.config import *\n"
        "evals.tasks.TASKS['toy'] = Toy()\n"
        f"def get_config():\n    return {config!r}\n"
    )
    ended = outcome(launch(path, environment(4, JAX_DEFAULT_MATMUL_PRECISION="float32"), [tmp_path, tmp_path]))
    assert [code for code, *_ in ended] == [0, 0], ended
    assert replies(tmp_path / "run" / "evals" / "0000002") == expected
    assert not (tmp_path / "run" / "failures.txt").exists()
