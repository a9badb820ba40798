"""What ends a run before its last step: exit codes, notices to end, and a watchdog."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax

# Exit codes of `python -m train.main`; those above 64 are sysexits.h's nearest.
BAD_INPUT = 2  # refused before the first step
STOPPED = 3  # the data or the numbers need a person
HUNG = 70
STORAGE = 74  # a checkpoint could not be written
AGAIN = 75  # told to end, and saved: the same command goes on
INTERRUPTED = 130


class Stopped(RuntimeError):
    """A run ended before its last step, for a reason that its one line tells.

    Attributes:
      code: the exit code.
      alone: whether this process may be the only one to know.
    """

    def __init__(self, message: str, code: int, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


class Notice:
    """Whether this run was told to end, by SIGTERM to any of its processes. A context manager."""

    def __init__(self):
        self._told, self._before = False, None

    def __enter__(self) -> Notice:
        # With several processes JAX's own handler is in place, which tells all of them.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_):
        self._told = True

    def after(self, step: int) -> bool:
        """Whether to end after `step`; all processes, asked after each step, come to the same answer."""
        if jax.process_count() == 1:
            return self._told
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)


class Watchdog:
    """Ends the process when nothing has got on for long; a context manager.

    Args:
      seconds: how long; 0 for never.
      end: called with the exit code.
    """

    def __init__(self, seconds: float, end: Callable[[int], None] = os._exit):
        self._seconds, self._end = seconds, end
        self._doing, self._since = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def doing(self, what: str):
        """Tells that the run has got on, and what it is about to do."""
        self._doing, self._since = what, time.monotonic()

    def _watch(self):
        while not self._over.wait(min(self._seconds / 4, 10)):
            if time.monotonic() - self._since < self._seconds:
                continue
            print(
                f"stopped: process {jax.process_index()} has been {self._doing} for more than {self._seconds:g} "
                "seconds (watchdog); where its threads are follows. The same command goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            self._end(HUNG)
            return
