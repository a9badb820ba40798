"""`python -m benchmarks.speculation`: the parts that need no trained model."""

import numpy as np
import pytest

from benchmarks.speculation.__main__ import main
from benchmarks.speculation.agreement import p_value
from benchmarks.speculation.drawing import Measured, Setting, settings, table


def test_p_values(rng):
    """Equal distributions are let through, a column that is off is found among many, and rare values are pooled."""
    columns = [(rng.integers(0, 50, 4000), rng.integers(0, 50, 4000)) for _ in range(16)]
    assert p_value(columns) > 0.01
    shifted = [*columns, (columns[0][0], np.where(columns[0][1] < 4, 4, columns[0][1]))]
    assert p_value(shifted) < 1e-9
    assert p_value([(np.arange(1000), np.arange(1000) + 1000)]) == 1.0, "every value is rare: they say nothing"


def test_the_table_of_drawing():
    """Wall time is predicted from the first setting of a window; each setting stands beside its own plain loop."""
    codes, plain = np.zeros((2, 4), int), Setting(0, 1.0)
    found = [
        (plain, Measured(codes, np.array([144, 144]), 1.44, 1.0)),
        (Setting(8, 1.0), Measured(codes, np.array([30, 40]), 0.6, 1.0)),
        (Setting(8, 1.0, coupling="maximal"), Measured(codes, np.array([20, 20]), 0.36, 0.0)),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(found).splitlines()[2:]]
    assert rows[1][6:] == ["35.0 (40)", "15.00", "600", "600", "2.40x", "100.0%"]
    assert rows[2][6:] == ["20.0 (20)", "18.00", "360", "300", "4.00x", "0.0%"]


def test_every_setting_once():
    wanted = settings((2, 16), short=False)
    assert len(set(wanted)) == len(wanted)
    assert {how.coupling for how in wanted} == {"same", "maximal", "gumbel"} and all(how.window for how in wanted)


def test_predictions(capsys):
    """A pass of more codes never takes less, and for one image on an H100 16 codes take no more than one."""
    assert main(["predicted", "--topology", "h100-1", "--windows", "1", "16", "64"]) == 0
    told = capsys.readouterr().out
    assert "**predicted**" in told
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("| h100-1 ")
    ]
    costs = [[float(cell) for cell in row[3:6]] for row in rows if len(row) > 6]
    assert len(costs) == 3 and all(row == sorted(row) for row in costs)
    assert costs[0][0] == costs[0][1] and costs[2][2] > 2 * costs[2][0]


@pytest.mark.parametrize("wrong", [["drawing", "--model", "no/such/folder"], ["predicted", "--topology", "h9000-1"]])
def test_bad_input(wrong, capsys):
    assert main(wrong) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
