"""The flow of steps: how many are dispatched ahead, where a batch comes from, and what stops the run.

A step's metrics are read a little after it was dispatched, so that the devices never wait for the host. All processes
read the same metrics of the same steps, and so stop at the same step.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from janus_jax.io.messages import one_line
from train.config import TASKS, TrainConfig
from train.run.checkpoints import DAMAGED
from train.run.distributed import say
from train.run.faults import STOPPED, STORAGE, Stopped

_AHEAD = 2  # steps dispatched before the current one is done

# Called with a finished step (counted from 0), its metrics, and the report of its batch.
Finished = Callable[[int, dict[str, float], dict[str, Any]], None]


def next_batch(batches: Iterator[tuple[int, Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """Arrays and report of the next batch; Stopped if this machine cannot read it."""
    try:
        return next(batches)[1:]
    except OSError as error:
        cause = one_line(error, 300)
        raise Stopped(
            f"the data could not be read, though they do not seem damaged: {cause}; when the machine can read them "
            "again, run the same command to resume from the last checkpoint",
            STORAGE,
            alone=True,
        ) from error
    except RuntimeError as error:  # grain's, when a worker process has died
        raise Stopped(
            f"a process that reads data has died ({str(error).splitlines()[0]}); if it ran out of memory, lower "
            "data.workers; run the same command to resume from the last checkpoint",
            STOPPED,
            alone=True,
        ) from None


class InFlight:
    """Steps dispatched to the devices; each of `finished` is called for every finished step, in order."""

    def __init__(self, *finished: Finished):
        self._finished = finished
        self._pending: collections.deque[tuple[int, dict[str, jax.Array], dict[str, Any]]] = collections.deque()

    def add(self, step: int, metrics: dict[str, jax.Array], report: dict[str, Any]):
        """Adds one step, and waits for an earlier one so that the queue stays short."""
        self._pending.append((step, metrics, report))
        while len(self._pending) > _AHEAD:
            self._collect()

    def drain(self):
        """Waits for all steps."""
        while self._pending:
            self._collect()

    def _collect(self):
        step, metrics, report = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for finished in self._finished:
            finished(step, values, report)


class NotFinite(Exception):
    """Too many updates in a row were skipped."""


class Health:
    """Ends the run if too many samples are damaged, or too many updates in a row are not finite.

    Attributes:
      damaged: samples that could not be read since the start.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self.damaged = self._samples = self._skipped = 0

    def __call__(self, step: int, values: dict[str, float], report: dict[str, Any]):
        """Raises Stopped for damaged samples, NotFinite for updates."""
        self._check_damaged(values["damaged"], report["samples"])
        self._check_finite(step, values)

    def _check_damaged(self, damaged: float, samples: int):
        # The step itself counts over all rows.
        self.damaged += int(damaged)
        self._samples += samples
        share = self._config.data.max_bad_share
        if self.damaged > max(share * self._samples, 1 if share else 0):
            raise Stopped(
                f"{self.damaged} of {self._samples} samples were damaged, more than data.max_bad_share={share}; "
                f"see {self._config.workdir}/{DAMAGED}",
                STOPPED,
            )

    def _check_finite(self, step: int, values: dict[str, float]):
        if values["finite"]:
            self._skipped = 0
            return
        self._skipped += 1
        kinds = [kind for kind in TASKS if not np.isfinite(values.get(f"loss_{kind}", 0))]
        what = ", ".join(kinds) or "a gradient"
        if self._config.compute_dtype == "float16":
            what += " in float16"
        say(f"step {step + 1}: {what} is not finite; the update is skipped")
        if self._skipped >= self._config.max_skipped:
            cure = "; train in float32 or bfloat16, in another folder" if what.endswith("float16") else ""
            raise NotFinite(
                f"{what} was not finite in {self._skipped} steps in a row (max_skipped), up to {step + 1}{cure}"
            )
