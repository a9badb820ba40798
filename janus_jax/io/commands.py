"""How a command ends: its exit code, and the one line on standard error that says why."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from janus_jax.io.messages import print_any_text, print_error

_SIGNALED = 128  # plus the signal's number, as shells report it
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def run(work: Callable[[], Any]) -> int:
    """Runs `work` and returns the exit code: 0 on success, else 2 for bad input or 130 after Ctrl-C, with one line why.

    SIGTERM and SIGHUP end it with 143 and 129. All three signals are raised as exceptions, so that partly written
    output is removed; afterwards they do what they did before.
    """
    # A signal that nohup or a background shell ignores stays ignored, and one that is not Python's is left alone.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    _quiet()
    print_any_text()
    try:
        for number in taken:
            signal.signal(number, _end)
        work()
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    except MemoryError:
        print_error("out of memory; use a machine with more memory, or smaller files")
        return 2
    except _Ended as ended:
        print(ended, file=sys.stderr, flush=True)
        return _SIGNALED + ended.number
    finally:
        for number in taken:
            signal.signal(number, before[number])
    return 0


def leave(code: int):
    """Ends the process with `code`; after a failure at once, since threads may still be writing and would complain."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


class _Ended(BaseException):
    """Raised in the main thread when a signal arrives."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.number = number


def _end(number: int, _frame: Any):
    raise _Ended(number)


def _quiet():
    """Silences threads of orbax and tensorstore, which would print the same error that the command reports."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None
