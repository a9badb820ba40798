"""What the benchmarks share: a process for each variant, medians, tables, and the record.

A command measures its variants one after the other, each in a process of its own, and then all of them again, so that
a drift of the machine meets every variant alike. The processes are the same command with `--json VARIANT`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from janus_jax.config import PRESETS

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"

Run = dict[str, Any]
Runs = dict[str, list[Run]]
Table = list[Sequence[str]]


# ---------------------------------------------------------------- command lines


def make_parser(name: str, doc: str, rounds: int = 2) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes; `doc` is its module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("--preset", default="janus_pro_1b", choices=sorted(PRESETS), help="(default %(default)s)")
    parser.add_argument("--rounds", type=count, default=rounds, help="times around all variants (default %(default)s)")
    parser.add_argument("--variant", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument(
        "--record", nargs="?", type=pathlib.Path, const=RESULTS, metavar="FILE",
        help="also append the table under its heading to FILE (default benchmarks/RESULTS.md)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="VARIANT", help=argparse.SUPPRESS)
    return parser


def count(text: str) -> int:
    """argparse type for an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, variants: Sequence[str]) -> list[str]:
    """The variants that were asked for; ends the process in one line for one that there is not."""
    for variant in args.variant or ():
        if variant not in variants:
            parser.error(f"unknown variant {variant!r}; known: {', '.join(variants)}")
    return args.variant or list(variants)


# ---------------------------------------------------------------- processes


def run_rounds(
    name: str,
    arguments: Sequence[str],
    variants: Sequence[str],
    rounds: int,
    environment: Callable[[int, str], dict[str, str]] = lambda number, variant: {},
) -> Runs:
    """Runs `python -m benchmarks.<name> <arguments> --json <variant>` for each variant, `rounds` times around.

    Args:
      environment: (round, variant) to what the process's environment has beside ours.
    Returns: the rounds of each variant. One that fails has {"failed": exit code} last, and is not run again. Stopped by
      SIGINT or SIGTERM, the rounds so far: the variant that was stopped counts as failed.
    """
    runs: Runs = {variant: [] for variant in variants}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, variant in itertools.product(range(rounds), variants):
            if any("failed" in run for run in runs[variant]):
                continue
            print(f"round {number + 1} of {rounds}: {variant}", file=sys.stderr, flush=True)
            runs[variant].append(run_child(name, [*arguments, "--json", variant], environment(number, variant)))
    except KeyboardInterrupt:
        runs[variant].append({"failed": -signal.SIGTERM})
        print("stopped: what was measured before follows", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    return runs


def run_child(name: str, arguments: Sequence[str], environment: dict[str, str]) -> Run:
    """What the process prints as its last line, or {"failed": exit code}."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, cwd=ROOT)
    return {"failed": ended.returncode} if ended.returncode else json.loads(ended.stdout.splitlines()[-1])


# ---------------------------------------------------------------- statistics


def done(runs: Runs) -> Runs:
    """The rounds that did not fail, of the variants that have any."""
    good = {variant: [run for run in own if "failed" not in run] for variant, own in runs.items()}
    return {variant: own for variant, own in good.items() if own}


def dtype_of(runs: Runs) -> str:
    """What all variants computed in."""
    return " and ".join(dict.fromkeys(run["dtype"] for own in done(runs).values() for run in own))


def median(runs: Sequence[Run], key: str) -> float:
    """Of all values under `key`, each round's one or its list; NaN where there are none."""
    values = [value for run in runs for value in _list(run.get(key, []))]
    return statistics.median(values) if values else math.nan


def ratio(theirs: Sequence[Run], ours: Sequence[Run], key: str) -> float:
    """How many times as fast as `theirs` we are: the median over the rounds of one another's medians."""
    pairs = zip(theirs, ours, strict=False)
    ratios = [median([their], key) / median([our], key) for their, our in pairs]
    return statistics.median(ratios) if ratios else math.nan


def cell(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; empty for NaN and None."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"


def _list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


# ---------------------------------------------------------------- tables


def markdown(rows: Table) -> str:
    """A Markdown table; the first row names the columns."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def versions() -> str:
    """Of jax, jaxlib, torch and transformers, as far as they are installed."""
    found = []
    for package in ("jax", "jaxlib", "torch", "transformers"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def publish(
    name: str, heading: str, about: str, rows: Table, runs: Runs, arguments: Sequence[str], record: pathlib.Path | None
) -> int:
    """Prints a table and what it was measured on, and appends both to `record`.

    Args:
      heading: of the section in `record`.
      about: one line or more on what the figures are.
      runs: all rounds, failed ones too, which are named below the table.
      arguments: of the command line.
    Returns: the exit code, 1 where a variant failed.
    """
    devices = list(dict.fromkeys(own["device"] for rounds in done(runs).values() for own in rounds))
    failed = {variant: own[-1]["failed"] for variant, own in runs.items() if own and "failed" in own[-1]}
    lines = [
        f"`{shlex.join(['python', '-m', f'benchmarks.{name}', *arguments])}`",
        f"on {' and '.join(devices) or 'no device'}; {versions()}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d}.",
        about,
        "",
        markdown(rows),
        *(f"\nFailed: {variant} (exit code {code})." for variant, code in failed.items()),
    ]
    text = "\n".join(lines)
    print(text)
    if record:
        append(record, f"{heading}: `python -m benchmarks.{name}`", text)
        print(f"appended to {record}", file=sys.stderr)
    return 1 if failed else 0


def append(path: pathlib.Path, heading: str, text: str):
    """Puts `text` at the end of the section `heading` of a Markdown file; both are made where they are not there."""
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    lines = before.rstrip("\n").split("\n")
    title = f"## {heading}"
    if title in lines:
        start = lines.index(title) + 1
        end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
        head, tail = "\n".join(lines[:end]).rstrip("\n"), "\n".join(lines[end:])
    else:
        head, tail = "\n".join([*lines, "", title]), ""
    path.write_text("\n".join([head, "", text, *(["", tail] if tail else [])]) + "\n", encoding="utf-8")
