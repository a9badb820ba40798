"""What runs on handwritten digits with several seeds come to together: `python -m examples.digits.spread RUN...`.

A run's figures depend on its seed, so one run says little about what the next will give: this prints, in Markdown, each
run's figures, their mean, their standard deviation (of one run, not of the mean) and their range.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line, print_any_text, print_error

# What two runs must have in common to be averaged.
_SETTINGS = ("split", "questions", "images_per_class", "guidance", "temperature")
_SHARES = ("judge", "reconstruction", "understanding", "generation", "lowest_class")


def read_runs(folders: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """The figures of finished runs (see `examples.digits.run.run`), by seed.

    Raises: ValueError or OSError, in one line, for a folder without them, a seed given twice, and runs that were judged
      in another way than the first one.
    """
    runs = []
    for folder in folders:
        path = folder / "results.json"
        run = read_json_object(path)
        numbers = [run.get(name) for name in ("seed", "distinct", "cpu_seconds", *_SETTINGS[1:], *_SHARES)]
        seconds = run.get("seconds")
        numbers += seconds.values() if isinstance(seconds, dict) else [None]
        if not isinstance(run.get("split"), str) or not all(isinstance(x, int | float) for x in numbers):
            raise ValueError(f"{one_line(path)} does not hold the figures of `train.main --config digits`")
        for name in _SETTINGS if runs else ():
            if run[name] != runs[0][name]:
                given = f"{one_line(run[name], 40)} in {one_line(path)}, {one_line(runs[0][name], 40)} in the first run"
                raise ValueError(f"{name} is {given}: they cannot be averaged")
        if any(run["seed"] == other["seed"] for other in runs):
            raise ValueError(f"{one_line(path)} is of seed {one_line(run['seed'], 40)}, as is another one")
        runs.append(run)
    return sorted(runs, key=lambda run: run["seed"])


def spread_table(runs: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `read_runs`: a column for each seed, then mean, standard deviation and range."""
    first = runs[0]
    drawn = 10 * first["images_per_class"]
    names = {
        "judge": f"judge on the images of {first['split']}",
        "reconstruction": "reconstructions recognized",
        "understanding": f"understanding, {first['questions']} questions",
        "generation": f"generation, {drawn} images, guidance {first['guidance']:g}, "
        f"temperature {first['temperature']:g}",
        "lowest_class": "lowest class",
    }
    rows = [_row(names[name], [100 * run[name] for run in runs], "%") for name in _SHARES]
    rows.append(_row("distinct images", [run["distinct"] for run in runs], "", 0))
    rows.append(_row("minutes, the whole command", [sum(run["seconds"].values()) / 60 for run in runs], ""))
    rows.append(_row("minutes of two cores' work", [run["cpu_seconds"] / 120 for run in runs], ""))
    seeds = " | ".join(f"seed {run['seed']}" for run in runs)
    head = f"| | {seeds} | mean | standard deviation | range |"
    return "\n".join([head, "|---" * (len(runs) + 4) + "|", *rows])


def _row(name: str, values: Sequence[float], unit: str, places: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    cells = [f"{value:.{places}f}{unit}" for value in (*values, statistics.mean(values))]
    extent = f"{min(values):.{places}f}{unit} to {max(values):.{places}f}{unit}"
    return f"| {name} | {' | '.join(cells)} | {deviation:.{max(places, 1)}f} | {extent} |"


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m examples.digits.spread", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="workdirs of finished runs, one for each seed")
    try:
        print(spread_table(read_runs(parser.parse_args(argv).runs)))
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
