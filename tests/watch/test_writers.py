"""Trackers beside metrics.jsonl, by modules with the documented API of wandb and trackio: ids, failures, refusals."""

import dataclasses
import json
import sys
import types

import pytest

from tests.watch.test_dry_run import rows
from train.config import TrainConfig
from train.overrides import load_config
from train.run.failures import Failures
from train.run.loop import train
from train.run.metrics import Metrics, read_metrics
from train.validate import validate
from train.watch import dry_run, writers


class Run:
    """Records what it is told; a run of wandb or of trackio."""

    def __init__(self, started: dict):
        self.started, self.lines, self.axes, self.finished = started, [], [], None

    def log(self, data: dict, step: int | None = None):
        self.lines.append((step, data))

    def define_metric(self, name: str, step_metric: str | None = None):
        self.axes.append((name, step_metric))

    def finish(self, exit_code: int | None = None):
        self.finished = exit_code if exit_code is not None else "done"


@pytest.fixture
def trackers(monkeypatch) -> dict[str, list[Run]]:
    """The runs that wandb and trackio are asked for."""
    made: dict[str, list[Run]] = {"wandb": [], "trackio": []}

    def module(name: str) -> types.ModuleType:
        def init(**settings) -> Run:
            made[name].append(Run(settings))
            return made[name][-1]

        found = types.ModuleType(name)
        found.init = init
        return found

    for name in made:
        monkeypatch.setitem(sys.modules, name, module(name))
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return made


ALL = ("jsonl", "tensorboard", "wandb", "trackio")


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path, trackers, monkeypatch):
    options = {"writers": ALL, "name": "tiny", "config": {"optimizer.b1": 0.9}}
    with Metrics(tmp_path, 9, **options) as metrics:
        metrics.write(1, {"loss": 2.0})
        metrics.write(2, {"loss": 1.0})
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    with pytest.raises(KeyboardInterrupt), Metrics(tmp_path, 9, 1, **options) as metrics:
        metrics.write(2, {"loss": 1.5}, prefix="eval")
        raise KeyboardInterrupt
    first, second = trackers["wandb"]
    assert first.started == {
        "project": "janus_jax", "name": "tiny", "id": first.started["id"], "resume": "allow", "dir": str(tmp_path),
        "config": {"optimizer.b1": 0.9},
    }  # fmt: skip
    assert second.started == first.started | {"project": "ours"}
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"] == first.started["id"]
    assert first.axes == [("step", None), ("*", "step")]
    assert first.lines == [(None, {"train/loss": 2.0, "step": 1}), (None, {"train/loss": 1.0, "step": 2})]
    assert (first.finished, second.finished) == (0, 1)
    assert second.lines == [(None, {"eval/loss": 1.5, "step": 2})]

    first, second = trackers["trackio"]
    assert first.started == second.started and first.started["resume"] == "allow"
    assert first.started["project"] == "janus_jax" and first.started["name"].startswith("tiny-")
    assert first.lines == [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0})] and first.finished == "done"
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_another_workdir_is_another_run(tmp_path, trackers):
    for name in ("a", "b"):
        Metrics(tmp_path / name, 9, writers=ALL, name="tiny").close()
    first, second = (run.started["id"] for run in trackers["wandb"])
    assert first != second and trackers["trackio"][0].started["name"] != trackers["trackio"][1].started["name"]


def test_a_failing_tracker_is_counted_and_the_run_goes_on(tmp_path, trackers, monkeypatch, capsys):
    """At its opening, in the middle, and at its end; the others get every line."""
    failures = Failures(tmp_path)
    monkeypatch.setattr(sys.modules["trackio"], "init", lambda **_: 1 / 0)
    with Metrics(tmp_path, 9, failures=failures, writers=ALL) as metrics:
        assert failures.count == 1
        (run,) = trackers["wandb"]
        monkeypatch.setattr(run, "log", lambda data: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
        metrics.write(1, {"loss": 2.0})
        monkeypatch.undo()
        metrics.write(2, {"loss": 1.0})
        run.finish = None
    assert failures.count == 3 and [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert run.lines == [(None, {"train/loss": 1.0, "step": 2})]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    for line, what in zip(told, ("opening trackio (Zero", "writing wandb (Conn", "closing wandb (Type"), strict=True):
        assert line.startswith(f"failed: {what}") and "the run continues" in line


def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch, capsys):
    """By a run and by a dry run, with the extra that has it."""
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    config: TrainConfig = load_config("debug", ["writers=jsonl,wandb,trackio", f"workdir={tmp_path / 'run'}"])
    first, second = writers.missing(config.writers)
    assert first == (
        "writers: wandb needs the package wandb, which is not installed; pip install 'janus_jax[wandb]', "
        "or take wandb out of writers"
    )
    assert "'janus_jax[trackio]'" in second
    with pytest.raises(ValueError, match=r"^writers: wandb needs .* pip install 'janus_jax\[wandb\]'"):
        train(config)
    assert not (tmp_path / "run").exists()
    assert dry_run.dry_run(dataclasses.replace(config, init_from="", tokenizer="nowhere")) == 2
    told, errors = capsys.readouterr()
    assert rows(told)["writers"] == "jsonl, wandb, trackio"
    assert f"error: {first}" in errors.splitlines() and f"error: {second}" in errors.splitlines()


def test_writers_of_a_config():
    debug = load_config("debug", [])
    assert debug.writers == ("jsonl", "tensorboard")
    validate(dataclasses.replace(debug, writers=ALL))
    with pytest.raises(ValueError, match=r"^writers must be among jsonl, tensorboard, wandb, trackio, got mlflow$"):
        validate(dataclasses.replace(debug, writers=("jsonl", "mlflow")))
    with pytest.raises(ValueError, match=r"^writers must include jsonl, "):
        validate(dataclasses.replace(debug, writers=("tensorboard",)))
