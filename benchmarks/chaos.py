"""Checks that killing a training run costs time and nothing else.

    python -m benchmarks.chaos [--kills 20] [--steps 240] [--workers 0] [--seed 0] [--at gs://bucket/chaos]

Trains a tiny model twice through the command line: once undisturbed, and once killed repeatedly, by SIGKILL and
SIGTERM, at random moments and at chosen ones (while it starts, steps, saves, removes an old checkpoint, exports), and
resumed with the same command. Both must produce the same bits; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common.kills import (
    MOMENTS,
    Failed,
    Kill,
    Process,
    await_moment,
    complete,
    half_removed,
    plan_kills,
    unfinished,
)
from examples.tiny.run import write_checkpoint, write_data
from janus_jax.io.messages import print_any_text
from janus_jax.io.stores import as_path
from janus_jax.sharding import make_mesh
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params, read_now
from train.config import TrainConfig
from train.data.mixture import Mixture
from train.overrides import load_config
from train.run.checkpoints import Workdir
from train.run.faults import AGAIN
from train.run.metrics import FILE, read_metrics
from train.step.earlier import open_run
from train.step.state import abstract_state

SAVE_EVERY = 2
CONFIG = """from examples.tiny.run import tiny_config
from train.config import EvalConfig


def get_config():
    return tiny_config({folders!r}, "", init_from={start!r}, steps={steps}, save_every={every}, evaluation=EvalConfig())
