"""What kills do to a training run: they cost time, and nothing else.

    python -m benchmarks.chaos [--kills 20] [--steps 240] [--workers 0] [--seed 0]

Trains a tiny model twice through the command line: once undisturbed, and once killed again and again, by SIGKILL and
SIGTERM, at random moments and at chosen ones (while it starts, steps, saves, removes an old checkpoint, exports), and
started again by the same command. Both have to come to the same bits. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from janus_jax import checkpoint
from janus_jax.sharding import make_mesh
from janus_jax.torch_weights import abstract_params, read_now
from tests.tiny_run import write_checkpoint, write_data
from train.checkpoints import Workdir, open_run
from train.config import TrainConfig
from train.faults import AGAIN
from train.metrics import FILE, read_metrics
from train.mixture import Mixture
from train.overrides import load_config
from train.state import abstract_state

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAVE_EVERY = 2
MOMENTS = ("start", "step", "save", "clean-up", "export")
CONFIG = """from tests.tiny_run import tiny_config
from train.config import EvalConfig


def get_config():
    return tiny_config({folders!r}, "", init_from={start!r}, steps={steps}, save_every={every}, evaluation=EvalConfig())
"""
_TIMED = {f"train/{name}" for name in ("tokens_per_second", "seconds_per_step", "data_wait", "mfu")}
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_PATIENCE = 300  # seconds in which a process has to come to any moment, or to its end


class Failed(Exception):
    """A run did what it must not."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """A signal, and the moment that it is kept for."""

    moment: str
    signal: signal.Signals


def plan_kills(count: int, rng: random.Random) -> list[Kill]:
    """`count` kills: the first at the first save of all, the last in the export, between them every moment and signal.

    A process that removes a checkpoint or exports hardly minds SIGTERM: these kills are SIGKILL.
    """
    between = ["start"] * (count // 6) + ["save"] * (count // 3) + ["clean-up"] * (count // 8)
    between = between[: max(count - 3, 0)]
    between += ["step"] * (count - 3 - len(between))
    rng.shuffle(between)
    # A whole start is measured in the second process, for those that are to be killed while they start.
    moments = ["save", "step", *between, "export"][-count:]
    signals = [signal.SIGKILL, signal.SIGTERM] * count
    rng.shuffle(signals)
    return [
        Kill(moment, signal.SIGKILL if moment in ("clean-up", "export") else signals.pop())
        for moment in moments
    ]


class Process:
    """One start of the run, its output in `log` and `log`.err."""

    def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path):
        self.errors = log.with_suffix(".err")
        with log.open("wb") as out, self.errors.open("wb") as err:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, cwd=ROOT, start_new_session=True
            )
        self._file = log.open(encoding="utf-8")
        self._text, self.steps = "", []
        self._began, self.start_seconds, self.seconds = time.monotonic(), None, None

    def read(self) -> None:
        """Takes in what was printed since."""
        if more := self._file.read():
            self._text += more
            self.steps = [int(step) for step in re.findall(r"^step (\d+)/.*\n", self._text, re.MULTILINE)]
            if self.steps and self.start_seconds is None:
                self.start_seconds = time.monotonic() - self._began

    @property
    def age(self) -> float:
        return time.monotonic() - self._began

    @property
    def began_after(self) -> int | None:
        """The step that it went on after; None where it had not come so far."""
        if "  a step: " not in self._text:
            return None
        found = re.search(r"going on after step (\d+)\n", self._text)
        # The line comes after the others: its absence tells nothing before there is a step.
        return int(found[1]) if found else 0 if self.steps else None

    @property
    def described(self) -> bool:
        """Whether it has surely come past the point where it minds SIGTERM."""
        return "stage 3" in self._text

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self, number: signal.Signals) -> None:
        if not self.ended:
            self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code; Failed where there is none in time."""
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"a process did not end within {_PATIENCE} s") from None
        finally:
            self.close()
        return code

    def close(self) -> None:
        """Leaves nothing of it running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.seconds = self.seconds or self.age
        self.read()

    def last_words(self) -> str:
        return self.errors.read_text(encoding="utf-8").strip()


# ---------------------------------------------------------------- the moment of a kill


def complete(workdir: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())
    return []


def unfinished(workdir: pathlib.Path) -> list[str]:
    """Checkpoints, frozen parameters and exports that are being written, or were when the process died."""
    places = ("", "checkpoints/", "export/*/")
    return [str(path.relative_to(workdir)) for place in places for path in workdir.glob(place + _TEMPORARY)]


def half_removed(workdir: pathlib.Path) -> list[int]:
    """Checkpoints that bear a step's name and lack a part."""
    folders = [(step, workdir / "checkpoints" / str(step)) for step in complete(workdir)]
    return [
        step
        for step, folder in folders
        if not (folder / "_CHECKPOINT_METADATA").is_file()
        or not all(checkpoint.has_arrays(folder / part) for part in ("trained", "rest"))
    ]


