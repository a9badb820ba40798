"""Processes that are killed, and the moments to kill them at; see `benchmarks.chaos`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable

from janus_jax.io.store_access import is_store
from janus_jax.io.stores import StorePath, as_path
from janus_jax.weights import checkpoint
from train.config import TrainConfig
from train.step.earlier import CHECKPOINTS, COMPLETE, FROZEN, complete_steps, whole

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOMENTS = ("start", "step", "save", "clean-up", "export")
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_PATIENCE = 900  # seconds in which a process has to come to any moment, or to its end
_LEAVE = 10  # seconds in which what it started has to be gone too


class Failed(Exception):
    """A run did what it must not."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """A signal, and the moment that it is kept for."""

    moment: str
    signal: signal.Signals


def plan_kills(count: int, rng: random.Random) -> list[Kill]:
    """`count` kills, 3 or more: the first at the very first save, the last in the export, all others in between.

    Where SIGTERM would only let the process go on, in that save, in the export and where it removes a checkpoint, it is
    SIGKILL.
    """
    between = ["start"] * (count // 6) + ["save"] * (count // 3) + ["clean-up"] * (count // 8)
    between = between[: count - 3] + ["step"] * (count - 3 - len(between))
    rng.shuffle(between)
    # A whole start is measured in the second process, for those that are to be killed while they start.
    moments = ["save", "step", *between, "export"]
    signals = [signal.SIGKILL, signal.SIGTERM] * count
    rng.shuffle(signals)
    hard = [number == 0 or moment in ("clean-up", "export") for number, moment in enumerate(moments)]
    return [Kill(moment, signal.SIGKILL if h else signals.pop()) for moment, h in zip(moments, hard, strict=True)]


class Process:
    """One start of the run, with its output in `log` and beside it.

    Attributes:
      steps: those that it has reported.
      start_seconds: until the first of them.
      seconds: that it lived.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path):
        self._errors = log.with_suffix(".err")
        with log.open("wb") as out, self._errors.open("wb") as err:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, cwd=ROOT, start_new_session=True
            )
        self._file, self._text = log.open(encoding="utf-8"), ""
        self.steps: list[int] = []
        self._began, self.start_seconds, self.seconds = time.monotonic(), None, None

    def read(self):
        """Takes in what was printed since."""
        if more := self._file.read():
            self._text += more
            self.steps = [int(step) for step in re.findall(r"^step (\d+)/.*\n", self._text, re.MULTILINE)]
            if self.steps and self.start_seconds is None:
                self.start_seconds = self.age

    @property
    def age(self) -> float:
        return time.monotonic() - self._began

    @property
    def step(self) -> int:
        """The last one that it has reported; 0 for none."""
        return self.steps[-1] if self.steps else 0

    @property
    def began_after(self) -> int | None:
        """The step that it went on after; None where it did not come so far as to tell."""
        found = re.search(r"resuming after step (\d+)\n", self._text)
        return int(found[1]) if found else 0 if self.steps else None

    @property
    def minds_sigterm(self) -> bool:
        """Whether it is surely past the place where it sets its handler."""
        return "stage 3" in self._text

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def last_words(self) -> str:
        return self._errors.read_text(encoding="utf-8").strip()

    def end(self, number: signal.Signals | None = None) -> int:
        """Sends a signal, waits for the end and returns the exit code; Failed where it does not come in time."""
        try:
            if number and not self.ended:
                self._process.send_signal(number)
            return self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"a process did not end within {_PATIENCE} s") from None
        finally:
            self.close()

    def close(self):
        """Leaves nothing of it running, its workers included."""
        self.seconds = self.seconds or self.age
        with contextlib.suppress(ProcessLookupError):
            # Its workers see that it is gone, and shared memory is given back by the last of them.
            until = time.monotonic() + (_LEAVE if self.ended else 0)
            while time.monotonic() < until:
                os.killpg(self._process.pid, 0)
                time.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.read()


# ---------------------------------------------------------------- the moment of a kill


def complete(workdir: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    if is_store(workdir):
        return sorted(complete_steps(workdir))
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())
    return []


def unfinished(workdir: pathlib.Path) -> list[str]:
    """Checkpoints, frozen parameters and exports that are being written, or were when the process died."""
    if is_store(workdir):
        return _begun(workdir)[0]
    places = ("", "checkpoints/", "export/*/")
    return [str(path.relative_to(workdir)) for place in places for path in workdir.glob(place + _TEMPORARY)]


def _begun(workdir: StorePath) -> tuple[list[str], list[str]]:
    """Folders in a store that lack their last object: those that are being written, and checkpoints being removed."""
    last: dict[str, bool] = {}
    for path in workdir.walk():
        parts = path.relative_to(workdir).parts
        if parts[0] in (FROZEN, CHECKPOINTS, "export") and len(parts) > 1:
            place = "/".join(parts[: 1 if parts[0] == FROZEN else 2])
            last[place] = last.get(place, False) or parts[-1] in (COMPLETE, "config.json")
    newest = max(
        (int(place.partition("/")[2]) for place, whole in last.items() if whole and place[0] == "c"), default=-1
    )
    old = {place for place, whole in last.items() if place[0] == "c" and int(place.partition("/")[2]) < newest}
    lacking = [place for place, whole in last.items() if not whole]
    return [place for place in lacking if place not in old], [place for place in lacking if place in old]


def half_removed(workdir: pathlib.Path) -> list[int]:
    """Checkpoints that bear a step's name and lack a part."""
    folders = [(step, workdir / "checkpoints" / str(step)) for step in complete(workdir)]
    return [
        step
        for step, folder in folders
        if not (is_store(folder) or (folder / "_CHECKPOINT_METADATA").is_file())
        or not all(checkpoint.has_arrays(whole(folder) / part) for part in ("trained", "rest"))
    ]


def _is_removing(workdir: pathlib.Path, keep: int) -> bool:
    return bool(_begun(workdir)[1]) if is_store(workdir) else len(complete(workdir)) > keep


def await_moment(process: Process, kill: Kill, target: int, config: TrainConfig, began: float, rng: random.Random):
    """Returns when it is time for `kill`, from step `target` on, or when the process has ended.

    Args:
      began: seconds after which a process that is to be killed while it starts has been starting for long enough.
    """
    workdir = as_path(config.workdir)
    has_come: Callable[[], bool] = {
        "start": lambda: process.age > began,
        "step": lambda: process.step >= target,
        "save": lambda: process.step >= target and bool(unfinished(workdir)),
        "clean-up": lambda: process.step >= target and _is_removing(workdir, config.keep),
        "export": lambda: any(name.startswith("export") for name in unfinished(workdir)),
    }[kill.moment]
    # About as long as each lasts.
    lasts = {"start": 0.0, "step": 0.2, "save": 0.1, "clean-up": 0.004, "export": 0.05}[kill.moment]
    while not has_come():
        if process.ended:
            return
        if process.age > _PATIENCE:
            raise Failed(f"no moment '{kill.moment}' came within {_PATIENCE} s")
        if is_store(workdir):
            time.sleep(0.1)  # between listings
        elif kill.moment != "clean-up":
            time.sleep(0.001)
        process.read()
    time.sleep(rng.uniform(0, lasts))
    process.read()
