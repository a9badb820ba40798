"""Checkpoints on a disk, written by orbax: complete as soon as they have their name."""

from __future__ import annotations

import functools
import logging
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from orbax.checkpoint import v1 as ocp

from janus_jax.weights import checkpoint
from train.step.earlier import CHECKPOINTS, FROZEN, complete_steps
from train.step.state import Params


class DiskCheckpoints:
    """The checkpoints of the run in `folder`, of which the newest `keep` are kept, and its frozen parameters.

    Saving goes on in threads; `wait` waits for it and raises its errors.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        _quiet_orbax()
        self._folder, self._context = folder, checkpoint.saving_context()
        policies = ocp.training.preservation_policies
        with self._context:
            self._checkpointer = ocp.training.Checkpointer(
                (folder / CHECKPOINTS).absolute(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
                preservation_policy=policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return complete_steps(self._folder)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save_frozen(self, frozen: Params):
        """Writes the frozen parameters."""
        with checkpoint.saving_context():
            ocp.save(self._folder.absolute() / FROZEN, frozen, overwrite=True)

    def restore_frozen(self, abstract: Params) -> Params:
        """The frozen parameters, in the layout of the `abstract` ones."""
        with self._context:
            return ocp.load(self._folder.absolute() / FROZEN, abstract)

    def save(self, step: int, trees: Mapping[str, Any]):
        """Starts to save `trees` as the checkpoint of `step`; first waits for the one before."""
        with self._context:
            self._checkpointer.save_checkpointables_async(step, trees, overwrite=True)

    def wait(self):
        """Waits until the last save is complete; raises its errors."""
        with self._context:
            self._checkpointer.wait()

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The trees of the checkpoint of `step`, in the layout of the `abstract` ones."""
        with self._context:
            return self._checkpointer.load_checkpointables(step, abstract)

    def close(self):
        """Waits for the last save, and ends the threads."""
        with self._context:
            self._checkpointer.close()


def _is_repeated(record: logging.LogRecord) -> bool:
    """Whether it is an error that orbax also raises to the caller: a traceback from each of its threads."""
    return record.levelno >= logging.ERROR and "orbax" in pathlib.PurePath(record.pathname).parts


@functools.cache
def _quiet_orbax():
    # Permanently: its threads may log after the run has ended, too.
    logging.getLogger("absl").addFilter(lambda record: not _is_repeated(record))
    warnings.filterwarnings("ignore", r"coroutine '\w+\._background_load' was never awaited", RuntimeWarning)