def await_moment(
    process: Process, kill: Kill, target: int, workdir: pathlib.Path, keep: int, start_seconds: float, rng: random.Random
) -> None:
    """Returns when it is time for `kill`, from step `target` on, or when the process has ended."""
    began = start_seconds * rng.uniform(0, 1.1)
    reached: dict[str, Callable[[], bool]] = {
        "start": lambda: process.age > began,
        "step": lambda: bool(process.steps) and process.steps[-1] >= target,
        "save": lambda: (not target or process.steps[-1:] >= [target]) and bool(unfinished(workdir)),
        "clean-up": lambda: process.steps[-1:] >= [target] and len(complete(workdir)) > keep,
        "export": lambda: any(name.startswith("export") for name in unfinished(workdir)),
    }
    # About as long as each lasts.
    after = {"start": 0.0, "step": 0.2, "save": 0.1, "clean-up": 0.004, "export": 0.05}[kill.moment]
    while not reached[kill.moment]():
        if process.ended:
            return
        if process.age > _PATIENCE:
            raise Failed(f"no moment '{kill.moment}' came within {_PATIENCE} s")
        if kill.moment != "clean-up":
            time.sleep(0.001)
        process.read()
    time.sleep(rng.uniform(0, after))
    process.read()


# ---------------------------------------------------------------- what a death leaves behind


