"""The benchmark of killed runs: its checks find what is wrong, and a run comes through three kills."""

import collections
import json
import os
import random
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import chaos
from benchmarks.common import kills
from examples.tiny.run import tiny_config, write_data
from train.data.mixture import Mixture
from train.run.checkpoints import Workdir


def line(step: int, **values) -> dict:
    return {"step": step, "train/loss": 1 / step, **values}


REFERENCE = [line(step) for step in range(1, 6)]


def test_a_true_history_passes():
    chaos.check_history(REFERENCE, REFERENCE)
    chaos.check_history(REFERENCE[:3], REFERENCE)
    chaos.check_history([], REFERENCE)


@pytest.mark.parametrize(
    "lines, told",
    [
        ([line(1), line(2), line(2)], "step 2 stands where step 3 belongs"),
        ([line(1), line(3)], "step 3 stands where step 2 belongs"),
        ([line(2)], "step 2 stands where step 1 belongs"),
        ([line(1), line(2) | {"train/loss": np.nextafter(0.5, 1)}], "step 2: train/loss is 0.5000000000000001"),
        ([{"step": 1}], "step 1: train/loss is None"),
        ([line(1, more=2.0)], "step 1: more is 2.0, undisturbed None"),
    ],
)
def test_a_false_history_does_not(lines, told):
    with pytest.raises(kills.Failed, match=told):
        chaos.check_history([{k: v if k == "step" else float(v) for k, v in line.items()} for line in lines], REFERENCE)


def test_arrays_are_compared_bit_for_bit():
    expected = {"a": np.zeros(2, np.float32), "b": np.float32("nan")}
    chaos.check_arrays({"a": np.zeros(2, np.float32), "b": np.float32("nan")}, expected)
    for other in (-expected["a"], np.zeros(2, np.int32), np.zeros((2, 1), np.float32)):
        with pytest.raises(kills.Failed, match="1 of 2 arrays differ, a for one"):
            chaos.check_arrays(expected | {"a": other}, expected)
    with pytest.raises(kills.Failed, match="arrays differ, b for one"):
        chaos.check_arrays({"a": expected["a"]}, expected)


def test_rows_of_another_step_are_found(tmp_path):
    config = tiny_config(write_data(tmp_path, count=12), tmp_path / "run")
    plans = [Mixture(config.data, config.batch_size, config.seed).plan(step) for step in range(4)]
    tokens = [sum(item.length for row in plan.rows for item in row) for plan in plans]
    lines = [
        {"step": step, "train/fill": count / (8 * 128), "train/left_out_groups": plan.left_out}
        for step, (count, plan) in enumerate(zip(tokens, plans, strict=True), 1)
    ]
    assert chaos.check_rows(config, lines) == sum(len(row) for plan in plans for row in plan.rows)
    assert tokens[1] != tokens[2]
    with pytest.raises(kills.Failed, match="step 3 was not trained on its own rows"):
        chaos.check_rows(config, [*lines[:2], lines[1] | {"step": 3}])
    with pytest.raises(kills.Failed, match=r"sample was trained on \d+ times in \d+ passes"):
        chaos.check_rows(config, [lines[0]] * 4)


@pytest.mark.parametrize("left", ["run.tmp", ".run.json.0a1b2c3d.partial"])
def test_a_start_killed_while_it_describes_the_run_is_no_hindrance(tmp_path, left):
    """What it leaves, of earlier versions and of this one, stays beside the whole description."""
    folders = dict.fromkeys(("understanding", "text", "generation", "tokenizer"), "absent")
    (tmp_path / left).write_text('{"config": {"na')
    with Workdir(tiny_config(folders, tmp_path), {}) as workdir:
        assert workdir.latest is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "run.json", left}
    assert json.loads((tmp_path / "run.json").read_text())["config"]["name"]


@pytest.mark.slow
def test_readers_do_not_outlive_a_killed_run():
    program = (
        "import concurrent.futures, multiprocessing, os, time, train.children as children\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    pool = concurrent.futures.ProcessPoolExecutor(1, spawn, children.outlive_the_notice)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(100)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=kills.ROOT)
    reader = int(run.stdout.readline())
    os.kill(reader, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(reader, 0)  # not by the notice
    run.kill()
    run.wait()
    # The pipe has no end before the reader's.
    assert select.select([run.stdout], [], [], 20)[0] and run.stdout.read() == ""


@pytest.mark.parametrize("count", [3, 4, 7, 20, 50])
def test_planned_kills(count):
    planned = kills.plan_kills(count, random.Random(0))
    assert len(planned) == count
    assert planned[0].moment == "save" and planned[-1].moment == "export"
    if count >= 20:
        assert {kill.moment for kill in planned} == set(kills.MOMENTS)
        signals = collections.Counter(kill.signal for kill in planned)
        assert min(signals[signal.SIGKILL], signals[signal.SIGTERM]) >= count // 4


@pytest.mark.parametrize("arguments", [["--kills", "2"], ["--kills", "20", "--steps", "100"]])
def test_too_few_kills_or_steps(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        chaos.main(arguments)
    assert caught.value.code == 2 and "3 kills or more, and ten steps or more" in capsys.readouterr().err


@pytest.mark.slow
def test_three_kills(capsys):
    assert chaos.main(["--kills", "3", "--steps", "30"]) == 0
    assert "identical bit for bit" in capsys.readouterr().out
