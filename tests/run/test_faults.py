"""What ends a run before its last step: what it says, its exit code, and what it leaves behind."""

import dataclasses
import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from examples.tiny.run import MODEL, params_of, tiny_config, write_checkpoint, write_data
from janus_jax.weights import checkpoint
from train.config import TASKS, TrainConfig
from train.main import main
from train.run import faults, loop
from train.run.faults import Notice, Stopped, Watchdog
from train.run.flow import Health, NotFinite
from train.run.metrics import Metrics, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start") / "model"))


@pytest.fixture
def config(folders, start, tmp_path) -> TrainConfig:
    made = tiny_config(folders, tmp_path / "run", init_from=start)
    return dataclasses.replace(made, evaluation=dataclasses.replace(made.evaluation, every=0))


def at_step(monkeypatch, step: int, act):
    """Does `act` when the metrics of `step` are written, in the middle of the run."""
    write = Metrics.write

    def patched(self, done, *args, **kwargs):
        write(self, done, *args, **kwargs)
        if done == step:
            act()

    monkeypatch.setattr(Metrics, "write", patched)


# ---------------------------------------------------------------- a notice to end


@pytest.mark.slow
def test_a_notice_saves_and_the_same_command_goes_on(config, folders, start, tmp_path, monkeypatch):
    config = dataclasses.replace(config, save_every=100)
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    loop.train(whole)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="preempted; saved after step 2; run the same command to resume") as stopped:
            loop.train(config)
    assert stopped.value.code == faults.AGAIN
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    loop.train(config)
    ours, theirs = params_of(config.workdir), params_of(whole.workdir)
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)
    assert [line["step"] for line in read_metrics(config.workdir)] == [1, 2, 3, 4]


def test_no_notice_outside_a_run():
    with Notice() as notice:
        assert not notice.after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.after(2)


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.slow
def test_too_many_updates_that_are_not_finite_stop_the_run(config, folders, tmp_path, capsys):
    params = checkpoint.load_params(write_checkpoint(tmp_path / "model"))
    params["gen_embed"]["embedding"] = np.full_like(params["gen_embed"]["embedding"], np.nan)
    checkpoint.save(tmp_path / "poisoned", MODEL, params)
    config = dataclasses.replace(
        config, init_from=str(tmp_path / "poisoned"), max_skipped=2, save_every=100, steps=20
    )  # fmt: skip
    with pytest.raises(
        Stopped, match=r"generation was not finite in 2 steps in a row \(max_skipped\), up to 2"
    ) as stopped:
        loop.train(config)
    assert stopped.value.code == faults.STOPPED
    told = capsys.readouterr().out
    for step in (1, 2):
        (line,) = [line for line in told.splitlines() if line.startswith(f"step {step}: ")]
        assert "generation is not finite; the update is skipped" in line
    # What is saved are the parameters as they were.
    for path, x in params_of(config.workdir).items():
        part, *rest = path.split("/")
        before = params[part]
        for key in rest:
            before = before[key]
        np.testing.assert_array_equal(x.astype(np.float32), np.asarray(before, np.float32), err_msg=path)


def test_float16_is_named_and_what_to_do(config, capsys):
    health = Health(dataclasses.replace(config, compute_dtype="float16", max_skipped=2))
    values = {"damaged": 0.0, "finite": 0.0} | {f"loss_{kind}": 1.0 for kind in TASKS}
    health(0, values, {"samples": 8})
    assert capsys.readouterr().out == "step 1: a gradient in float16 is not finite; the update is skipped\n"
    with pytest.raises(NotFinite) as told:
        health(1, values, {"samples": 8})
    assert str(told.value) == (
        "a gradient in float16 was not finite in 2 steps in a row (max_skipped), up to 2; "
        "train in float32 or bfloat16, in another folder"
    )


# ---------------------------------------------------------------- storage


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(config, monkeypatch, tmp_path):
    config = dataclasses.replace(config, steps=6)
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    loop.train(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:

        def fill():
            while not (tmp_path / "run" / "checkpoints" / "2").exists():
                time.sleep(0.1)
            # No file may grow beyond this: checkpoints do, and the small files of a run do not.
            resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, hard))

        at_step(patch, 3, fill)
        try:
            with pytest.raises(Stopped, match=r"could not be written.*the checkpoint of step 2 is complete") as stopped:
                loop.train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.value.code == faults.STORAGE
    loop.train(config)
    assert [line["step"] for line in read_metrics(config.workdir)] == [1, 2, 3, 4, 5, 6]
    ours, theirs = params_of(config.workdir), params_of(whole.workdir)
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


# ---------------------------------------------------------------- readers


