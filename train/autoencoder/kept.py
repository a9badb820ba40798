"""The state of a VQ training between starts, on a disk or in a store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import secrets
import shutil
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.stores import StorePath
from janus_jax.io.whole.files import write_file
from janus_jax.io.whole.leftovers import remove
from train.workdir.in_store import StoreCheckpoints

_RUN = "run.json"
State = TypeVar("State", bound=Any)  # a named tuple whose `step` counts the steps


class KeptTraining:
    """The state of a VQ training in `folder`, saved every `every` steps.

    Raises: ValueError if the folder has the state of a training with other settings or other images; OSError if a store
      does not let it be written.
    """

    def __init__(self, folder: pathlib.Path, config: Any, images: str, every: int):
        """`config` is a dataclass, `images` a fingerprint of the images."""
        if every < 1:
            raise ValueError(f"VQ training: save_every must be at least 1, got {every}")
        self.folder, self.every = folder, every
        self._run = json.loads(json.dumps(dataclasses.asdict(config) | {"images": images}))
        path = folder / _RUN
        if path.exists():
            earlier = read_json_object(path)
            other = [name for name in self._run if earlier.get(name) != self._run[name]]
            if other:
                raise ValueError(
                    f"{one_line(folder)} has a training with other settings ({', '.join(other)}); use the same, or "
                    "delete that folder to start over"
                )
        if isinstance(folder, StorePath):
            self._write_run()  # at once, which tells whether anything can be written there
            self._checkpoints: _OnDisk | StoreCheckpoints = StoreCheckpoints(
                folder, keep=1, start=secrets.token_hex(4), seal=lambda: None
            )
            self._checkpoints.clear()
        else:
            self._checkpoints = _OnDisk(folder / "state")

    def _write_run(self):
        write_file(self.folder / _RUN, json.dumps(self._run, indent=2) + "\n")

    @property
    def latest(self) -> int:
        """Step of the newest complete state; 0 for none."""
        return self._checkpoints.latest or 0

    def save(self, state: State, history: dict[str, list[float]]):
        """Writes the state after its step, atomically, then deletes the previous one; OSError on failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_run()
        arrays = {name: jnp.asarray(np.array(values, np.float32)) for name, values in history.items()}
        self._checkpoints.save(int(state.step), _trees(state, arrays))
        self._checkpoints.wait()

    def restore(self, like: State, reported: Sequence[str]) -> tuple[State, dict[str, list[float]]]:
        """The newest state, and the history of what was `reported`; `like` is a state of the same training."""
        step = self.latest
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        history = {name: jax.ShapeDtypeStruct((step,), np.float32) for name in reported}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), _trees(like, history))
        try:
            found = self._checkpoints.restore(step, abstract)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(
                f"the state in {self._checkpoints.folder_of(step)} cannot be read ({one_line(error)}); delete "
                f"{self.folder} to start over"
            ) from None
        return like._replace(**found["state"]), {name: list(np.asarray(found["history"][name])) for name in reported}

    def remove(self):
        """Deletes the state, which is not needed once the checkpoint is written."""
        with contextlib.suppress(OSError):
            remove(self.folder)


def _trees(state: Any, history: dict[str, Any]) -> dict[str, Any]:
    return {"state": state._asdict(), "history": history}


class _OnDisk:
    """The newest state in `folder`, by orbax: complete as soon as it has its name."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def folder_of(self, step: int) -> pathlib.Path:
        return self._folder / str(step)

    @property
    def latest(self) -> int:
        return max((int(p.name) for p in self._folder.glob("*") if p.name.isdigit()), default=0)

    def save(self, step: int, trees: dict[str, Any]):
        before = self.latest
        try:
            ocp.save(self.folder_of(step).absolute(), trees, overwrite=True)
        except ValueError as error:  # tensorstore's
            raise OSError(f"the training state could not be written to {self._folder}: {one_line(error)}") from error
        if before and before != step:
            shutil.rmtree(self.folder_of(before))

    def wait(self):
        """Nothing: it is saved."""

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        return ocp.load(self.folder_of(step).absolute(), abstract)
