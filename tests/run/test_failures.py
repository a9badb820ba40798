"""What fails beside the steps, and what a checkpoint's damage tells: runs that go on, and the way on of others."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import shutil
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.io.whole.ownership import MARK
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params, read_now
from train.config import EvalConfig, SampleConfig, TrainConfig
from train.run import aside, faults, loop
from train.run.checkpoints import Workdir
from train.run.distributed import Agreed
from train.run.failures import Failures, Tries
from train.run.faults import Stopped
from train.run.lease import Lease
from train.run.metrics import Metrics, read_metrics
from train.step.leaves import split
from train.step.state import TrainState

KINDS = ("understanding", "text", "generation")


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """A run with evaluations, pictures and exports every two steps, in a folder."""
    folders = write_data(tmp_path_factory.mktemp("data"), count=12)
    start = str(write_checkpoint(tmp_path_factory.mktemp("start") / "model"))
    kinds = {kind: (folders[kind],) for kind in KINDS}

    def make(folder: pathlib.Path, **changes) -> TrainConfig:
        usual = {
            "evaluation": EvalConfig(**kinds, every=2, batches=1),
            "samples": SampleConfig(every=2, prompts=("a house",), images=1),
            "export_every": 2,
            "init_from": start,
            "stage": 1,
        }
        return tiny_config(folders, folder / "run", **(usual | changes))

    return make


def steps_of(folder: pathlib.Path) -> list[tuple[int, str]]:
    return [(line["step"], "eval" if "eval/loss" in line else "train") for line in read_metrics(folder)]


# ---------------------------------------------------------------- beside the steps


@pytest.mark.slow
def test_what_fails_beside_the_steps_is_reported_and_counted(config_of, monkeypatch, capsys, tmp_path):
    """An evaluation, a picture and both writers of metrics."""
    from tensorboardX import SummaryWriter

    failing = {"evaluation": 1, "picture": 1, "line": 1, "board": 1}

    def fails(name: str, call, error: Exception):
        def patched(*args, **kwargs):
            if failing[name]:
                failing[name] -= 1
                raise error
            return call(*args, **kwargs)

        return patched

    monkeypatch.setattr(aside.Evaluator, "_read", fails("evaluation", aside.Evaluator._read, OSError(5, "bad\ndisk")))
    monkeypatch.setattr(aside, "contact_sheet", fails("picture", aside.contact_sheet, MemoryError()))
    monkeypatch.setattr(Metrics, "_append", fails("line", Metrics._append, OSError(errno.ENOSPC, "full")))
    monkeypatch.setattr(SummaryWriter, "add_scalar", fails("board", SummaryWriter.add_scalar, TypeError("what")))
    exported = loop.train(config_of(tmp_path))
    folder = tmp_path / "run"
    assert not any(failing.values())
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert len(told) == 4
    for what in ("the evaluation after step 2 (OSError: ", "the sample grid after step 2 (MemoryError", "tensorboard"):
        assert sum(what in line for line in told) == 1, told
    # What could not be written is written with the next line.
    assert steps_of(folder) == [(1, "train"), (2, "train"), (3, "train"), (4, "train"), (4, "eval")]
    counts = [line["train/failures"] for line in read_metrics(folder) if "train/loss" in line]
    assert counts == [0, 2, 4, 4]
    assert [path.name for path in (folder / "samples").iterdir()] == ["0000004.png"]
    assert (folder / "failures.txt").read_text().count("Traceback") == 4
    assert exported.name == "4" and (folder / "export" / "2" / "config.json").exists()


@pytest.mark.slow
def test_a_death_after_the_checkpoint_costs_nothing(config_of, monkeypatch, tmp_path):
    """Saved, then killed before evaluation, picture and export: the next start does them first."""
    config, folder = config_of(tmp_path, steps=3), tmp_path / "run"

    def die(*_):
        raise KeyboardInterrupt

    for what in (aside.Evaluator, "__call__"), (Workdir, "export"):
        with monkeypatch.context() as patch:
            patch.setattr(*what, die)
            with pytest.raises(KeyboardInterrupt):
                loop.train(config)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
        assert (folder / "samples" / "0000002.png").exists() == (what[1] == "export")
        assert not (folder / "export").exists()
    loop.train(config)
    assert steps_of(folder) == [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (3, "eval")]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["0000002.png", "0000003.png"]
    exported = checkpoint.array_leaves(folder / "export" / "2" / "params", abstract_params(MODEL))
    trained, _ = split(abstract_params(MODEL), 1)
    for path, leaf in checkpoint.array_leaves(folder / "checkpoints" / "2" / "trained", trained).items():
        np.testing.assert_array_equal(read_now(exported[path]), read_now(leaf).astype("bfloat16"), err_msg=str(path))
    assert not (folder / "tries.json").exists() and not (folder / "lease.json").exists()


@pytest.mark.slow
def test_an_export_is_whole_or_not_there(config_of, monkeypatch, tmp_path, capsys):
    """A disk that fills up within it, what a kill left beside it, and one begun before exports were staged."""
    config = config_of(tmp_path, steps=2, export_every=0, samples=SampleConfig(), evaluation=EvalConfig())
    folder = tmp_path / "run" / "export"

    def full(params, _):
        params.mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_params", full)
        with pytest.raises(Stopped, match=r"the export could not be written .*No space left on device"):
            loop.train(config)
    assert not folder.exists()
    folder.mkdir()
    (folder / ".2.0123abcd.lock").write_text(socket.gethostname())
    for left in (".2.0123abcd.partial/params", "2/params.orbax-checkpoint-tmp-1"):
        (folder / left).mkdir(parents=True)
    (folder / "2" / "config.json").touch()
    exported = loop.train(config)
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert ".2.0123abcd.partial (0 GB), left by a killed process" in capsys.readouterr().out
    assert {"config.json", "params", MARK} <= {path.name for path in exported.iterdir()}


@pytest.mark.slow
def test_a_picture_that_kills_every_start_is_left_out(config_of, monkeypatch, tmp_path, capsys):
    config, folder = config_of(tmp_path, steps=3), tmp_path / "run"

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(aside, "draw_samples", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            loop.train(config)
    monkeypatch.undo()
    loop.train(config)
    line = "failed: the sample grid after step 2 (RuntimeError: 2 starts of this run ended while making it)"
    assert line in capsys.readouterr().out
    assert [path.name for path in (folder / "samples").iterdir()] == ["0000003.png"]


def test_tries_are_counted_over_starts(tmp_path):
    first, what = Tries(tmp_path), "picture"
    assert [first.begin(2, what), Tries(tmp_path).begin(2, what), Tries(tmp_path).begin(2, what)] == [0, 1, 2]
    # What else is due after the step has a count of its own, and leaves this one as it is.
    assert first.begin(2, "evaluation") == 0
    first.end(2, "evaluation")
    assert Tries(tmp_path).begin(2, what) == 3
    assert Tries(tmp_path).begin(4, what) == 0
    first.end(4, what)
    assert not (tmp_path / "tries.json").exists()
    assert first.begin(4, what) == 0
    for damaged in ("{", '{"step": 4, "begun": 2}', '{"step": 4, "begun": {"picture": "2"}}'):
        (tmp_path / "tries.json").write_text(damaged)
        assert first.begin(4, what) == 0
        assert first.begin(4, what) == 1


def test_one_process_that_fails_alone_amid_common_work_stops(tmp_path, monkeypatch, capsys):
    """The others wait for it in a collective, where nothing reaches them."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("train.run.failures._WAIT", 0.5)
    met = []
    monkeypatch.setattr("train.run.failures.barrier", lambda: met.append(1))
    failures, what = Failures(tmp_path), "the sample grid after step 2"
    with pytest.raises(Stopped, match="the sample grid after step 2 failed in process 0 only") as stopped:  # noqa: SIM117
        with failures.alike(what):
            raise RuntimeError("out of luck")
    assert stopped.value.code == faults.HUNG and stopped.value.alone and not met
    # Where the other one fails as well, both go on.
    (tmp_path / "failed-the-sample-grid-after-step-2.1").touch()
    with failures.alike(what):
        raise RuntimeError("out of luck")
    assert failures.count == 1 and met == [1]
    # And what was agreed upon already is known to both.
    with failures.alike("the picture after step 4"):
        raise Agreed("process 1 (there): its disk is full")
    assert failures.count == 2 and "its disk is full" in capsys.readouterr().out
    for kind in (KeyboardInterrupt, Stopped):
        with pytest.raises(kind), failures.alike(what):
            raise kind("told", 3) if kind is Stopped else kind


