"""A run's workdir: its files, resuming from it, and exporting from it.

run.json          the configuration, and fingerprints of the data
lease.json        the start that writes to the folder, renewed while it runs
damaged-P.txt     the samples that process P could not read
failures.txt      tracebacks of failures that did not end the run
frozen/           the parameters that the run does not train, written once
checkpoints/N/    after N steps: `trained` (float32 parameters) and `rest` (optimizer state and counters)
export/N/         a checkpoint folder in bfloat16 for `janus_jax.load` and `convert/to_torch.py`, or an adapter's folder
trackers.json     ids of the run in Weights & Biases and trackio
metrics.jsonl, tensorboard/, samples/, evals/, profile/

In a store, `train.workdir.in_store` says what is complete; what is appended to is written locally and copied there.
"""

from __future__ import annotations

import contextlib
import errno
import pathlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import StoreUnavailable, is_store
from janus_jax.io.stores import StorePath, as_path
from janus_jax.io.whole.files import PARTIAL, remove_partial, write_file
from janus_jax.processes import from_first
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.weights.checkpoint import json_bytes
from train.config import TrainConfig
from train.overrides import diff, to_json
from train.run import lease
from train.run.distributed import say, together
from train.run.faults import STOPPED, STORAGE, Stopped
from train.run.lease import Lease
from train.step.earlier import CHECKPOINTS, FROZEN, RUN
from train.step.state import Params, TrainState
from train.workdir.exports import is_exported, write_export
from train.workdir.in_store import StoreCheckpoints
from train.workdir.mirror import Mirror
from train.workdir.on_disk import DiskCheckpoints
from train.workdir.store_lease import StoreLease

_EXPORT = "export"
DAMAGED, METRICS, FAILURES = "damaged-*.txt", "metrics.jsonl", "failures.txt"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_ASK_AGAIN = 2  # seconds between checks of a lease that may lapse
_SEEN_WITHIN = 30  # seconds within which a new file in a shared folder must be visible to all hosts
# Settings that may change when a run resumes: how it is computed and watched, not what is computed.
_FREE = (
    "workdir", "steps", "accumulate", "remat", "loss_chunk", "mesh.", "evaluation.", "samples.", "evals.", "log_every",
    "save_every", "keep", "export_every", "profile_start", "profile_steps", "max_skipped", "watchdog",
    "attention", "reduce_dtype", "grpo.draw_batch", "compiler_options", "layouts.", "sampling_layouts.", "writers",
    "data.workers", "data.max_bad_share", "data.cache",
    "init_from", "language_from", "vision_from", "vq_from",
)  # fmt: skip

_AS_BEFORE = {"adapter": None, "grpo": None, "dpo": None}  # what a run from before there were these had


