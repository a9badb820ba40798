"""Writes a run's metrics: metrics.jsonl, a line on the console, and the writers that its config names."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from janus_jax.io.files import parse_json
from janus_jax.io.stores import as_path
from janus_jax.io.whole.files import write_file
from train.run.distributed import say
from train.run.failures import Failures
from train.watch.writers import JSONL, WRITERS, Opening

FILE = "metrics.jsonl"
# The metrics in a console line, in this order, if present.
_SHOWN = (
    "loss", "loss_understanding", "loss_text", "loss_generation", "reward", "kl", "entropy", "distinct", "dpo_loss",
    "preferred", "grad_norm", "learning_rate", "mfu",
)  # fmt: skip


class Metrics:
    """Writes metrics of a run; a context manager.

    Lines of an existing metrics.jsonl after `start_step` are removed, as is an incomplete last one: those steps are
    repeated. If other lines are damaged, the old file is kept under another name.

    Args:
      workdir: folder for metrics.jsonl and what other writers keep there.
      total_steps: steps of the whole run.
      start_step: steps done before this process.
      enabled: False on hosts that report nothing.
      failures: reports and suppresses errors of the writers.
      writers: names of `train.watch.writers.WRITERS`; metrics.jsonl is written in any case.
      name, config: of the run, for writers that show them.
      shared: the folder that a later start has too, if that is not `workdir`.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        failures: Failures | None = None,
        writers: Sequence[str] = ("tensorboard",),
        name: str = "",
        config: Mapping[str, Any] | None = None,
        shared: pathlib.Path | None = None,
    ):
        self.enabled, self.total_steps = enabled, total_steps
        self._last = (start_step, time.monotonic())
        self._rate: float | None = None
        self._compiling = True
        self._guard = failures.alone if failures else contextlib.nullcontext
        self._path, self._file = pathlib.Path(workdir) / FILE, None
        self._writers: dict[str, Any] = {}
        self._pending: list[bytes] = []
        self._seen: set[tuple[int, str]] = set()
        if not enabled:
            return
        with self._guard(f"opening {FILE}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._seen = _cut(self._path, start_step)
            self._open()
        opening = Opening(self._path.parent, name, config or {}, start_step, shared or self._path.parent)
        for other in writers:
            if other == JSONL:
                continue
            if other == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
                print("hint: pip install tensorboardX for TensorBoard; metrics.jsonl has the metrics", file=sys.stderr)
                continue
            with self._guard(f"opening {other}"):
                self._writers[other] = WRITERS[other](opening)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        self.close(failed=kind is not None)

    def close(self, failed: bool = False):
        """Writes pending lines; may be called more than once. `failed`: whether the run ends before its last step."""
        with self._guard(f"writing {FILE}"):
            if self._pending:
                self._append()
        if self._file is not None:
            with self._guard("closing the metrics"):
                self._file.close()
        for other, writer in self._writers.items():
            with self._guard(f"closing {other}"):
                writer.close(failed)
        self._file, self._writers = None, {}

    def has(self, step: int, prefix: str) -> bool:
        """Whether there is a line of `step` and `prefix`, from this start or an earlier one."""
        return (step, prefix) in self._seen

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "train", shown: Collection[str] | None = None):
        """Reports scalars after `step` steps; with the prefix 'train', the console line has the rate and time left.

        A line that could not be written is written with the next one.

        Args:
          shown: those in the console line; default all, or with the prefix 'train' those of `_SHOWN`.
        """
        if not self.enabled:
            return
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        # JSON has no NaN and no infinities; every reader accepts null.
        finite = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self._pending.append(f"{json.dumps({'step': int(step), **finite})}\n".encode())
        self._seen.add((int(step), prefix))
        kept = values if shown is None else {name: value for name, value in values.items() if name in shown}
        say(self._line(step, kept, prefix))
        with self._guard(f"writing {FILE}"):
            self._append()
        for other, writer in self._writers.items():
            with self._guard(f"writing {other}"):
                writer.write(int(step), named)

    def _open(self):
        self._file = self._path.open("ab", buffering=0)

    def _append(self):
        if self._file is None:
            self._open()
        before = self._file.seek(0, os.SEEK_END)
        try:
            left = memoryview(b"".join(self._pending))
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # On a full disk, part of the line may have been written: the next line must not follow half a line.
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise
        self._pending.clear()

    def _line(self, step: int, values: Mapping[str, Any], prefix: str) -> str:
        pieces = [f"step {step}/{self.total_steps}"]
        if prefix == "train":
            now, (last_step, last_time) = time.monotonic(), self._last
            if step > last_step and now > last_time:
                rate = (step - last_step) / (now - last_time)
                # Averaged, so that the time left is steady; the first interval includes compilation and does not count.
                self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
                left = max(self.total_steps - step, 0) / self._rate
                if self._compiling:
                    self._rate, self._compiling = None, False
                self._last = (step, now)
                pieces += [f"{rate:.3g} steps/s", f"{duration(left)} left"]
        else:
            pieces.append(prefix)
        pieces += [f"{name} {float(values[name]):.4g}" for name in _SHOWN if name in values]
        if prefix != "train":
            pieces += [f"{name} {float(value):.4g}" for name, value in values.items() if name not in _SHOWN]
        return "  ".join(pieces)


def duration(seconds: float) -> str:
    """Seconds as 42s, 5m10s, 3h05m or 2d07h."""
    seconds = round(seconds)
    for unit, lesser, size, lesser_size in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // lesser_size:02d}{lesser}"
    return f"{seconds}s"


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a workdir, in order; None is a value that was not finite.

    An incomplete last line is left out: the run was killed, or is just writing it. ValueError names any other bad line.
    """
    path = as_path(path)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the metrics of a run there")
    return [line for line, _ in _lines(path)]


def _lines(path: pathlib.Path, damaged: list[int] | None = None) -> list[tuple[dict[str, Any], bytes]]:
    """Parsed and raw lines of `path`, without an incomplete last one.

    Raises: ValueError at the first bad line; with a list `damaged`, the numbers of bad lines go there instead.
    """
    raw = path.read_bytes().splitlines(keepends=True)
    if raw and not raw[-1].endswith(b"\n"):
        raw.pop()
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = parse_json(text, FILE)
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                raise ValueError
        except ValueError:
            if damaged is None:
                raise ValueError(f"{path}, line {number} is not a line of metrics with a step") from None
            damaged.append(number)
            continue
        lines.append((line, text))
    return lines


def _cut(path: pathlib.Path, start_step: int) -> set[tuple[int, str]]:
    """Keeps only the lines up to `start_step` in `path`; returns the steps and prefixes of their metrics."""
    damaged: list[int] = []
    lines = [(line, text) for line, text in _lines(path, damaged) if line["step"] <= start_step]
    kept = b"".join(text for _, text in lines)
    if damaged:
        aside = path.with_name(f"{path.stem}-damaged-{secrets.token_hex(4)}{path.suffix}")
        path.rename(aside)
        say(f"note: {path}, line {damaged[0]} is not a line of metrics; the file is kept as {aside.name}")
    if damaged or kept != path.read_bytes():
        write_file(path, kept)
    return {(line["step"], name.partition("/")[0]) for line, _ in lines for name in line if "/" in name}
