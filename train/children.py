"""What every worker process of a run does as it starts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def outlive_the_notice(*_) -> None:
    """Goes on until the run itself has stopped, and not a moment longer.

    Ending a job signals all of its processes, but the run still needs what its workers make.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    # A killed run cannot stop its workers.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