@pytest.mark.slow
def test_a_run_whose_workdir_is_taken_over_stops_before_it_writes(config_of, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    taken, write = Lease(folder), Metrics.write

    def steal(self, done, *args, **kwargs):
        write(self, done, *args, **kwargs)
        taken.acquire(steal=True)

    monkeypatch.setattr(Metrics, "write", steal)
    with pytest.raises(Stopped, match=r"was taken over by another start .* ends without writing to it") as stopped:
        loop.train(config_of(tmp_path))
    assert stopped.value.code == faults.STOPPED and taken.held
    assert steps_of(folder) == [(1, "train")]
    assert not list((folder / "checkpoints").iterdir())
    taken.release()


def test_metrics_outlive_a_full_disk(tmp_path, monkeypatch):
    """Half a line that came through is taken back, and written whole when there is room."""
    failures = Failures(tmp_path)
    with Metrics(tmp_path, 4, failures=failures) as metrics:
        metrics.write(1, {"loss": 1.0})

        class Full:
            def __init__(self, file):
                self._file = file

            def write(self, data):
                if len(data) > 9:
                    return self._file.write(data[:9])
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name):
                return getattr(self._file, name)

        file, metrics._file = metrics._file, Full(metrics._file)
        metrics.write(2, {"loss": 2.0})
        assert failures.count == 1 and [line["step"] for line in read_metrics(tmp_path)] == [1]
        metrics._file = file
        metrics.write(3, {"loss": 3.0})
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 3.0]


