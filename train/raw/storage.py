"""Errors of the machine (no handles left, a disk or mount that does not answer, no memory), told from bad data.

A sample that the machine could not read is a good sample: reading it again may work, and if not, the run has to stop in
a way that the same command goes on, not call the data damaged.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

MACHINE = frozenset(
    {
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOLCK, errno.EAGAIN, errno.EINTR, errno.EBUSY,
        errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPROTO,
        errno.ENOTCONN, errno.ESHUTDOWN, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    }
)  # fmt: skip
# Seconds between tries, a minute in all: a server that fails over or a neighbor's peak of memory is over by then.
WAITS = (0.1, 0.4, 1, 2, 4, 8, 15, 30)


def machine_error(error: BaseException, path: str | os.PathLike = "") -> OSError | None:
    """`error` as an OSError where the machine is at fault, else None.

    Libraries in C++ raise RuntimeErrors, whose text holds what the system said.
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
    """What `function` returns, tried again after each of `waits` seconds while the machine is at fault.

    Raises: OSError with the machine's errno when the last try failed too; anything else as it comes.
    """
    for wait in (*(WAITS if waits is None else waits), None):
        try:
            return function()
        except (OSError, RuntimeError, MemoryError) as error:
            found = machine_error(error, path)
            if found is None:
                raise
            if wait is None:
                # Without the frames of the failed try, which may hold what took the memory.
                raise found from None
        time.sleep(wait)
    raise AssertionError("unreachable")
