"""Tells errors of the machine (no file handles, a disk or mount that does not respond, no memory) from bad data.

A sample that the machine could not read is not a bad sample: reading it again may work, and if not, the run has to stop
so that the same command can resume it, and not report damaged data.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from janus_jax.io.store_access import StoreUnavailable

T = TypeVar("T")

MACHINE = frozenset(
    {
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOLCK, errno.EAGAIN, errno.EINTR, errno.EBUSY,
        errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPROTO,
        errno.ENOTCONN, errno.ESHUTDOWN, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    }
)  # fmt: skip
# Seconds between tries, a minute in total: by then a failover, or another process's peak of memory, is over.
WAITS = (0.1, 0.4, 1, 2, 4, 8, 15, 30)


def machine_error(error: BaseException, path: str | os.PathLike = "") -> OSError | None:
    """`error` as an OSError if the machine is at fault, else None.

    C++ libraries raise RuntimeErrors whose text contains the system's message.
    """
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), *([str(path)] if path else []))
    if isinstance(error, OSError):
        return error if error.errno in MACHINE or isinstance(error, TimeoutError) else None
    if isinstance(error, RuntimeError):
        for number in MACHINE:
            if os.strerror(number) in str(error):
                return OSError(number, os.strerror(number), *([str(path)] if path else []))
    return None


def patiently(function: Callable[[], T], path: str | os.PathLike = "", waits: Sequence[float] | None = None) -> T:
    """The result of `function`, retried after each of `waits` seconds while the machine is at fault.

    Raises: OSError with the machine's errno if the last try fails too; any other error at once.
    """
    for wait in (*(WAITS if waits is None else waits), None):
        try:
            return function()
        except (OSError, RuntimeError, MemoryError) as error:
            found = machine_error(error, path)
            if found is None:
                raise
            if wait is None or isinstance(error, StoreUnavailable):  # which has been tried long enough
                # Without the frames of the failed try, which may keep its memory alive.
                raise found from None
        time.sleep(wait)
    raise AssertionError("unreachable")