def test_a_run_outlives_who_reads_it(tmp_path, monkeypatch):
    """`| head`, or a terminal that is gone."""

    def broken(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with Metrics(tmp_path, 4) as metrics:
        monkeypatch.setattr("builtins.print", broken)
        metrics.write(1, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


# ---------------------------------------------------------------- a damaged checkpoint


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def some_state(step: int) -> TrainState:
    trained = {"aligner": {f"layers_{i}": {"kernel": jnp.full((64, 64), step + i, jnp.float32)} for i in range(3)}}
    return TrainState(jnp.int32(step), trained, {"mu": trained}, jnp.int32(0))


def frozen() -> dict:
    return {"gen_embed": {"embedding": jnp.ones((8, 8))}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> TrainConfig:
    """A run with the checkpoints of steps 2 and 4."""
    config = tiny_config(dict.fromkeys((*KINDS, "tokenizer"), "x"), tmp_path_factory.mktemp("saved") / "run")
    with Workdir(config, {}) as workdir:
        workdir.save_frozen(frozen())
        for step in (2, 4):
            workdir.save(step, some_state(step))
        workdir.wait()
    return config


def truncate(folder: pathlib.Path):
    for path in folder.rglob("d/*"):
        os.truncate(path, 100)


DAMAGES = {
    "part": lambda step: shutil.rmtree(step / "trained"),
    "manifest": lambda step: (step / "trained" / "manifest.ocdbt").unlink(),
    "cut": truncate,
    "rest": lambda step: truncate(step / "rest"),
    "metadata": lambda step: [path.unlink() for path in step.glob("*/_METADATA")],
    "nonsense": lambda step: (step / "trained" / "_METADATA").write_text("["),
    "empty": lambda step: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in step.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_way_on(saved, tmp_path, capfd, damage):
    folder = pathlib.Path(shutil.copytree(saved.workdir, tmp_path / "run"))
    config = dataclasses.replace(saved, workdir=str(folder))
    DAMAGES[damage](folder / "checkpoints" / "4")
    capfd.readouterr()
    with Workdir(config, {}) as workdir, pytest.raises(ValueError) as damaged:
        workdir.restore(abstract(some_state(0)), abstract(frozen()))
    told = str(damaged.value)
    assert "\n" not in told and len(told) < 900
    assert told.startswith(f"{folder}/checkpoints/4 is damaged (")
    assert told.endswith("run the same command to resume from the previous checkpoint, of step 2")
    assert capfd.readouterr().err == ""
    # What it says is so.
    shutil.rmtree(folder / "checkpoints" / "4")
    with Workdir(config, {}) as workdir:
        state, _ = workdir.restore(abstract(some_state(0)), abstract(frozen()))
    assert int(state.step) == 2
    np.testing.assert_array_equal(state.trained["aligner"]["layers_1"]["kernel"], np.full((64, 64), 3))


def test_a_damaged_only_checkpoint_and_damaged_frozen_parameters(saved, tmp_path):
    folder = pathlib.Path(shutil.copytree(saved.workdir, tmp_path / "run"))
    config = dataclasses.replace(saved, workdir=str(folder))
    (folder / "frozen" / "state" / "manifest.ocdbt").unlink()
    told = r"run/frozen is damaged \(.*restore it from a copy of the workdir"
    with Workdir(config, {}) as workdir, pytest.raises(ValueError, match=told):
        workdir.restore(abstract(some_state(0)), abstract(frozen()))
    shutil.rmtree(folder / "checkpoints" / "4")
    truncate(folder / "checkpoints" / "2")
    with Workdir(config, {}) as workdir, pytest.raises(ValueError, match=r"and run the same command to start over$"):
        workdir.restore(abstract(some_state(0)), abstract(frozen()))


def test_a_full_disk_is_one_error_without_orbaxs_tracebacks(saved, tmp_path, capfd):
    import resource

    config = dataclasses.replace(saved, workdir=str(tmp_path / "run"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Workdir(config, {}) as workdir:
        workdir.save(2, some_state(2))
        workdir.wait()
        capfd.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, hard))
        try:
            with pytest.raises(Stopped, match=r"could not be written .*checkpoint of step 2 is complete") as stopped:
                workdir.save(4, some_state(4))
                workdir.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.value.code == faults.STORAGE and "File too large" in str(stopped.value)
    assert capfd.readouterr().err == ""
