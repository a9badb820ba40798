"""Metrics of the steps since the last report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from train.config import TrainConfig
from train.plan.flops import peak_flops, step_flops
from train.step.loss import combined


class Window:
    """The steps since the last report: their metrics, and the time that they took.

    Time counts only between `start` and `stop`: saving, evaluating and drawing are not included.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self._config, self._devices = config, mesh.devices.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._reset()

    def _reset(self):
        self._metrics: list[dict[str, float]] = []
        self._reports: list[dict[str, Any]] = []
        self._waited, self._elapsed, self._since = 0.0, 0.0, time.monotonic()

    def start(self):
        """Starts the clock."""
        self._since = time.monotonic()

    def stop(self):
        """Adds the time since `start`."""
        now = time.monotonic()
        self._elapsed, self._since = self._elapsed + now - self._since, now

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        since = time.monotonic()
        yield
        self._waited += time.monotonic() - since

    def add(self, _step: int, values: dict[str, float], report: dict[str, Any]):
        """Adds a finished step."""
        self._metrics.append(values)
        self._reports.append(report)

    def summary(self) -> dict[str, float]:
        """The combined metrics of all steps since the last summary, with speed and data statistics."""
        metrics, reports, config = self._metrics, self._reports, self._config
        tokens = sum(report["tokens"] for report in reports)
        values = combined(metrics) | {
            "grad_norm": metrics[-1]["grad_norm"],
            "learning_rate": metrics[-1]["learning_rate"],
            "tokens_per_second": tokens / self._elapsed,
            "seconds_per_step": self._elapsed / len(metrics),
            "data_wait": self._waited / self._elapsed,
            "fill": tokens / (len(reports) * config.batch_size * config.data.context),
            "left_out_groups": sum(report["left_out"] for report in reports),
            "skipped_updates": sum(not one["finite"] for one in metrics),
        }
        if self._peak and "tokens_generation" in metrics[0]:
            flops = sum(map(self._flops, metrics, reports))
            values["mfu"] = flops / (self._elapsed * self._devices * self._peak)
        self._reset()
        return values

    def _flops(self, values: dict[str, float], report: dict[str, Any]) -> float:
        image_targets = values["tokens_generation"]
        text_targets = values["tokens"] - image_targets
        return step_flops(
            self._config, report["tokens"], report["images"], text_targets, image_targets, report["sample_length"]
        )
