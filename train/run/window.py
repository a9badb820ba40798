"""What happened in the steps since the last report, in numbers and, where it is asked for, as a trace."""

from __future__ import annotations

import collections
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.config import TASKS, TrainConfig
from train.plan.flops import peak_flops, step_flops
from train.run.checkpoints import DAMAGED
from train.run.distributed import say
from train.run.faults import STOPPED, Stopped
from train.step.loss import means

_AHEAD = 2  # steps given to the device before the one it works on is done


class NotFinite(Exception):
    """Too many updates in a row were left out."""


class Window:
    """What happened since the last report."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self._config, self._devices = config, mesh.devices.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._pending: collections.deque[tuple[int, dict[str, jax.Array], int]] = collections.deque()
        self._bad = self._samples = self._skipped = 0
        self._reset()

    def _reset(self):
        self._outs: list[dict[str, float]] = []
        self._reports: list[dict[str, Any]] = []
        self._waited, self._elapsed, self._since = 0.0, 0.0, time.monotonic()

    def waiting(self) -> _Timer:
        """A context whose time counts as waiting for data."""
        return _Timer(self)

    def pause(self):
        """What was done since the last `add` (saving, evaluating, drawing) is no part of the steps' time."""
        self._since = time.monotonic()

    def add(self, step: int, out: dict[str, jax.Array], report: dict[str, Any]):
        """Takes in one step, and waits for an earlier one lest the device be given ever more of them."""
        self._pending.append((step, out, report["samples"]))
        self._reports.append(report)
        while len(self._pending) > _AHEAD:
            self._collect()
        now = time.monotonic()
        self._elapsed, self._since = self._elapsed + now - self._since, now

    def _collect(self):
        step, out, samples = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(out).items()}
        self._outs.append(values)
        self._check_damaged(values["damaged"], samples)
        self._check_finite(step, values)

    def _check_damaged(self, damaged: float, samples: int):
        # Counted over all rows by the step itself, so that all processes stop at the same one.
        self._bad += int(damaged)
        self._samples += samples
        share = self._config.data.max_bad_share
        if self._bad > max(share * self._samples, 1 if share else 0):
            raise Stopped(
                f"{self._bad} of {self._samples} samples were damaged, more than data.max_bad_share={share}; "
                f"{self._config.workdir}/{DAMAGED} names them",
                STOPPED,
            )

    def _check_finite(self, step: int, values: dict[str, float]):
        if values["finite"]:
            self._skipped = 0
            return
        self._skipped += 1
        kinds = [kind for kind in TASKS if not np.isfinite(values[f"loss_{kind}"])]
        what = ", ".join(kinds) or "a gradient"
        say(f"step {step + 1}: {what} is not finite; the update is left out")
        if self._skipped >= self._config.max_skipped:
            raise NotFinite(f"{what} was not finite in {self._skipped} steps in a row (max_skipped), up to {step + 1}")

    def summary(self) -> dict[str, float]:
        """Means since the last summary; waits for all steps taken in."""
        start = time.monotonic()
        while self._pending:
            self._collect()
        elapsed = self._elapsed + time.monotonic() - start
        outs, reports, config = self._outs, self._reports, self._config
        sums = {name: sum(out[name] for out in outs if out["finite"]) for name in outs[0]}
        tokens = sum(report["tokens"] for report in reports)
        values = means(sums)
        values |= {
            "grad_norm": outs[-1]["grad_norm"],
            "learning_rate": outs[-1]["learning_rate"],
            "tokens_per_second": tokens / elapsed,
            "seconds_per_step": elapsed / len(outs),
            "data_wait": self._waited / elapsed,
            "fill": tokens / (len(reports) * config.batch_size * config.data.context),
            "left_out_groups": sum(report["left_out"] for report in reports),
            "bad_samples": self._bad,
            "skipped_updates": sum(not out["finite"] for out in outs),
        }
        if self._peak:
            flops = sum(map(self._flops, outs, reports))
            values["mfu"] = flops / (elapsed * self._devices * self._peak)
        self._reset()
        return values

    def _flops(self, out: dict[str, float], report: dict[str, Any]) -> float:
        image_targets = out["tokens_generation"]
        text_targets = out["tokens"] - image_targets
        return step_flops(
            self._config, report["tokens"], report["images"], text_targets, image_targets, report["sample_length"]
        )


class _Timer:
    def __init__(self, window: Window):
        self._window = window

    def __enter__(self):
        self._start = time.monotonic()

    def __exit__(self, *_):
        self._window._waited += time.monotonic() - self._start


class Profile:
    """The trace of the steps that the config names, or of as many of them as this process does."""

    def __init__(self, config: TrainConfig, folder: pathlib.Path, is_main: bool):
        self._folder, self._running = folder, False
        steps = config.profile_steps if is_main else 0
        self._steps = range(config.profile_start, config.profile_start + steps)

    def at(self, step: int):
        """Starts or stops the trace where `step` is about to begin."""
        if step not in self._steps:
            self.stop()
        elif not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def stop(self):
        """Writes the trace, if there is one."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
