"""The benchmark's command at the smallest size: judging that waits is hidden behind drawing."""

import re
import time

import numpy as np
import pytest

from benchmarks.rewards import __main__ as benchmark
from train.rl.config import RewardConfig
from train.rl.rewards import Rewards


@pytest.mark.slow
def test_the_command(capsys):
    assert benchmark.main(["--preset", "janus_tiny", "--rounds", "1", "--pictures", "2", "--parts", "2"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [[name, mode] for name in benchmark._REWARDS for mode in benchmark._MODES]
    assert all(re.fullmatch(r"-?\d+%", row[-1]) and float(row[-2]) > 0 for row in rows[2:])
    assert "at most 50% of judging can be hidden" in out


@pytest.mark.slow
def test_steps_of_a_run(capsys):
    assert benchmark.main(["--preset", "janus_tiny", "--pictures", "8", "--parts", "2", "--steps", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert [row[0] for row in rows[2:]] == ["1", "2"]
    assert all(float(row[1]) > 0 and float(row[3]) > 0 and float(row[4]) > 0 for row in rows[2:])


def test_judging_that_waits_is_hidden():
    """Drawing by a clock: five parts of 0.2 seconds, each judged for 0.15."""

    def draw(part):
        time.sleep(0.2)
        return np.full((3, 2, 2, 3), part, np.uint8)

    made = RewardConfig("benchmarks.rewards.judges:waits", options=("seconds=0.05",), workers=0)
    with Rewards([made]) as rewards:
        in_turn, overlapped = (benchmark.judged(draw, rewards, 5, each) for each in (False, True))
    assert in_turn > 5 * 0.35 and 5 * 0.2 + 0.15 < overlapped < in_turn - 0.3  # at best 0.6 less
