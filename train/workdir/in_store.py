"""Checkpoints in a store, where nothing can be renamed: what an object names as complete is complete.

checkpoints/N/ID/            after N steps, by the start ID: `trained` and `rest`
checkpoints/N/complete.json  names ID; written last and removed first
frozen/ID/, frozen/complete.json

Each start writes to folders of its own, so that one which was taken over, and does not know it yet, spoils nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from janus_jax.io.store_access import StoreUnavailable
from janus_jax.io.stores import StorePath
from janus_jax.weights.store_arrays import Held, hold, read_tree, write_held, write_tree
from train.run.distributed import together
from train.step.earlier import CHECKPOINTS, COMPLETE, FROZEN, complete_steps, whole
from train.step.state import Params

_PART = "part-"  # objects that say that a process has written its part
_PATIENCE = 1200  # seconds in which the other processes must have written theirs
_ASK_AGAIN = 1


class StoreCheckpoints:
    """The checkpoints of the run in `folder`, of which the newest `keep` are kept, and its frozen parameters.

    Saving goes on in a thread; `wait` waits for it and raises its error.

    Args:
      start: the name of this start of the run, the same in all its processes and in no other start.
      seal: called once this process's part is written, before the checkpoint counts as complete.
    """

    def __init__(self, folder: StorePath, keep: int, start: str, seal: Callable[[], None]):
        self._run, self._folder, self._keep, self._start, self._seal = folder, folder / CHECKPOINTS, keep, start, seal
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._steps: list[int] | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, as they were at the start and as this process has left them."""
        if self._steps is None:
            self._steps = sorted(complete_steps(self._run))  # type: ignore[arg-type]
        return self._steps

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    def folder_of(self, step: int) -> StorePath:
        """The folder with the checkpoint of `step`."""
        return self._folder / str(step)

    def clear(self):
        """Removes what killed starts have left; only process 0 calls it, before anything is saved."""
        for folder in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            if folder.name.isdigit() and int(folder.name) not in self.steps:
                folder.rmtree()
            elif folder.name.isdigit():
                kept = {folder / COMPLETE, whole(folder)}  # type: ignore[arg-type]
                for path in [path for path in folder.iterdir() if path not in kept]:
                    path.rmtree()

    # ------------------------------------------------------------ frozen parameters

    def save_frozen(self, frozen: Params):
        """Writes the frozen parameters."""
        place = self._run / FROZEN
        with together():
            if self._process == 0:
                _remove(place)
        with together():
            write_tree(place / self._start, frozen, describe=self._process == 0)
        with together():
            if self._process == 0:
                self._complete(place)

    def restore_frozen(self, abstract: Params) -> Params:
        """The frozen parameters, in the layout of the `abstract` ones."""
        return read_tree(whole(self._run / FROZEN), abstract)  # type: ignore[arg-type]

    # ------------------------------------------------------------ checkpoints

    def save(self, step: int, trees: Mapping[str, Any]):
        """Starts to save `trees` as the checkpoint of `step`; first waits for the one before."""
        self.wait()
        held = {name: hold(tree) for name, tree in trees.items()}
        self._thread = threading.Thread(target=self._save, args=(step, held), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self):
        """Waits until this process has done what it has to do for the last save; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The trees of the checkpoint of `step`, in the layout of the `abstract` ones."""
        folder = whole(self._folder / str(step))  # type: ignore[arg-type]
        return {name: read_tree(folder / name, tree) for name, tree in abstract.items()}

    def close(self):
        """Waits for the last save."""
        self.wait()

    def _save(self, step: int, held: Mapping[str, Mapping[str, Held]]):
        try:
            place = self._folder / str(step)
            for name, arrays in held.items():
                write_held(place / self._start / name, arrays, describe=self._process == 0)
            self._seal()
            if self._process:
                (place / self._start / f"{_PART}{self._process}").write_bytes(b"written")
            else:
                self._await_parts(place / self._start)
                self._complete(place)
            steps = sorted({*self.steps, step})
            self._steps = steps[-self._keep :]
            for old in steps[: -self._keep] if self._process == 0 else ():
                _remove(self._folder / str(old))
        except BaseException as error:
            self._error = error

    def _await_parts(self, folder: StorePath):
        deadline = time.monotonic() + _PATIENCE
        # By objects: this is not the thread in which the processes wait for each other.
        while (left := self._processes - 1 - len(folder.glob(f"{_PART}*") if self._processes > 1 else ())) > 0:
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"{left} of the other processes did not write their part in {_PATIENCE} seconds")
            time.sleep(_ASK_AGAIN)

    def _complete(self, place: StorePath):
        (place / COMPLETE).write_text(json.dumps({"folder": self._start}))


def _remove(place: StorePath):
    # Never is a part of it taken for all of it.
    with contextlib.suppress(FileNotFoundError):
        (place / COMPLETE).unlink()
    place.rmtree()
