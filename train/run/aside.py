"""What a run does beside its steps, after some of them: evaluations, pictures, exports."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import ImageSettings, contact_sheet
from train.config import KINDS, DataConfig, TrainConfig
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.run.checkpoints import Workdir
from train.run.distributed import from_first, say, together
from train.run.failures import Failures, Tries
from train.run.metrics import Metrics
from train.step.loss import means
from train.step.state import Params, TrainState, make_model, put_rows
from train.step.step import make_eval_step

_TRIES = 2  # how often an evaluation and its pictures may take the process with them before they are left out


class Aside:
    """What is due after a step; a failure of it is reported and counted, and never ends the run.

    All processes call it for the same steps. It comes after the step's checkpoint, and whatever a run that died had
    not come to is made up for by `catch_up`.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        processor: Processor,
        held_out: Assembler | None,
        rows: Sequence[int],
        workdir: Workdir,
        metrics: Metrics,
        failures: Failures,
    ):
        self._config, self._mesh, self._processor = config, mesh, processor
        self._workdir, self._metrics, self._failures = workdir, metrics, failures
        self._tries = Tries(workdir.folder)
        self._evaluator = Evaluator(config, mesh, held_out, rows, processor.settings) if held_out else None

    def due(self, done: int) -> set[str]:
        """Of 'evaluation', 'picture' and 'export', what the config asks for after `done` steps."""
        c, last = self._config, done == self._config.steps
        every = {"evaluation": c.evaluation.every if self._evaluator else 0, "picture": c.samples.every}
        found = {name for name, steps in every.items() if steps and (last or done % steps == 0)}
        # At the end the run exports anyway.
        return found | ({"export"} if c.export_every and done % c.export_every == 0 and not last else set())

    def catch_up(self, done: int, state: TrainState, frozen: Params):
        """Does after the `done` steps of an earlier start what it died before."""
        there = {
            "evaluation": self._metrics.has(done, "eval"),
            "picture": self._picture(done).exists(),
            "export": False,  # it looks for itself
        }
        there = from_first(there)
        self._do(done, {name for name in self.due(done) if not there[name]}, state, frozen)

    def after(self, done: int, state: TrainState, frozen: Params):
        """Does what is due after `done` steps."""
        self._do(done, self.due(done), state, frozen)

    def _do(self, done: int, due: set[str], state: TrainState, frozen: Params):
        if due:
            self._workdir.check()
        if due - {"export"}:
            self._look(done, due, state, frozen)
        # Last, and not to be failed: it is what the run was asked for.
        if "export" in due:
            self._workdir.export(done, state.trained, frozen)

    def _look(self, done: int, due: set[str], state: TrainState, frozen: Params):
        begun = from_first(self._tries.begin(done) if jax.process_index() == 0 else 0)
        if begun >= _TRIES:
            told = RuntimeError(f"{begun} starts of this run ended in it")
            self._failures.report(f"{' and '.join(sorted(due - {'export'}))} after step {done}", told)
        else:
            if "evaluation" in due:
                with self._failures.alike(f"the evaluation after step {done}"):
                    values = self._evaluator(state, frozen)
                    with self._failures.alone("the metrics"):
                        self._metrics.write(done, values, prefix="eval")
            if "picture" in due:
                with self._failures.alike(f"the picture after step {done}"):
                    draw_samples(self._config, self._processor, self._mesh, state, frozen, self._picture(done))
        if jax.process_index() == 0:
            self._tries.end()

    def _picture(self, done: int) -> pathlib.Path:
        return self._workdir.folder / "samples" / f"{done:07d}.png"


# ---------------------------------------------------------------- evaluations


def get_held_out(config: TrainConfig, assembler: Assembler) -> Assembler | None:
    """Assembles batches of the evaluation's folders: all kinds alike, and nothing dropped or cut."""
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
    mixture = Mixture(data, config.batch_size, seed=0)
    return dataclasses.replace(assembler, mixture=mixture)


class Evaluator:
    """Mean losses over the evaluation's batches, which are made once."""

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
        outs = jax.device_get(outs)
        return means({name: sum(float(out[name]) for out in outs) for name in outs[0]})

    def _read(self):
        if self._batches:
            return
        made = [self._assembler(number, self._rows) for number in range(self._count)]
        for problem in (problem for _, report in made for problem in report["problems"]):
            say(f"evaluation: left out {problem}")
        self._batches = [batch for batch, _ in made]


# ---------------------------------------------------------------- pictures


def draw_samples(
    config: TrainConfig, processor: Processor, mesh: Mesh, state: TrainState, frozen: Params, path: pathlib.Path
):
    """Draws the config's sample prompts as they stand after this step and writes them as one picture."""
    s = config.samples
    model = make_model(config)
    params = _cast({**state.trained, **frozen}, model.dtype)
    pipeline = JanusPipeline(config.model, params, model, processor, mesh)
    images = pipeline.generate_images(s.prompts, s.images, s.guidance, s.temperature, progress=False)
    with together(Exception):
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Beside it and then in its place: what is there is whole.
            beside = path.with_suffix(".tmp")
            contact_sheet(images, columns=s.images, gap=2).save(beside, format="PNG")
            beside.replace(path)


@functools.partial(jax.jit, static_argnums=1)
def _cast(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
