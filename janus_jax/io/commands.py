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

_SIGNALED = 128  # and the number of the signal, as shells count
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def run(work: Callable[[], Any]) -> int:
    """Does `work`; 0 when it was done, 2 for bad input, 130 after Ctrl-C: with one line on standard error.

    SIGTERM and SIGHUP end it with 143 and 129. All three are raised, so that what was written in part is removed.
    """
    for number in _SIGNALS:
        # The choice of nohup, or of a shell that runs it in the background, stands.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    _quiet()
    print_any_text()
    try:
        work()
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    except MemoryError:
        print_error("the memory does not suffice; try it on a machine with more, or with smaller files")
        return 2
    except _Ended as ended:
        print(ended, file=sys.stderr, flush=True)
        return _SIGNALED + ended.number
    return 0


def leave(code: int):
    """Ends the process with `code`, at once where it failed: threads may still be writing, and would complain."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


class _Ended(BaseException):
    """What a signal raises in the main thread."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.number = number


def _end(number: int, _frame: Any):
    raise _Ended(number)


def _quiet():
    """Silences threads of orbax and tensorstore, which print the error that the command tells in a line of its own."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None