"""
_TIMED = {f"train/{name}" for name in ("tokens_per_second", "seconds_per_step", "data_wait", "mfu")}


@dataclasses.dataclass(frozen=True)
class Death:
    """What a kill came to: the exit code, the steps that have to be done again, what was left in pieces."""

    kill: Kill
    code: int
    lost: int
    ruins: list[str]


# ---------------------------------------------------------------- what a death leaves behind


def history(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    if not (workdir / FILE).exists():
        return []
    return [{name: x for name, x in line.items() if name not in _TIMED} for line in read_metrics(workdir)]


def check_history(lines: list[dict[str, Any]], reference: list[dict[str, Any]]):
    """Failed unless `lines` are the first ones of `reference`, each once and in order, bit for bit."""
    steps = [line["step"] for line in lines]
    if steps != list(range(1, len(steps) + 1)):
        wrong = next(i for i, step in enumerate(steps, 1) if step != i)
        raise Failed(f"{FILE}: step {steps[wrong - 1]} stands where step {wrong} belongs")
    for line, expected in zip(lines, reference, strict=False):
        differing = [name for name in expected if line.get(name) != expected[name]] or sorted(line.keys() - expected)
        if differing:
            name = differing[0]
            raise Failed(f"step {line['step']}: {name} is {line.get(name)!r}, undisturbed {expected.get(name)!r}")


def check_death(process: Process, kill: Kill, code: int, seen: int, before: int, workdir: pathlib.Path):
    """Failed where this death cost more than it may.

    Args:
      seen: the last step that was known of when the signal was sent.
      before: the newest complete checkpoint when the process was started.
    """
    lines, newest = history(workdir), max(complete(workdir), default=0)
    last = lines[-1]["step"] if lines else 0
    if newest < before:
        raise Failed(f"the checkpoint of step {before} is gone")
    if kill.signal == -code == signal.SIGKILL:
        if last - newest > 2 * SAVE_EVERY:  # one save in the background, and the next one waits for it
            raise Failed(f"step {last} was reported, the newest complete checkpoint is of step {newest}")
    elif kill.signal == -code == signal.SIGTERM:
        if process.minds_sigterm:
            raise Failed("SIGTERM ended it although its handler was in place")
    elif kill.signal == signal.SIGTERM and code == AGAIN:
        told = re.search(r"preempted; saved after step (\d+)", process.last_words)
        if not told or int(told[1]) != newest:
            raise Failed(f"the newest complete checkpoint is of step {newest}, it said: {process.last_words}")
        # The step that the signal comes in is still done, and what was known may be a step old.
        if not max(seen, before + 1) <= newest <= seen + 2:
            raise Failed(f"SIGTERM after step {seen}, saved after step {newest}")
        if last != newest:
            raise Failed(f"SIGTERM: saved after step {newest}, but {FILE} ends with step {last}")
    else:
        raise Failed(f"exit code {code} after {kill.signal.name}: {process.last_words}")


def check_start(process: Process, newest: int):
    """Failed where the process did not go on exactly from the newest complete checkpoint."""
    if process.began_after not in (None, newest):
        raise Failed(f"the newest complete checkpoint was of step {newest}, it went on after {process.began_after}")
    if process.steps and process.steps != list(range(newest + 1, newest + 1 + len(process.steps))):
        raise Failed(f"from the checkpoint of step {newest} it did the steps {process.steps}")


# ---------------------------------------------------------------- whole runs


def disturb(
    start: Callable[[int], Process],
    kills: list[Kill],
    config: TrainConfig,
    reference: list[dict[str, Any]],
    rng: random.Random,
) -> tuple[list[Process], list[Death]]:
    """Runs `config` to its end through all of `kills`, a line for each. Raises Failed."""
    workdir, deaths, processes, start_seconds = as_path(config.workdir), [], [], 30.0
    for number, kill in enumerate([*kills, None], 1):
        before = max(complete(workdir), default=0)
        process = start(number)
        processes.append(process)
        try:
            seen = before
            if kill:
                share = 1.5 * (config.steps - before) / (len(kills) - number + 2)
                # The very first save is that of the frozen parameters, before any step.
                target = 0 if number == 1 else before + rng.randint(1, max(1, int(share)))
                await_moment(process, kill, target, config, rng.uniform(0, start_seconds), rng)
                seen = process.step or before
            code = process.end(kill and kill.signal)
        finally:
            process.close()
            if number > 1:
                told = process.began_after
                print("-" if told is None else f"step {told}", flush=True)
        check_start(process, before)
        if kill is None and code:
            raise Failed(f"exit code {code} where nobody disturbed it: {process.last_words}")
        if kill is None:
            return processes, deaths
        if code == 0:
            raise Failed(f"it was done before kill {number} of {len(kills)} came; give it more --steps")
        start_seconds = process.start_seconds or start_seconds
        check_death(process, kill, code, seen, before, workdir)
        check_history(history(workdir), reference)
        newest, last = max(complete(workdir), default=0), process.step or before
        ruins = [f"unfinished {name.partition('.')[0]}" for name in unfinished(workdir)]
        ruins += [f"half-removed {step}" for step in half_removed(workdir)]
        deaths.append(Death(kill, code, max(last - newest, 0), ruins))
        print(
            f"{number:3d}  {kill.signal.name}  {kill.moment:8s}  after {process.seconds:5.1f} s and step {last:3d}, "
            f"exit {code:3d}, checkpoint {newest:3d}, {', '.join(ruins) or 'nothing'} in pieces; next start after ",
            end="",
            flush=True,
        )


def arrays(config: TrainConfig) -> dict[str, np.ndarray]:
    """Everything that a finished run leaves behind, by name, each part as its own readers give it."""
    workdir = as_path(config.workdir)
    found: dict[str, np.ndarray] = {}
    exported = checkpoint.array_leaves(
        workdir / "export" / str(config.steps) / checkpoint.PARAMS, abstract_params(config.model)
    )
    for name, leaves in {"export": exported, "run": open_run(workdir)[1]}.items():
        found |= {f"{name}/{'/'.join(path)}": read_now(leaf) for path, leaf in leaves.items()}
    data = json.loads((workdir / "run.json").read_text(encoding="utf-8"))["data"]
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    with Workdir(config, data) as opened:
        restored = opened.restore(*abstract_state(config, mesh))
    for name, tree in zip(("state", "frozen"), restored, strict=True):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {name + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found


def check_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    """Failed unless both hold the same arrays, bit for bit."""
    differing = sorted(found.keys() ^ expected.keys())
    differing += [
        name
        for name in sorted(found.keys() & expected.keys())
        if (found[name].dtype, found[name].shape) != (expected[name].dtype, expected[name].shape)
        or found[name].tobytes() != expected[name].tobytes()
    ]
    if differing:
        raise Failed(f"{len(differing)} of {len(expected)} arrays differ, {differing[0]} for one")


def check_rows(config: TrainConfig, lines: list[dict[str, Any]]) -> int:
    """Failed where a step of the history did not train on its own rows, or a sample came twice in one pass.

    Returns: the samples that were trained on.
    """
    mixture = Mixture(config.data, config.batch_size, config.seed)
    times: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for line in lines:
        plan = mixture.plan(line["step"] - 1)
        items = [item for row in plan.rows for item in row]
        times.update((item.kind, str(item.folder.folder), item.index) for item in items)
        fill = sum(item.length for item in items) / (config.batch_size * config.data.context)
        if (line["train/fill"], line["train/left_out_groups"]) != (fill, plan.left_out):
            raise Failed(f"step {line['step']} was not trained on its own rows")
    groups = mixture.groups(0) * len(lines)
    for folder in mixture.folders:
        passes = math.ceil(groups * mixture.ratio[folder.kind] / len(folder))
        most = max(times[folder.kind, str(folder.folder), index] for index in range(len(folder)))
        if most > passes:
            raise Failed(f"a {folder.kind} sample was trained on {most} times in {passes} passes")
    return times.total()


# ---------------------------------------------------------------- the whole


def prepare(folder: pathlib.Path, steps: int) -> pathlib.Path:
    """Writes data, first parameters and the config of the run into `folder`; returns the config's file."""
    folders = write_data(folder / "data", count=64)
    path = folder / "chaos.py"
    begin = str(write_checkpoint(folder / "start"))
    path.write_text(CONFIG.format(folders=folders, start=begin, steps=steps, every=SAVE_EVERY), encoding="utf-8")
    return path


