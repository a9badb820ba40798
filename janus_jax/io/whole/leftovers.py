"""The lock next to a folder that is being written, and the removal of leftovers of killed writers."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator

from janus_jax.io.messages import one_line
from janus_jax.io.stores import StorePath

try:
    import fcntl
except ImportError:  # Windows: leftovers stay, since nothing shows whether their writer is alive
    fcntl = None  # type: ignore[assignment]

_LEFT_AFTER = 3600  # seconds without a change after which the folder of another host's writer counts as a leftover
_GONE_WITHIN = 20  # seconds within which threads must stop writing into a folder that is being removed


def remove(folder: pathlib.Path):
    """Removes `folder`, even if threads are still writing into it.

    Raises OSError if it still exists after `_GONE_WITHIN` seconds.
    """
    if isinstance(folder, StorePath):
        folder.rmtree()
        return
    deadline = time.monotonic() + _GONE_WITHIN
    while folder.exists():
        late = time.monotonic() > deadline
        shutil.rmtree(folder, ignore_errors=not late)
        time.sleep(0.05)  # a thread may create it again


def new_lock(place: pathlib.Path) -> tuple[int, pathlib.Path]:
    """The descriptor and the path of a new lock next to `place`, held until the descriptor is closed."""
    while True:
        path = place.with_name(f".{place.name}.{secrets.token_hex(4)}.lock")
        number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        if _take(number):
            # Another process may have taken it for a leftover before it was locked.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(number)):
                    os.write(number, socket.gethostname().encode())
                    return number, path
        os.close(number)


def _take(number: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # storage without locks, where no other process can take the lock either
        return True
    return True


def remove_left(place: pathlib.Path) -> Iterator[str]:
    """Removes what killed writers of `place` left next to it; yields a sentence for each."""
    if fcntl is None or not place.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.lock")
    for path in sorted(path for path in place.parent.iterdir() if pattern.fullmatch(path.name)):
        yield from _remove_of(path, place)


def _remove_of(lock: pathlib.Path, place: pathlib.Path) -> Iterator[str]:
    folder, aside = lock.with_suffix(".partial"), lock.with_suffix(".old")
    try:
        number = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # its writer ended just now, or is another user's
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        host = os.read(number, 256).decode(errors="replace")
        if host != socket.gethostname() and time.time() - _changed(folder) < _LEFT_AFTER:
            return
        if aside.exists() and not place.exists():
            aside.rename(place)
            yield f"restored {one_line(place)}, which a killed process had moved aside"
        for path in (folder, aside):
            if path.exists():
                size = _size(path)
                remove(path)
                yield f"removed {one_line(path)} ({size / 1e9:.3g} GB), left by a killed process"
        lock.unlink(missing_ok=True)
    except OSError:  # its writer is alive, or the storage has no locks
        return
    finally:
        os.close(number)


def _files(folder: pathlib.Path) -> Iterator[os.stat_result]:
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(root, name))
                if stat.S_ISREG(found.st_mode):
                    yield found


def _changed(folder: pathlib.Path) -> float:
    return max((found.st_mtime for found in _files(folder)), default=0.0)


def _size(folder: pathlib.Path) -> int:
    return sum(found.st_size for found in _files(folder))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Blocks the signals that end a process: a second Ctrl-C would interrupt the cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    named = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    handlers = {number: signal.getsignal(number) for number in named if number is not None}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    for number in handlers:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
