"""Callbacks around the steps of a run: each has one job, and the loop calls them in order."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from janus_jax.processing.chat import Processor
from train.config import TrainConfig
from train.run.checkpoints import Workdir
from train.run.failures import Failures
from train.run.faults import AGAIN, Stopped, Watchdog
from train.run.flow import Health, InFlight
from train.run.metrics import Metrics
from train.run.window import Window
from train.step.state import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """What callbacks use throughout the run."""

    config: TrainConfig
    mesh: Mesh
    processor: Processor
    workdir: Workdir
    metrics: Metrics
    failures: Failures
    watchdog: Watchdog


@dataclasses.dataclass(frozen=True)
class Moment:
    """The run after `done` steps.

    Attributes:
      last: whether these are all its steps.
      told: whether a preemption notice asks it to end here, before its last step.
    """

    done: int
    state: TrainState
    frozen: Params
    last: bool
    told: bool = False


class Callback:
    """One job around the steps. All processes of a run call the same hooks at the same steps."""

    def resume(self, moment: Moment):
        """Called when a run resumes at `moment`; the earlier start may have died before its callbacks were called."""

    def before(self, step: int):
        """Called before `step`, counted from 0."""

    def after(self, moment: Moment):
        """Called after a step was dispatched to the devices; `moment.state` is its result."""

    def close(self):
        """Called after the last step."""


class Profile(Callback):
    """Traces the config's `profile_steps` in process 0."""

    def __init__(self, run: Run):
        self._run, self._running = run, False
        first, count = run.config.profile_start, run.config.profile_steps
        self._steps = range(first, first + (count if jax.process_index() == 0 else 0))

    def before(self, step: int):
        with self._run.failures.alone("the profile"):
            if step not in self._steps:
                self._stop()
            elif not self._running:
                jax.profiler.start_trace(str(self._run.workdir.local / "profile"))
                self._running = True

    def close(self):
        with self._run.failures.alone("the profile"):
            self._stop()

    def _stop(self):
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class Report(Callback):
    """Writes a line of metrics every `log_every` steps, and at the end."""

    def __init__(self, run: Run, flow: InFlight, window: Window, health: Health):
        self._run, self._flow, self._window, self._health = run, flow, window, health

    def after(self, moment: Moment):
        run = self._run
        if moment.done % run.config.log_every and not moment.last and not moment.told:
            return
        self._window.start()
        self._flow.drain()
        self._window.stop()
        values = self._window.summary() | {"bad_samples": self._health.damaged, "failures": run.failures.count}
        run.workdir.check()
        with run.failures.alone("the metrics"):
            run.metrics.write(moment.done, values)


class Save(Callback):
    """Saves in the background every `save_every` steps and at the end, and ends the run after a preemption notice."""

    def __init__(self, run: Run):
        self._run = run

    def after(self, moment: Moment):
        run, done = self._run, moment.done
        run.watchdog.doing(f"saving after step {done}")
        if moment.told or moment.last or done % run.config.save_every == 0:
            run.workdir.save(done, moment.state)
        if moment.told:
            run.workdir.wait()
            raise Stopped(f"preempted; saved after step {done}; run the same command to resume", AGAIN)