@pytest.mark.slow
def test_a_reader_that_dies_ends_the_run(config, monkeypatch):
    data = dataclasses.replace(config.data, workers=1)
    config = dataclasses.replace(config, data=data, steps=40, save_every=2)

    def kill():
        (reader,) = multiprocessing.active_children()
        reader.kill()

    at_step(monkeypatch, 3, kill)
    with pytest.raises(Stopped, match=r"a process that reads data has died .*exit code -9") as stopped:
        loop.train(config)
    assert stopped.value.code == faults.STOPPED
    assert not multiprocessing.active_children()
    assert params_of(config.workdir)  # a complete checkpoint is there


@pytest.mark.slow
def test_damaged_samples_are_named_in_the_workdir(config, monkeypatch, capsys):
    from train.data.prepared import Prepared

    sample = Prepared.__getitem__
    bad = {3, 4}

    def damaged(self, index):
        if index in bad and self.kind == "text":
            raise ValueError(f"sample {index} is cut short")
        return sample(self, index)

    monkeypatch.setattr(Prepared, "__getitem__", damaged)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_share=1.0))
    loop.train(config)
    lines = (pathlib.Path(config.workdir) / "damaged-0.txt").read_text().splitlines()
    assert lines and all("left out" in line and "is cut short" in line for line in lines)
    assert set(lines) <= set(capsys.readouterr().out.splitlines())
    assert read_metrics(config.workdir)[-1]["train/bad_samples"] == len(lines)


# ---------------------------------------------------------------- the watchdog


def test_watchdog_ends_what_hangs_and_names_it(capfd):
    codes: list[int] = []
    with Watchdog(0.2, end=codes.append) as watchdog:
        watchdog.doing("waiting for the data of step 7")
        time.sleep(1)
    assert codes == [faults.HUNG]
    told = capfd.readouterr().err
    assert "has been waiting for the data of step 7 for more than 0.2 seconds" in told
    assert "test_watchdog_ends_what_hangs_and_names_it" in told  # where the thread is


def test_watchdog_leaves_alone_what_gets_on():
    codes: list[int] = []
    with Watchdog(0.4, end=codes.append) as watchdog, Watchdog(0, end=codes.append):
        for step in range(8):
            watchdog.doing(f"working on step {step}")
            time.sleep(0.1)
    time.sleep(0.5)
    assert codes == []


def test_a_watchdog_interrupts_where_the_process_is_not_its_own(capfd):
    """In a notebook: its kernel lives on, with one exception more."""
    assert not faults.is_own_process()
    began = time.monotonic()
    with pytest.raises(Stopped, match=r"has been working on step 3 for more than 0.2 seconds") as stopped:  # noqa: SIM117
        with Watchdog(0.2) as watchdog:
            watchdog.doing("working on step 3")
            time.sleep(60)
    assert stopped.value.code == faults.HUNG and time.monotonic() - began < 30
    assert "test_a_watchdog_interrupts" in capfd.readouterr().err  # where the thread was


def test_ctrl_c_stays_ctrl_c():
    with pytest.raises(KeyboardInterrupt), Watchdog(100):
        raise KeyboardInterrupt


def test_only_the_command_line_ends_its_process(monkeypatch):
    """One of several processes makes sure of its end by `os._exit`, and in a notebook comes back with the code."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("train.run.distributed.start", lambda **_: None)
    arguments = ["--config", "debug", "batch_size=0"]
    assert main(arguments) == faults.BAD_INPUT and not ended
    monkeypatch.setattr(faults, "_own", True)
    main(arguments)
    assert ended == [faults.BAD_INPUT]


def test_a_notebook_is_never_its_own_process(monkeypatch):
    monkeypatch.setattr(faults, "_own", False)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.__IPYTHON__", True, raising=False)
        faults.own_process()  # as `%run -m train.main` does
        assert not faults.is_own_process()
    faults.own_process()
    assert faults.is_own_process()


@pytest.mark.slow
def test_a_hung_step_ends_the_command(folders, start, tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import time\n"
        "from examples.tiny.run import tiny_config\n"
        "from train.run import loop\n"
        "def get_config():\n"
        "    following = loop.next_batch\n"
        "    calls = []\n"
        "    def hang(batches):\n"
        "        calls.append(1)\n"
        "        time.sleep(60 if len(calls) == 3 else 0)\n"
        "        return following(batches)\n"
        "    loop.next_batch = hang\n"
        f"    return tiny_config({folders!r}, {str(tmp_path / 'run')!r}, init_from={start!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "train.main", "--config", str(tmp_path / "hangs.py"), "mesh.fsdp=1", "watchdog=20"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == faults.HUNG, done.stderr
    assert "has been waiting for the data of step 3 for more than 20 seconds" in done.stderr
