"""Failures that do not end the run: in evaluations, sample grids and metrics."""

from __future__ import annotations

import contextlib
import pathlib
import time
import traceback
from collections.abc import Iterator

import jax

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file
from janus_jax.weights.checkpoint import json_bytes
from train.run.distributed import Agreed, barrier, say
from train.run.faults import HUNG, Stopped

FILE = "failures.txt"
_TRIES = "tries.json"
_WAIT = 60  # seconds within which the other processes fail in the same way, if they do


class Failures:
    """Reports and counts failures that need not end the run; tracebacks go to failures.txt.

    Args:
      folder: the run's folder, shared by all processes.
      local: where failures.txt is appended to, if not there.

    Attributes:
      count: failures of this process since the start.
    """

    def __init__(self, folder: pathlib.Path, local: pathlib.Path | None = None):
        self._folder, self._local, self.count = folder, local or folder, 0

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """For work of this process alone: an exception inside is reported and suppressed."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            self.report(what, error)

    @contextlib.contextmanager
    def alike(self, what: str) -> Iterator[None]:
        """For work that all processes do together: an exception in all of them is reported and suppressed.

        Errors that may occur in a single process, such as those of its disk, belong inside
        `distributed.together(Exception)`. If one process fails alone in the middle of a collective, the others wait for
        it there: then this process stops, so that the run can be started again.
        """
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, Agreed):
                self._await_others(what, error)
            self.report(what, error)

    def report(self, what: str, error: Exception):
        """One line on the console, the traceback in the file."""
        self.count += 1
        kind = "" if isinstance(error, Agreed) else f"{type(error).__name__}: "
        cause = one_line(f"{kind}{error}", 400)
        say(f"failed: {what} ({cause}); the run continues without it; see {FILE} for the traceback")
        if jax.process_index() == 0:
            with contextlib.suppress(OSError), (self._local / FILE).open("a", encoding="utf-8") as file:
                file.write(f"{what}\n{''.join(traceback.format_exception(error))}\n")

    def _await_others(self, what: str, error: Exception):
        # Through files: collectives may be blocked by the one that was not finished.
        name = "failed-" + "".join(c if c.isalnum() else "-" for c in what)
        marks = [self._folder / f"{name}.{process}" for process in range(jax.process_count())]
        mark, deadline = marks[jax.process_index()], time.monotonic() + _WAIT
        try:
            mark.write_bytes(b"")
            while not all(other.exists() for other in marks):
                if time.monotonic() > deadline:
                    raise Stopped(
                        f"{what} failed in process {jax.process_index()} only ({one_line(error, 300)}); run the same "
                        "command to resume from the last checkpoint",
                        HUNG,
                        alone=True,
                    )
                time.sleep(0.2)
            barrier()  # until all have seen it; no process is inside other collectives
        finally:
            mark.unlink(missing_ok=True)


class Tries:
    """Remembers across starts how often the work after a step was begun and not finished.

    This keeps a sample grid that kills the process from killing every later start too.
    """

    def __init__(self, folder: pathlib.Path):
        self._path = folder / _TRIES

    def begin(self, step: int, what: str) -> int:
        """Records that `what` begins after `step`; returns how often it was begun before and not finished."""
        counts = self._read(step)
        before = counts.get(what, 0)
        self._write(step, counts | {what: before + 1})
        return before

    def end(self, step: int, what: str):
        """Records that `what` was finished."""
        counts = self._read(step)
        counts.pop(what, None)
        self._write(step, counts)

    def _read(self, step: int) -> dict[str, int]:
        with contextlib.suppress(OSError, ValueError):
            earlier = read_json_object(self._path, missing_ok=True)
            if earlier.get("step") == step and isinstance(earlier.get("begun"), dict):
                return {what: count for what, count in earlier["begun"].items() if type(count) is int}
        return {}

    def _write(self, step: int, counts: dict[str, int]):
        with contextlib.suppress(OSError):
            if not counts:
                self._path.unlink(missing_ok=True)
                return
            write_file(self._path, json_bytes({"step": step, "begun": counts}))
