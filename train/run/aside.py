"""Callbacks that work with the model between steps: evaluations, sample grids and exports.

They run once the step's checkpoint is complete, so that a crash here loses no step; the next start catches up on what a
crashed one had not finished.
"""

from __future__ import annotations

import abc
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from janus_jax.io.whole.files import write_file
from janus_jax.processes import from_first
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import ImageSettings, contact_sheet
from train.config import KINDS, DataConfig, TrainConfig
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.data.work import assembler_of
from train.run.callbacks import Callback, Moment, Run
from train.run.distributed import say, together
from train.run.failures import Tries
from train.step.loss import combined
from train.step.pipeline import pipeline_of
from train.step.state import Params, TrainState, put_rows
from train.step.step import make_eval_step

_TRIES = 2  # how often an evaluation or a sample grid may kill the process before it is skipped


class Aside(Callback, abc.ABC):
    """Work that is due after some steps.

    Attributes:
      name: what it produces, for messages.
    """

    name: str

    def __init__(self, run: Run):
        self.run = run

    @abc.abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether the config asks for it after this step."""

    def made(self, done: int) -> bool:
        """Whether an earlier start finished it after `done` steps; only process 0's answer counts."""
        return False

    @abc.abstractmethod
    def make(self, moment: Moment):
        """Does the work."""

    def resume(self, moment: Moment):
        if self.due(moment) and not from_first(self.made(moment.done)):
            self._begin(moment)

    def after(self, moment: Moment):
        if self.due(moment):
            self._begin(moment)

    def _begin(self, moment: Moment):
        self.run.workdir.wait()
        self.run.workdir.check()
        self.run.watchdog.doing(f"making the {self.name} after step {moment.done}")
        self.make(moment)


class Look(Aside):
    """An optional look at the model: its failures are reported and counted, and never end the run."""

    every: int

    def __init__(self, run: Run):
        super().__init__(run)
        self._tries = Tries(run.workdir.folder)

    def due(self, moment: Moment) -> bool:
        return bool(self.every) and (moment.last or moment.done % self.every == 0)

    def make(self, moment: Moment):
        is_main, what = jax.process_index() == 0, f"the {self.name} after step {moment.done}"
        begun = from_first(self._tries.begin(moment.done, self.name) if is_main else 0)
        if begun >= _TRIES:
            self.run.failures.report(what, RuntimeError(f"{begun} starts of this run ended while making it"))
        else:
            with self.run.failures.alike(what):
                self.look(moment)
        if is_main:
            self._tries.end(moment.done, self.name)

    @abc.abstractmethod
    def look(self, moment: Moment):
        """Does the work; what it raises is reported and counted."""


class Evaluate(Look):
    """Losses on held-out data, into the metrics."""

    name = "evaluation"

    def __init__(self, run: Run, held_out: Assembler | None, rows: Sequence[int]):
        super().__init__(run)
        self.every = run.config.evaluation.every if held_out else 0
        if held_out:
            self._evaluator = Evaluator(run.config, run.mesh, held_out, rows, run.processor.settings)

    def made(self, done: int) -> bool:
        return self.run.metrics.has(done, "eval")

    def look(self, moment: Moment):
        values = self._evaluator(moment.state, moment.frozen)
        with self.run.failures.alone("the metrics"):
            self.run.metrics.write(moment.done, values, prefix="eval")


class Draw(Look):
    """Images of the config's sample prompts, as the model draws them after this step."""

    name = "sample grid"

    def __init__(self, run: Run):
        super().__init__(run)
        self.every = run.config.samples.every

    def made(self, done: int) -> bool:
        return self._path(done).exists()

    def look(self, moment: Moment):
        run = self.run
        draw_samples(run.config, run.processor, run.mesh, moment.state, moment.frozen, self._path(moment.done))

    def _path(self, done: int) -> pathlib.Path:
        return self.run.workdir.folder / "samples" / f"{done:07d}.png"


class Export(Aside):
    """A checkpoint folder in bfloat16; its failures end the run, since exports are what the run is for."""

    name = "export"

    def due(self, moment: Moment) -> bool:
        every = self.run.config.export_every
        # The run exports at its end anyway.
        return bool(every) and moment.done % every == 0 and not moment.last

    def make(self, moment: Moment):
        # `export` checks by itself whether there is one.
        self.run.workdir.export(moment.done, moment.state.trained, moment.frozen)


# ---------------------------------------------------------------- evaluations


def get_held_out(config: TrainConfig, processor: Processor) -> Assembler | None:
    """An assembler for the evaluation's folders: all kinds in equal shares, with nothing dropped or cut."""
    folders = {kind: getattr(config.evaluation, kind) for kind in KINDS}
    if not any(folders.values()) or not config.evaluation.every:
        return None
    data = DataConfig(
        **folders,
        ratio=tuple(int(bool(folders[kind])) for kind in KINDS),
        context=config.data.context,
        images_per_row=config.data.images_per_row,
        guidance_dropout=0.0,
        text_loss=config.data.text_loss,
    )
    return assembler_of(processor, Mixture(data, config.batch_size, seed=0))


class Evaluator:
    """Mean losses over the evaluation's batches, which are made only once."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, assembler: Assembler, rows: Sequence[int], settings: ImageSettings
    ):
        self._mesh, self._rows, self._size = mesh, rows, config.batch_size
        self._assembler, self._count = assembler, config.evaluation.batches
        self._step = make_eval_step(config, mesh, settings)
        self._batches: list[dict[str, Any]] = []

    def __call__(self, state: TrainState, frozen: Params) -> dict[str, float]:
        with together(Exception):
            self._read()
        outs = [
            self._step(state.trained, frozen, put_rows(b, self._rows, self._mesh, self._size)) for b in self._batches
        ]
        return combined([{name: float(value) for name, value in out.items()} for out in jax.device_get(outs)])

    def _read(self):
        if self._batches:
            return
        made = [self._assembler(number, self._rows) for number in range(self._count)]
        for problem in (problem for _, report in made for problem in report["problems"]):
            say(f"evaluation: left out {problem}")
        self._batches = [batch for batch, _ in made]


# ---------------------------------------------------------------- sample grids


def draw_samples(
    config: TrainConfig, processor: Processor, mesh: Mesh, state: TrainState, frozen: Params, path: pathlib.Path
):
    """Draws the config's sample prompts with the parameters of `state` and writes them as one sample grid."""
    s = config.samples
    pipeline = pipeline_of(config, processor, mesh, state, frozen)
    images = pipeline.generate_images(s.prompts, s.images, s.guidance, s.temperature, progress=False)
    with together(Exception):
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            contact_sheet(images, columns=s.images, gap=2).save(file, format="PNG")
            write_file(path, file.getvalue())