def check_claim(config: TrainConfig, run: dict[str, Any]):
    """ValueError in one line if the workdir of `config` has something else than `run`: its settings and its data."""
    folder, data = as_path(config.workdir), run["data"]
    path = folder / RUN
    if path.exists():
        try:
            earlier = read_json_object(path)
            settings = _AS_BEFORE | earlier["config"]
            free = tuple(key for key in _FREE if key != "steps" or config.optimizer.schedule != "cosine")
            differing = [key for key in diff(settings, run["config"]) if not key.startswith(free)]
            changed = sorted(name for name in data if earlier["data"].get(name) != data[name])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a run's description ({error}); choose another workdir") from None
        cure = "use the run's own settings, or another workdir"
        if differing:
            raise ValueError(f"{folder} has a run with another configuration: {'; '.join(differing)}; {cure}")
        if changed:
            raise ValueError(f"{folder} has a run on other data: {', '.join(changed)} changed; {cure}")
    elif folder.is_dir() and any(not _is_passing(other.name) for other in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and has no run in it; choose another workdir")


def lease_of(folder: pathlib.Path) -> Lease:
    """The lease on the workdir `folder`, which may be in a store."""
    return StoreLease(folder) if isinstance(folder, StorePath) else Lease(folder)


def check_steps(config: TrainConfig, latest: int):
    """ValueError in one line if the workdir's newest checkpoint, after `latest` steps, is beyond the run's end."""
    if latest > config.steps:
        raise ValueError(
            f"steps={config.steps}, but {config.workdir} is already at step {latest}; raise steps, or choose another "
            "workdir"
        )


class Workdir:
    """The folder of one run. Every process creates one; process 0 writes the small files and holds the lease.

    Attributes:
      folder: the workdir, local or in a store.
      local: where files are appended to, and where libraries write: `folder` itself, or what is copied to it.

    Raises: ValueError if the folder has a run with another configuration or other data, or another start writes to it;
      OSError if a store does not let it.
    """

    def __init__(self, config: TrainConfig, data: dict[str, str], steal: bool = False):
        """`data` are the fingerprints of the prepared folders by path; `steal` as for `Lease.acquire`."""
        self.config, self.folder = config, as_path(config.workdir)
        self.local, self._mirror = self.folder, None
        run = {"config": to_json(config), "data": data}
        with together():
            check_claim(config, run)
        self._lease = lease_of(self.folder)
        try:
            self._take_lease(steal)
            self._open(run)
        except BaseException:
            if self._mirror:
                self._mirror.close()
            self._lease.release()
            raise

    def _open(self, run: dict[str, Any]):
        config = self.config
        with together():
            check_claim(config, run)  # again: another run may have begun in the folder before the lease was taken
        with together():  # only now: while others still look, they would find it after they had not
            if jax.process_index() == 0:
                write_file(self.folder / RUN, json_bytes(run))
                remove_partial(self.folder)
        if jax.process_count() > 1:
            self._check_shared()
        if isinstance(self.folder, StorePath):
            self._open_store()
        else:
            self._checkpoints = DiskCheckpoints(self.folder, config.keep)

    def _open_store(self):
        process = jax.process_index()
        self._mirror = Mirror(self.folder, may=lambda: process > 0 or self._lease.held)
        self.local = self._mirror.local
        start = from_first(secrets.token_hex(4))
        self._checkpoints = StoreCheckpoints(self.folder, self.config.keep, start, self._seal)
        with together():
            self._mirror.fetch([DAMAGED.replace("*", str(process)), *(() if process else (METRICS, FAILURES))])
            if process == 0:
                self._checkpoints.clear()

    def _seal(self):
        """What has to be in the store before a checkpoint counts: the metrics and notes up to it."""
        if jax.process_index() == 0:
            self._lease.check(fresh=True)
        self._mirror.copy()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *_):
        try:
            self._checkpoints.close()
        finally:
            if self._mirror:
                self._mirror.close()
            self._lease.release()

    def _take_lease(self, steal: bool):
        reported = waiting = ""
        while True:
            with together():
                if jax.process_index() == 0:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    waiting = self._lease.acquire(steal)
            # In short rounds, since no process may wait long in a collective.
            if not (waiting := from_first(waiting)):
                return
            if waiting != reported:
                say(f"waiting: {waiting}")
            reported = waiting
            time.sleep(_ASK_AGAIN)

    def check(self):
        """Raises Stopped, in every process, if another start has taken over the folder; called before writing."""
        reason = ""
        if jax.process_index() == 0:
            try:
                self._lease.check()
            except Stopped as error:
                reason = str(error)
        if reason := from_first(reason):
            raise Stopped(reason, STOPPED)

    def _check_shared(self):
        """Checks that all processes see the folder of process 0, by a file with a new random name."""
        mark = self.folder / f"shared-{from_first(secrets.token_hex(8))}"
        with together():
            if jax.process_index() == 0:
                mark.write_bytes(b"")
        try:
            with together():
                deadline = time.monotonic() + _SEEN_WITHIN
                while not mark.exists():
                    if time.monotonic() > deadline:
                        raise ValueError(
                            f"workdir={self.folder} is not the folder that process 0 sees; choose a folder on storage "
                            "that all hosts share"
                        )
                    time.sleep(0.5)
        finally:
            if jax.process_index() == 0:
                mark.unlink()

    def note_damaged(self, step: int, problems: Sequence[str]):
        """Records the samples of `step` that could not be read; process 0 also prints them."""
        if not problems or (jax.process_index() == 0 and not self._lease.held):
            return
        lines = [f"step {step}: left out {problem}" for problem in problems]
        with (self.local / DAMAGED.replace("*", str(jax.process_index()))).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        if jax.process_index() == 0:
            say("\n".join(lines))

    # ------------------------------------------------------------ saving

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._checkpoints.latest

    def save_frozen(self, frozen: Params):
        """Writes the frozen parameters, replacing those of a start that did not reach its first checkpoint."""
        self.check()
        if frozen:
            with self._storing("the frozen parameters"):
                self._checkpoints.save_frozen(frozen)

    def save(self, step: int, state: TrainState):
        """Starts saving `state` after `step` steps in the background; first waits for the previous save."""
        self.check()
        with self._storing(f"the checkpoint of step {step} or the one before it"):
            self._checkpoints.save(step, _trees(state))

    def wait(self):
        """Waits until the background save is complete; raises its errors."""
        with self._storing("the last checkpoint"):
            self._checkpoints.wait()

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Turns a full or failing disk, also for sample grids and metrics, into the end of the run."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise self._no_room("the workdir", error) from error

    @contextlib.contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's come as ValueError
            raise self._no_room(what, error) from error

    def _no_room(self, what: str, error: Exception) -> Stopped:
        latest = max(self._checkpoints.steps, default=None)
        cure = "see what the store is missing" if self._mirror else "make room there"
        left = f"the checkpoint of step {latest} is complete" if latest else "there is no complete checkpoint"
        return Stopped(
            f"{what} could not be written to {self.folder}: {_first_cause(error)}; {left}; {cure} and run the same "
            "command to resume",
            STORAGE,
            alone=True,
        )

    # ------------------------------------------------------------ resuming

    def restore(self, abstract: TrainState, frozen: Params) -> tuple[TrainState, Params]:
        """The newest checkpoint and the frozen parameters, in the layout of the `abstract` ones, on any mesh."""
        step = self.latest
        earlier = max((other for other in self._checkpoints.steps if other < step), default=None)
        on = "start over" if earlier is None else f"resume from the previous checkpoint, of step {earlier}"
        cure = f"delete that folder and run the same command to {on}"
        with self._whole(self.folder / CHECKPOINTS / str(step), cure):
            found = self._checkpoints.restore(step, _trees(abstract))
        if frozen:
            cure = "restore it from a copy of the workdir; without one, start in another workdir, with init_from="
            cure += f"an export of this run ({self.folder / _EXPORT}) if there is one"
            with self._whole(self.folder / FROZEN, cure):
                frozen = self._checkpoints.restore_frozen(frozen)
        return TrainState(trained=found["trained"], **found["rest"]), frozen

    @contextlib.contextmanager
    def _whole(self, folder: pathlib.Path, cure: str) -> Iterator[None]:
        try:
            with together(Exception):
                yield
        except (OutOfMemory, StoreUnavailable, PermissionError):
            raise
        except Exception as error:
            if OutOfMemory.says(error):
                raise
            raise ValueError(f"{folder} is damaged ({_first_cause(error)}); {cure}") from None

    # ------------------------------------------------------------ exporting

    def export(self, step: int, trained: Params, frozen: Params) -> pathlib.Path:
        """Writes a checkpoint folder in bfloat16 with the files of the run's tokenizer, or an adapter's folder as PEFT
        does; returns it."""
        folder = self.folder / _EXPORT / str(step)
        self.check()
        # Exports appear only when complete: if there is one, an earlier start finished it.
        if not from_first(is_exported(folder)):
            with self._storing("the export"):
                write_export(folder, self.config, trained, frozen)
        return folder


def _first_cause(error: BaseException) -> str:
    """The message of the first error in the chain, without tensorstore's dump of its request; what is said of a store
    says it all."""
    while not is_store(getattr(error, "filename", None)) and (cause := error.__cause__ or error.__context__):
        error = cause
    return one_line(re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0], 300)


def _is_passing(name: str) -> bool:
    """Whether a start may leave a file called `name` before there is a run."""
    # run.tmp is an earlier version's.
    return name == "run.tmp" or name.startswith(lease.FILE) or (name[0] == "." and name.endswith(PARTIAL))


def _trees(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
    return {"trained": state.trained, "rest": rest}
