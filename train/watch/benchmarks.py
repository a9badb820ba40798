"""Benchmarks during training: every so many steps the tasks of `evals` are asked, as the model is then.

A folder of the workdir for each of these steps, `evals/0000500`, has what `python -m evals.main` writes: replies as
they come, results.json and report.md; `--rescore` reads it. The figures are metrics as well: `evals/pope/f1_random`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from evals.asking.answers import Replies, Respondent
from evals.asking.identity import prompts_identity
from evals.evaluate import Settings, chosen, evaluate
from evals.generation.task import DrawnTask
from evals.items import Item, Loaded, Task
from evals.reports.results import result, write_results
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.stores import local_only
from janus_jax.io.whole.files import write_file
from janus_jax.sampling.finite import on_host
from train.config import EvalsConfig, TrainConfig
from train.run.aside import Look
from train.run.callbacks import Moment, Run
from train.run.distributed import say, together
from train.run.figures import HIGH, LOW
from train.step.pipeline import pipeline_of
from train.step.state import Params

MODEL = "model.json"  # as `evals.main` calls it
PREFIX = "evals"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A benchmark that a run asks: `loaded` are its items by `protocol`."""

    task: Task
    protocol: str
    loaded: Loaded


def load_tasks(config: EvalsConfig) -> list[Asked]:
    """The benchmarks of `config`; [] if it asks none.

    Raises: ValueError or OSError in one line for an unknown task or protocol, a task that is drawn or that only a judge
      can score, and data that are missing or damaged.
    """
    if not config.every:
        return []
    try:
        tasks, data = chosen(",".join(config.tasks), config.protocol or None), local_only(config.data)
        for task, _ in tasks:
            if isinstance(task, DrawnTask):
                raise ValueError(f"{task.name} is drawn, and others look at it: score an export with evals.main")
            if task.needs_judge:
                raise ValueError(f"{task.name} is scored by a judge alone, which a run does not ask; leave it out")
        return [Asked(task, protocol, task.load(data, protocol)) for task, protocol in tasks]
    except ValueError as error:
        raise ValueError(f"{PREFIX}: {error}") from None


def fingerprints(asked: Sequence[Asked]) -> dict[str, str]:
    """A hash of what each benchmark asks, by name: processes that ask together must have the same."""
    return {f"{PREFIX} {each.task.name}": prompts_identity(each.loaded) for each in asked}


class Benchmarks(Look):
    """Asks benchmarks on all devices of the run, with the parameters where they are; figures go into the metrics."""

    name = "benchmarks"

    def __init__(self, run: Run, asked: Sequence[Asked]):
        super().__init__(run)
        self.every, self._asked = run.config.evals.every if asked else 0, asked

    def made(self, done: int) -> bool:
        return self.run.metrics.has(done, PREFIX)

    def look(self, moment: Moment):
        run, evals = self.run, self.run.config.evals
        out = run.workdir.local / PREFIX / f"{moment.done:07d}"
        identity = _identity(run.config, moment)
        with together(Exception):
            if jax.process_index() == 0:
                _settle(out, identity)
        janus = pipeline_of(run.config, run.processor, run.mesh, moment.state, moment.frozen)
        respondent = Respondent(janus, evals.batch_size or None)
        settings = Settings(out, evals.limit or None, progress=False)
        values: dict[str, float] = {}
        shown = []
        for each in self._asked:
            name, began = each.task.name, time.monotonic()
            ask = functools.partial(self._ask, respondent, name, moment.done)
            found = evaluate(each.task, each.protocol, each.loaded, settings, identity, ask)
            told = result(found, settings.unreadable_wrong)
            with together(Exception):
                if jax.process_index() == 0:
                    write_results(out, identity, {name: {each.protocol: told}})
            if found.problems:
                first = found.problems[0]
                say(
                    f"note: {name}: {len(found.problems):,} items could not be asked and are left out; the first is "
                    f"{one_line(first.id)}: {one_line(first.reason, 500)}"
                )
            values |= {f"{name}/{plain(figure)}": number.value for figure, number in found.scores.numbers.items()}
            headline = f"{name}/{plain(found.scores.headline)}"
            number = found.scores.numbers.get(found.scores.headline)
            if number is not None and number.low is not None:
                values |= {f"{headline}{LOW}": number.low, f"{headline}{HIGH}": number.high}
            values |= {f"{name}/items": told["answered"], f"{name}/seconds": time.monotonic() - began}
            shown.append(headline)
        with run.failures.alone("the metrics"):
            run.metrics.write(moment.done, values, PREFIX, shown)

    def _ask(self, respondent: Respondent, name: str, done: int, items: Sequence[Item]) -> Iterator[Replies]:
        """Replies, each batch of which is progress: a benchmark may take longer than the watchdog waits."""
        left = len(items)
        for replies in respondent.ask(items):
            left -= len(replies.texts) + len(replies.problems)
            self.run.watchdog.doing(f"asking {name} after step {done}: {left:,} items left")
            yield replies


def plain(figure: str) -> str:
    """The name of a figure as trackers take it.

    >>> plain("accuracy+ (both questions of a picture)")
    'accuracy_both_questions_of_a_picture'
    """
    return re.sub(r"[^a-z0-9]+", "_", figure.lower()).strip("_")


def _identity(config: TrainConfig, moment: Moment) -> dict[str, Any]:
    """What tells the model of this moment from others."""
    own = int(on_host(_bits(moment.state.trained)))
    return {
        "model": f"{config.name}, step {moment.done}",
        "parameters": f"{own:08x}",
        "dtype": config.compute_dtype,
    }


@jax.jit
def _bits(tree: Params) -> jax.Array:
    """A checksum of float32 leaves, the same however they are split over devices."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        total = total * jnp.uint32(31) + jnp.sum(bits * (bits | 1), dtype=jnp.uint32)
    return total


def _settle(out: pathlib.Path, identity: dict[str, Any]):
    """Makes the folder of a step, without what an earlier start has left of other parameters.

    A run that resumes from before this step comes to it again, perhaps with other roundings.
    """
    there = read_json_object(out / MODEL, missing_ok=True)
    if out.exists() and there != identity:
        shutil.rmtree(out)
    if there != identity:
        out.mkdir(parents=True)
        write_file(out / MODEL, (json.dumps(identity, indent=1) + "\n").encode())
