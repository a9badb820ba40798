"""What ends a run before its last step: exit codes, preemption notices, and a watchdog."""

from __future__ import annotations

import builtins
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
STOPPED = 3  # the data or the losses need attention
HUNG = 70
STORAGE = 74  # a checkpoint could not be written
AGAIN = 75  # preempted and saved: run the same command to resume
INTERRUPTED = 130

_own = False


def own_process():
    """Declares that this process is the command line's own, so that it may be ended if it cannot continue."""
    global _own
    # In a notebook, `%run` runs a module as `__main__` inside the kernel.
    _own = not hasattr(builtins, "__IPYTHON__")


def is_own_process() -> bool:
    """Whether this process may be ended, even by `os._exit`: not in a notebook or a program that calls `train`."""
    return _own


class Stopped(RuntimeError):
    """A run ended before its last step; the message is one line with the reason.

    Attributes:
      code: the exit code.
      alone: whether this process may be the only one that stops.
    """

    def __init__(self, message: str, code: int, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


class Notice:
    """Tells whether this run was asked to end, by SIGTERM to any of its processes. A context manager."""

    def __init__(self):
        self._told, self._before = False, None

    def __enter__(self) -> Notice:
        # With several processes, JAX's own handler is installed, which informs all of them.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_):
        self._told = True

    def after(self, step: int) -> bool:
        """Whether to end after `step`; called after each step, it returns the same in all processes."""
        if jax.process_count() == 1:
            return self._told
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)


class Watchdog:
    """Ends the run if it makes no progress for too long; a context manager.

    A command-line process is ended. Elsewhere, such as in a notebook, the main thread is interrupted, and leaves the
    context with Stopped as soon as it runs Python again; if the run is in another thread, it can only be reported.

    Args:
      seconds: how long; 0 for never.
      end: called with the exit code instead.
    """

    def __init__(self, seconds: float, end: Callable[[int], None] | None = None):
        self._seconds, self._end = seconds, end or self._end_run
        self._hung = ""
        self._in_main_thread = False
        self._doing, self._since = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        self._over.set()
        if self._hung and kind is KeyboardInterrupt:
            raise Stopped(self._hung, HUNG, alone=True) from None

    def _end_run(self, code: int):
        if is_own_process():
            os._exit(code)
        if self._in_main_thread:
            # A signal, as by Ctrl-C, since it wakes blocking calls.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def doing(self, what: str):
        """Reports progress, and what the run is about to do."""
        self._doing, self._since = what, time.monotonic()

    def _watch(self):
        while not self._over.wait(min(self._seconds / 4, 10)):
            if time.monotonic() - self._since < self._seconds:
                continue
            self._hung = (
                f"process {jax.process_index()} has been {self._doing} for more than {self._seconds:g} seconds "
                "(watchdog); run the same command to resume from the last checkpoint"
            )
            print(f"stopped: {self._hung}; stacks of its threads follow", file=sys.stderr, flush=True)
            # The real stderr: a notebook's has no file descriptor.
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            self._end(HUNG)
            return