def chaos(folder: pathlib.Path, kills: int, steps: int, workers: int = 0, seed: int = 0, at: str = ""):
    """Runs both runs in `folder` and compares them; prints what came of it. Raises Failed.

    Args:
      at: an empty folder for the disturbed run's workdir, which may be in a store.
    """
    places = {"undisturbed": folder / "undisturbed", "disturbed": as_path(at or folder) / "disturbed"}
    if places["disturbed"].exists():
        raise ValueError(f"{places['disturbed']} is not empty; choose another folder")
    rng = random.Random(seed)
    file = str(prepare(folder, steps))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(name: str, number: int) -> Process:
        arguments = ["--config", file, f"workdir={places[name]}", f"data.workers={workers}"]
        return Process([sys.executable, "-m", "train.main", *arguments], environment, folder / f"{name}-{number}.log")

    calm, wild = (load_config(file, [f"workdir={place}"]) for place in places.values())
    alone = start("undisturbed", 1)
    if code := alone.end():
        raise Failed(f"the undisturbed run ended with {code}: {alone.last_words}")
    reference = history(folder / "undisturbed")
    check_history(reference, reference)
    print(f"undisturbed: {len(reference)} steps in {alone.seconds:.0f} s", flush=True)
    began = time.monotonic()
    planned = plan_kills(kills, rng)
    processes, deaths = disturb(functools.partial(start, "disturbed"), planned, wild, reference, rng)
    seconds = time.monotonic() - began

    workdir = places["disturbed"]
    if left := unfinished(workdir) + [str(step) for step in half_removed(workdir)]:
        raise Failed(f"left in pieces in the workdir: {', '.join(left)}")
    lines = history(workdir)
    check_history(lines, reference)
    if not len(lines) == len(reference) == steps:
        raise Failed(f"the history has {len(lines)} steps, the undisturbed one {len(reference)}, not {steps}")
    samples = check_rows(wild, lines)
    expected = arrays(calm)
    check_arrays(arrays(wild), expected)

    print("\n| moment | SIGKILL | SIGTERM | something left in pieces | most steps to do again |\n|---|---|---|---|---|")
    for moment in MOMENTS:
        if those := [death for death in deaths if death.kill.moment == moment]:
            signals = collections.Counter(death.kill.signal for death in those)
            in_pieces, lost = sum(bool(death.ruins) for death in those), max(death.lost for death in those)
            print(f"| {moment} | {signals[signal.SIGKILL]} | {signals[signal.SIGTERM]} | {in_pieces} | {lost} |")
    codes = collections.Counter(death.code for death in deaths)
    done = sum(len(process.steps) for process in processes)
    first = statistics.median(process.start_seconds for process in processes if process.start_seconds)
    print(
        f"\n{len(deaths)} kills, exit codes: {', '.join(f'{code} ({count})' for code, count in codes.items())}\n"
        f"{done} steps reported, {steps} in the final history: {done - steps} done again ({done / steps - 1:.1%})\n"
        f"{seconds:.0f} s, undisturbed {alone.seconds:.0f} s; {first:.1f} s from a start to its first step\n"
        f"identical bit for bit: {len(expected)} arrays (trained, frozen, optimizer state, export), {steps} lines of "
        f"metrics\n{samples} samples, each in its own step's rows and none twice in a pass; nothing left in pieces"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 where both runs came to the same, else 1 and a line."""
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="3 or more")
    parser.add_argument("--steps", type=int, default=240, help="of each run; ten or more for each kill")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--at", default="", help="an empty folder for the disturbed run's workdir; gs:// and s3:// too")
    args = parser.parse_args(argv)
    if args.kills < 3 or args.steps < 10 * args.kills:
        parser.error(f"--kills {args.kills} --steps {args.steps}: 3 kills or more, and ten steps or more for each")
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        try:
            chaos(pathlib.Path(folder), args.kills, args.steps, args.workers, args.seed, args.at)
        except (Failed, OSError, ValueError) as error:
            print(f"\nFAILED: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
