"""Rewards: named, weighted, in threads and in processes that die; what they fail to say is said in one line."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from train.rl.config import RewardConfig
from train.rl.rewards import Rewards

MADE = "tests.rl.rewards.made"


def config(function, **fields):
    function = function if ":" in function else f"{MADE}:{function}"
    return RewardConfig(function, **{"workers": 0, **fields})


def pictures(*values):
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def scores_of(configs, *values, prompts=None, metadata=None):
    with Rewards(configs) as rewards:
        count = len(values)
        given = prompts or ["a cat"] * count, metadata or [{}] * count
        return rewards.result(rewards.start(pictures(*values), *given))


def test_several_with_weights_and_options():
    configs = [
        config("first_value", weight=2.0),
        config("lengths", weight=-1.0, name="long", options=("scale=0.5", "key=more")),
        config("train.rl.rewards.brightness:brightness", weight=255.0),
    ]
    found = scores_of(configs, 3, 250, 0, prompts=["a", "bb", ""], metadata=[{"more": 1}, {}, {"extra": 9}])
    assert list(found.columns) == ["first_value", "long", "brightness"]
    np.testing.assert_allclose(found.columns["long"], [1.5, 1, 0])
    np.testing.assert_allclose(found.columns["brightness"], [3 / 255, 250 / 255, 0])
    np.testing.assert_allclose(found.total, [6 - 1.5 + 3, 500 - 1 + 250, 0])
    assert found.total.dtype == np.float64 and (found.failed, found.retried) == (0, 0)


def test_no_pictures_are_judged_too():
    with Rewards([config("first_value")]) as rewards:
        found = rewards.result(rewards.start(np.zeros((0, 2, 2, 3), np.uint8), [], []))
    assert found.total.shape == (0,) and found.columns["first_value"].shape == (0,)


def test_order_is_kept_over_calls_and_workers():
    """Two workers with two pictures a call, and two sets of pictures at a time: each number is its picture's.

    One that is killed is started again, and none stays behind.
    """
    with Rewards([config("stamped", workers=2, batch_size=2)]) as rewards:
        handles = [rewards.start(pictures(*values), ["x"] * 7, [{}] * 7) for values in (range(7), range(10, 17))]
        later, first = (rewards.result(handle).total for handle in reversed(handles))
        np.testing.assert_array_equal(first % 1000, range(7))
        np.testing.assert_array_equal(later % 1000, range(10, 17))
        processes = {int(each) // 1000 for each in (*first, *later)}
        assert len(processes) == 2 and os.getpid() not in processes
        killed = min(processes)
        os.kill(killed, signal.SIGKILL)
        found = rewards.result(rewards.start(pictures(*range(20)), ["x"] * 20, [{}] * 20))
        np.testing.assert_array_equal(found.total % 1000, range(20))
        assert killed not in found.total // 1000
    for process in processes | {int(each) // 1000 for each in found.total}:
        with pytest.raises(ProcessLookupError):  # neither running nor a zombie
            os.kill(process, 0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", r"ZeroDivisionError: no pictures\\nare good \(.*made.py:\d+\)"),
        ("short", "it must return 3 numbers, got an array of shape [1]"),
        ("text", "it must return 3 numbers, got list"),
    ],
    ids=["raises", "wrong count", "no numbers"],
)
def test_what_never_scores_is_wrong(name, why):
    with pytest.raises(ValueError, match="has not scored any picture") as error:
        scores_of([config(name, workers=int(name == "broken"))], 1, 2, 3)
    said = str(error.value)
    assert "\n" not in said and said.startswith(f"reward {name} ")
    assert why in said or re.search(why, said)


def test_nan_and_infinity_lose_their_pictures(capsys):
    found = scores_of([config("not_finite", tries=2), config("first_value")], 5, 1, 2, 3)
    np.testing.assert_array_equal(found.total, [10, np.nan, np.nan, 6])
    np.testing.assert_array_equal(found.columns["not_finite"], [5, np.nan, np.nan, 3])
    np.testing.assert_array_equal(found.columns["first_value"], [5, 1, 2, 3])
    assert (found.failed, found.retried) == (2, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "reward not_finite: 2 of 4 pictures have no score after 2 tries: it gave nan for 2 of 2 pictures"


def test_tried_again(tmp_path, capsys):
    """A judge that is away for two calls of three; then it scores."""
    file = tmp_path / "calls"
    found = scores_of([config("Flaky", options=(f"file={file}", "times=2"))], 1, 2)
    np.testing.assert_array_equal(found.total, [7, 7])
    assert found.retried == 2 and file.read_bytes() == b"xxx"
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "why"),
    [("die", "its process has ended by signal 9"), ("sleep", "its process has not answered in 2 seconds")],
    ids=["dies", "hangs"],
)
def test_after_the_tries_the_pictures_are_lost_and_the_next_are_not(tmp_path, capsys, how, why):
    file = tmp_path / "calls"
    flaky = config("Flaky", workers=1, options=(f"file={file}", "times=1", f"how={how}"), tries=1, batch_size=2)
    with Rewards([dataclasses.replace(flaky, timeout=2.0), config("first_value")]) as rewards:
        begin = time.monotonic()
        handle = rewards.start(pictures(1, 2, 3, 4), ["x"] * 4, [{}] * 4)
        assert time.monotonic() - begin < 1  # the caller does not wait
        found = rewards.result(handle)
        np.testing.assert_array_equal(found.total, [np.nan, np.nan, 10, 11])
        assert (found.failed, found.retried) == (2, 0)
        line = f"reward Flaky: 2 of 4 pictures have no score after 1 try: {why}"
        assert capsys.readouterr().err.splitlines() == [line]
        file.unlink()
        rewards.start(pictures(1), ["x"], [{}])
        begin = time.monotonic()
    assert time.monotonic() - begin < 5  # nor for a call that is not over when it closes


BAD = {
    "no colon": (RewardConfig("train.rl.rewards"), "must be package.module:name"),
    "module": (config("no.such:thing"), r"no.such cannot be imported \(ModuleNotFoundError: No module named 'no'\)"),
    "function": (config("first_valu"), "has no function first_valu; did you mean first_value?"),
    "not callable": (config("not_called"), "has no function not_called"),
    "unknown option": (config("lengths", options=("scal=1",)), "unexpected keyword argument 'scal'"),
    "missing option": (config("NoModel"), "missing a required argument: 'model'"),
    "option": (config("lengths", options=("scale",)), "the option 'scale' must be key=value"),
    "twice": (config("lengths", options=("scale=1", "scale=2")), "the option 'scale=2' is given twice"),
    "model": (config("NoModel", options=("model=/x",)), "reward NoModel: /x cannot be loaded"),
    "weight": (config("lengths", weight=float("nan")), "weight must be a number, got nan"),
    "batch": (config("lengths", batch_size=0), "batch_size must be at least 1, got 0"),
    "timeout": (config("lengths", timeout=0.0), "timeout must be above 0 seconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs(name):
    bad, said = BAD[name]
    with pytest.raises(ValueError) as error:
        Rewards([bad])
    assert re.search(said, str(error.value)) or said in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_configs_of_workers():
    with pytest.raises(ValueError, match=r"^reward NoModel: /x cannot be loaded$"):
        Rewards([config("first_value"), config("NoModel", options=("model=/x",), workers=1)])


def test_names_are_unique():
    with pytest.raises(ValueError, match="two rewards are called lengths; give one of them another name"):
        Rewards([config("lengths"), config("lengths", weight=2.0)])
    with pytest.raises(ValueError, match="rewards are empty"):
        Rewards([])


def test_what_is_given_is_checked():
    with Rewards([config("lengths")]) as rewards:
        with pytest.raises(ValueError, match=r"uint8 \[N, h, w, 3\], got float64"):
            rewards.start(np.zeros((1, 2, 2, 3)), ["x"], [{}])
        with pytest.raises(ValueError, match="1 pictures, 2 prompts, 1 metadata"):
            rewards.start(pictures(1), ["x", "y"], [{}])


@pytest.mark.slow
def test_no_worker_outlives_a_killed_run():
    program = (
        "import time, numpy as np\n"
        "from train.rl.config import RewardConfig\n"
        "from train.rl.rewards import Rewards\n"
        "if __name__ == '__main__':\n"
        f"    rewards = Rewards([RewardConfig('{MADE}:stamped')])\n"
        "    pictures = np.zeros((1, 2, 2, 3), np.uint8)\n"
        "    print(int(rewards.result(rewards.start(pictures, ['x'], [{}])).total[0] // 1000), flush=True)\n"
        "    time.sleep(100)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    os.kill(worker, 0)  # not by the notice
    run.kill()
    run.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")
