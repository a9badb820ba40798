"""What a run reports: metrics.jsonl, TensorBoard, and a line on the console."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

FILE = "metrics.jsonl"
# What a console line shows, in this order, of what is there.
_SHOWN = ("loss", "loss_understanding", "loss_text", "loss_generation", "grad_norm", "learning_rate", "mfu")


class Metrics:
    """Writes metrics of a run; a context manager.

    Lines of an existing metrics.jsonl after `start_step` are cut off, and so is a torn last one: they belong to a
    history that is no more.

    Args:
      workdir: where metrics.jsonl and the TensorBoard folder `tensorboard` go.
      total_steps: of the whole run.
      start_step: the steps done before this process.
      enabled: False on hosts that report nothing.
    """

    def __init__(self, workdir: str | pathlib.Path, total_steps: int, start_step: int = 0, enabled: bool = True):
        self.enabled, self.total_steps = enabled, total_steps
        self._last = (start_step, time.monotonic())
        self._rate: float | None = None
        self._compiling = True
        self._file = self._board = None
        if not enabled:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE
        if path.exists():
            _cut(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        except ImportError:
            print("hint: pip install tensorboardX for TensorBoard; metrics go to metrics.jsonl alone", file=sys.stderr)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Writes out what is held back; more than once does no harm."""
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()
        self._file = self._board = None

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "train"):
        """Reports scalars after `step` steps; where the prefix is 'train' the console line tells rate and time left."""
        if not self.enabled:
            return
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        # JSON has no NaN and no infinities; null is what every reader takes.
        finite = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in named.items():
                self._board.add_scalar(name, value, int(step))
        print(self._line(step, values, prefix), flush=True)

    def _line(self, step: int, values: Mapping[str, Any], prefix: str) -> str:
        parts = [f"step {step}/{self.total_steps}"]
        if prefix == "train":
            now, (last_step, last_time) = time.monotonic(), self._last
            if step > last_step and now > last_time:
                rate = (step - last_step) / (now - last_time)
                # Averaged, so that the time left is calm; the first stretch holds the compilation and is no measure.
                self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
                left = max(self.total_steps - step, 0) / self._rate
                if self._compiling:
                    self._rate, self._compiling = None, False
                self._last = (step, now)
                parts += [f"{rate:.3g} steps/s", f"{duration(left)} left"]
        else:
            parts.append(prefix)
        parts += [f"{name} {float(values[name]):.4g}" for name in _SHOWN if name in values]
        if prefix != "train":
            parts += [f"{name} {float(value):.4g}" for name, value in values.items() if name not in _SHOWN]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as 42s, 5m10s, 3h05m or 2d07h."""
    seconds = round(seconds)
    for unit, part, size, part_size in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part_size:02d}{part}"
    return f"{seconds}s"


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a workdir, in order; None stands for what was not finite.

    A torn last line is left out: the run was cut off, or writes it just now. ValueError names any other bad line.
    """
    path = pathlib.Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected the metrics of a run there")
    return [line for line, _ in _lines(path)]


def _lines(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
    """Parsed and raw lines of `path`, without a torn last one."""
    raw = path.read_bytes().splitlines(keepends=True)
    if raw and not raw[-1].endswith(b"\n"):
        raw.pop()
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                raise ValueError
        except ValueError:  # of JSON and of UTF-8 too
            raise ValueError(f"{path}, line {number} is not a line of metrics with a step") from None
        lines.append((line, text))
    return lines


def _cut(path: pathlib.Path, start_step: int):
    kept = b"".join(text for line, text in _lines(path) if line["step"] <= start_step)
    if kept != path.read_bytes():
        # Beside it and then in its place: a run that ends just here keeps one or the other.
        beside = path.with_suffix(".tmp")
        beside.write_bytes(kept)
        beside.replace(path)