def history(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    if not (workdir / FILE).exists():
        return []
    return [{name: x for name, x in line.items() if name not in _TIMED} for line in read_metrics(workdir)]


def check_history(lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
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


def check_death(process: Process, kill: Kill, code: int, seen: int, before: int, workdir: pathlib.Path) -> None:
    """Failed where this death cost more than it may.

    Args:
      seen: the last step that it had reported when the signal was sent.
      before: the newest complete checkpoint when it was started.
    """
    lines, newest = history(workdir), max(complete(workdir), default=0)
    last = lines[-1]["step"] if lines else 0
    words = process.last_words()
    if newest < before:
        raise Failed(f"the checkpoint of step {before} is gone")
    if kill.signal == signal.SIGKILL:
        if code != -signal.SIGKILL:
            raise Failed(f"exit code {code} after SIGKILL: {words}")
        if last - newest > 2 * SAVE_EVERY:  # one save in the background, and the next one waits for it
            raise Failed(f"step {last} was reported, the newest complete checkpoint is of step {newest}")
    elif code == -signal.SIGTERM:
        if process.described:
            raise Failed("SIGTERM ended it although its handler was in place")
    elif code == AGAIN:
        told = re.search(r"told to end; saved after step (\d+)", words)
        if not told or int(told[1]) != newest:
            raise Failed(f"the newest complete checkpoint is of step {newest}, but it said: {words}")
        # What was seen may be a step old when the signal comes, and the step that it comes in is still done.
        if not max(seen, before + 1) <= newest <= max(seen, before) + 2:
            raise Failed(f"SIGTERM after step {seen}, saved after step {newest}")
        if last != newest:
            raise Failed(f"saved after step {newest} on SIGTERM, but {FILE} ends with step {last}")
    else:
        raise Failed(f"exit code {code} after SIGTERM: {words}")


def check_start(process: Process, newest: int) -> None:
    """Failed where the process did not go on exactly from the newest complete checkpoint."""
    if process.began_after not in (None, newest):
        raise Failed(f"the newest complete checkpoint was of step {newest}, it went on after {process.began_after}")
    if process.steps and process.steps != list(range(newest + 1, newest + 1 + len(process.steps))):
        raise Failed(f"from the checkpoint of step {newest} it did the steps {process.steps}")


# ---------------------------------------------------------------- whole runs


def disturb(
    start: Callable[[int], Process], kills: list[Kill], config: TrainConfig, reference: list, rng: random.Random
) -> Iterator[Process]:
    """Yields every process of the disturbed run, ended; prints a line a kill. Raises Failed."""
    workdir, start_seconds, row = pathlib.Path(config.workdir), 30.0, ""
    for number, kill in enumerate(kills, 1):
        before = max(complete(workdir), default=0)
        left = len(kills) - number + 1
        stride = rng.randint(1, max(1, 2 * (config.steps - before) // (left + 1)))
        # The very first save is that of the frozen parameters, before any step.
        target = 0 if number == 1 else min(before + stride, config.steps - 2 * SAVE_EVERY)
        process = start(number)
        try:
            await_moment(process, kill, target, workdir, config.keep, start_seconds, rng)
            seen = process.steps[-1] if process.steps else before
            process.kill(kill.signal)
            code = process.wait()
        finally:
            process.close()
        start_seconds = process.start_seconds or start_seconds
        if row:
            began = process.began_after
            print(row + ("died before it told" if began is None else f"went on after {began}"), flush=True)
        check_start(process, before)
        if code == 0:
            raise Failed(f"it was done before kill {number} of {len(kills)} came; give it more --steps")
        check_death(process, kill, code, seen, before, workdir)
        check_history(history(workdir), reference)
        newest, last = max(complete(workdir), default=0), process.steps[-1] if process.steps else before
        ruins = [f"unfinished {name.removesuffix('.orbax-checkpoint-tmp')}" for name in unfinished(workdir)]
        ruins += [f"half-removed {step}" for step in half_removed(workdir)]
        row = (
            f"{number:3d}  {kill.signal.name}  {kill.moment:8s}  {process.seconds:5.1f} s, step {last:3d}, exit {code:3d}, "
            f"checkpoint {newest:3d}{''.join(f', {ruin}' for ruin in ruins)}; "
        )
        process.kill_, process.code, process.ruins, process.lost = kill, code, ruins, max(last - newest, 0)
        yield process
    before, process = max(complete(workdir), default=0), start(len(kills) + 1)
    code = process.wait()
    print(row + f"went on after {process.began_after}", flush=True)
    check_start(process, before)
    if code:
        raise Failed(f"exit code {code} where nobody disturbed it: {process.last_words()}")
    process.kill_ = None
    yield process


def arrays(config: TrainConfig) -> dict[str, np.ndarray]:
    """Everything that a finished run leaves behind, by name, each part as its own readers give it."""
    workdir = pathlib.Path(config.workdir)
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


def check_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
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


def chaos(folder: pathlib.Path, kills: int, steps: int, workers: int = 0, seed: int = 0) -> None:
    """Runs both runs in `folder` and compares them; prints what came of it. Raises Failed."""
    rng = random.Random(seed)
    file = str(prepare(folder, steps))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    configs = {name: load_config(file, [f"workdir={folder / name}"]) for name in ("undisturbed", "disturbed")}

    def start(name: str, number: int) -> Process:
        arguments = ["--config", file, f"workdir={folder / name}", f"data.workers={workers}"]
        return Process([sys.executable, "-m", "train.main", *arguments], environment, folder / f"{name}-{number}.log")

    process = start("undisturbed", 0)
    if code := process.wait():
        raise Failed(f"the undisturbed run ended with {code}: {process.last_words()}")
    reference = history(folder / "undisturbed")
    check_history(reference, reference)
    print(f"undisturbed: {len(reference)} steps in {process.seconds:.0f} s", flush=True)

    began = time.monotonic()
    starter = functools.partial(start, "disturbed")
    processes = list(disturb(starter, plan_kills(kills, rng), configs["disturbed"], reference, rng))
    seconds = time.monotonic() - began
    left = unfinished(folder / "disturbed") + [str(step) for step in half_removed(folder / "disturbed")]
    if left:
        raise Failed(f"left behind in the workdir: {', '.join(left)}")
    lines = history(folder / "disturbed")
    check_history(lines, reference)
    if len(lines) != len(reference) or len(lines) != steps:
        raise Failed(f"the history has {len(lines)} steps, the undisturbed one {len(reference)}")
    samples = check_rows(configs["disturbed"], lines)
    expected = arrays(configs["undisturbed"])
    check_arrays(arrays(configs["disturbed"]), expected)

    killed = [process for process in processes if process.kill_]
    print("\n| moment | SIGKILL | SIGTERM | left unfinished or half-removed | most steps done again |\n|---|---|---|---|---|")
    for moment in MOMENTS:
        those = [process for process in killed if process.kill_.moment == moment]
        if those:
            signals = collections.Counter(process.kill_.signal for process in those)
            ruined, lost = sum(bool(process.ruins) for process in those), max(process.lost for process in those)
            print(f"| {moment} | {signals[signal.SIGKILL]} | {signals[signal.SIGTERM]} | {ruined} | {lost} |")
    codes = collections.Counter(process.code for process in killed)
    done = sum(len(process.steps) for process in processes)
    starts = [process.start_seconds for process in processes if process.start_seconds]
    print(
        f"\n{len(killed)} kills: exit codes {', '.join(f'{code} x {count}' for code, count in sorted(codes.items()))}\n"
        f"{done} steps reported for the {steps} of the final history: {done - steps} done again, {done / steps - 1:.1%}\n"
        f"{seconds:.0f} s, undisturbed {process_seconds(folder, process):.0f} s; "
        f"a start takes {np.median(starts):.1f} s to its first step\n"
        f"{len(expected)} arrays (trained, frozen, optimizer state, export) and {steps} lines of metrics identical, "
        f"bit for bit; {samples} samples, none twice in a pass; nothing unfinished left behind"
    )
