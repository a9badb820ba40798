"""What the steps of a run are made of: its inputs, its batches, and what a step does with one."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from janus_jax.processing.chat import Processor
from train.config import TrainConfig
from train.data.batches import Assembler, load_batches
from train.data.mixture import Mixture
from train.data.prepared import Prepared
from train.step.state import Params, TrainState, batch_sharding, local_rows, put_rows
from train.step.step import make_train_step

Batches = Iterator[tuple[int, Any, dict[str, Any]]]


class Work(abc.ABC):
    """The work of a run; every process of it makes one, and calls the same methods in the same order.

    Attributes:
      folders: prepared folders that it reads.
      curves: metrics that the run's figure shows, instead of the losses of packed rows.
      rows: the rows of a batch that this process's devices hold.

    Raises: FileNotFoundError or ValueError, in one line, for inputs that cannot be trained on.
    """

    folders: Sequence[Prepared] = ()
    curves: Sequence[str] = ()

    def __init__(self, config: TrainConfig, mesh: Mesh, processor: Processor):
        self.config, self.mesh, self.processor = config, mesh, processor
        self.rows = local_rows(batch_sharding(mesh), config.batch_size)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of everything that it reads, by path: a run that resumes must find the same."""
        return {str(folder.folder): folder.fingerprint for folder in self.folders}

    @abc.abstractmethod
    def about(self, first: int) -> str:
        """What a step takes, for people; `first` is the next step."""

    def first_kept(self, state: TrainState, frozen: Params) -> Params:
        """What is kept of the first state beside the frozen parameters for the whole run."""
        return {}

    def kept_shapes(self, state: TrainState) -> Params:
        """The shapes, with shardings, of `first_kept` for a state of such shapes."""
        return {}

    @abc.abstractmethod
    def begin(self, kept: Params) -> None:
        """Prepares the steps: compiles nothing yet, and may start processes; under the mesh."""

    @abc.abstractmethod
    def batches(self, first: int) -> Batches:
        """(step, batch, report) of every step from `first` on; for the report see `Assembler`."""

    @abc.abstractmethod
    def step(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state after a step, which is donated, and its metrics; under the mesh."""

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows on its devices."""
        return put_rows(batch, self.rows, self.mesh, self.config.batch_size)

    def close(self) -> None:  # noqa: B027
        """Ends what `begin` started; may be called more than once."""


class Supervised(Work):
    """Packed rows of prepared samples, and cross entropy."""

    def __init__(self, config: TrainConfig, mesh: Mesh, processor: Processor):
        super().__init__(config, mesh, processor)
        self.mixture = Mixture(config.data, config.batch_size, config.seed)
        self.folders = self.mixture.folders
        self._assembler = assembler_of(processor, self.mixture)

    def about(self, first: int) -> str:
        c, mixture = self.config, self.mixture
        samples = {kind: mixture.groups(first) * share for kind, share in mixture.ratio.items()}
        return f"{c.batch_size} rows of {c.data.context}, samples {samples}"

    def begin(self, kept: Params) -> None:
        self._step = make_train_step(self.config, self.mesh, self.processor.settings)

    def batches(self, first: int) -> Batches:
        return load_batches(self._assembler, self.rows, first, self.config.steps, self.config.data.workers)

    def step(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        return self._step(state, frozen, self.put(batch))


def assembler_of(processor: Processor, mixture: Mixture) -> Assembler:
    """What makes the rows that `mixture` plans."""
    tokenizer = processor.tokenizer
    return Assembler(mixture, processor.settings, tokenizer.pad_id, tokenizer.image_placeholder_id)
