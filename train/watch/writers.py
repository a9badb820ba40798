"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio; classes with `write` and `close`.

A tracker's run has an id, kept in the workdir, so that a resumed run goes on in the same one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from janus_jax.io.files import read_json_object
from janus_jax.io.whole.files import write_file

JSONL = "jsonl"
IDS = "trackers.json"
PROJECT = "janus_jax"


class Opening(NamedTuple):
    """What a writer is opened with.

    Attributes:
      workdir: a local folder, the workdir itself or copied to it.
      name, config: the run's name and settings.
      start_step: the steps done before this start.
      shared: the workdir, which may be in a store.
    """

    workdir: pathlib.Path
    name: str
    config: Mapping[str, Any]
    start_step: int
    shared: pathlib.Path


class TensorBoard:
    """Event files in the folder `tensorboard` of the workdir; points after the start's step are purged."""

    PACKAGE, EXTRA = "tensorboardX", "train"

    def __init__(self, run: Opening):
        purge = run.start_step + 1 if run.start_step else None
        self._board = importlib.import_module(self.PACKAGE).SummaryWriter(
            str(run.workdir / "tensorboard"), purge_step=purge
        )

    def write(self, step: int, values: Mapping[str, float]):
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self, failed: bool):
        self._board.close()


class Wandb:
    """A run of Weights & Biases, in the project of its own settings (WANDB_PROJECT), else in PROJECT."""

    PACKAGE, EXTRA = "wandb", "wandb"

    def __init__(self, run: Opening):
        wandb, identity = importlib.import_module(self.PACKAGE), _identity(run, self.PACKAGE)
        self._run = wandb.init(
            project=_project("WANDB_PROJECT"), name=run.name, id=identity, resume="allow", dir=str(run.workdir),
            config=dict(run.config),
        )  # fmt: skip
        # An axis of our own: a resumed run repeats steps, and W&B's own step only grows.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]):
        self._run.log({**values, "step": step})

    def close(self, failed: bool):
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in the project of TRACKIO_PROJECT, else in PROJECT; a run is resumed by its name."""

    PACKAGE, EXTRA = "trackio", "trackio"

    def __init__(self, run: Opening):
        trackio, identity = importlib.import_module(self.PACKAGE), _identity(run, self.PACKAGE)
        self._run = trackio.init(
            project=_project("TRACKIO_PROJECT"), name=f"{run.name}-{identity}", resume="allow", config=dict(run.config)
        )

    def write(self, step: int, values: Mapping[str, float]):
        self._run.log(dict(values), step=step)

    def close(self, failed: bool):
        self._run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def missing(names: Sequence[str]) -> list[str]:
    """A line for each tracker among the writers `names` whose package is not installed."""
    trackers = [(name, WRITERS[name]) for name in names if name in (Wandb.PACKAGE, Trackio.PACKAGE)]
    return [
        f"writers: {name} needs the package {cls.PACKAGE}, which is not installed; pip install "
        f"'janus_jax[{cls.EXTRA}]', or take {name} out of writers"
        for name, cls in trackers
        if not _is_there(cls.PACKAGE)
    ]


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, which is there
        return True


def _project(variable: str) -> str:
    return os.environ.get(variable) or PROJECT


def _identity(run: Opening, tracker: str) -> str:
    """The id of the run in `tracker`, made at its first start and kept in the workdir."""
    path = run.shared / IDS
    known = read_json_object(path, missing_ok=True)
    if not isinstance(known.get(tracker), str):
        known |= {tracker: secrets.token_hex(8)}
        # Before the tracker knows it, and whole: a kill never leads to a second run there.
        write_file(path, json.dumps(known, indent=2).encode())
    return known[tracker]
