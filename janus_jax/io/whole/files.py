"""Files that appear whole or not at all, on a disk or in a store, whichever of several processes writes them.

What is written has a name of its own until it is whole, and then replaces what is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store, read_versioned, write_if
from janus_jax.io.stores import StorePath

PARTIAL = ".partial"
NO_ROOM = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
}
_LEFT_AFTER = 3600  # seconds without a change after which a partial file counts as that of a killed process


def new_partial(path: pathlib.Path) -> pathlib.Path:
    """A local path to write a file at that `publish` then moves to `path`; no other process has the same."""
    name = f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
    if is_store(path):
        return pathlib.Path(tempfile.mkdtemp(prefix="janus_jax_")) / name
    return path.with_name(name)


def publish(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Makes `partial` appear at `path`, whole; FileNotFoundError if another process has removed it."""
    if isinstance(path, StorePath):
        path.upload(partial)
        discard(partial, path)
    else:
        partial.replace(path)


def discard(partial: pathlib.Path, path: pathlib.Path) -> None:
    if is_store(path):
        shutil.rmtree(partial.parent, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # what failed before is what is told
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local path to write a file at, which appears at `path`, whole, unless the block fails."""
    partial = new_partial(path)
    try:
        yield partial
        publish(partial, path)
    except OSError as error:
        if is_store(path) and (told := no_room(error)):
            cause = f"{NO_ROOM[told]} for {one_line(path)}, which is written there first; set TMPDIR to another folder"
            raise OSError(told, cause, tempfile.gettempdir()) from None
        raise
    finally:
        discard(partial, path)


def write_file(path: pathlib.Path, data: bytes | str) -> None:
    """Writes `data`, text as UTF-8, to the file `path`, whole; OSError that names it if the disk is full."""
    content = data.encode() if isinstance(data, str) else data
    if is_store(path):
        path.write_bytes(content)
        return
    try:
        with appearing(path) as partial, open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a full disk might show only later
    except OSError as error:
        if told := no_room(error):
            raise OSError(told, NO_ROOM[told], str(path)) from None
        raise


def create_file(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically unless it is there; where storage cannot tell, the last writer's remains."""
    if is_store(path):
        found, version = read_versioned(str(path))
        if found is None:
            write_if(str(path), text.encode(), version)
        return
    partial = new_partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:
            partial.replace(path)  # storage without links
    finally:
        discard(partial, path)


def remove_partial(out: pathlib.Path, left_after: float = _LEFT_AFTER) -> None:
    """Removes partial files of `out` that have not changed for so many seconds: their writers were killed."""
    if is_store(out):
        return  # whose objects appear whole
    for path in out.glob(f"*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= left_after:
                path.unlink()


def no_room(error: BaseException) -> int:
    """The errno if `error` means that a disk is full, else 0."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else 0
    # Tensorstore only has the message.
    return next(
        (number for number, words in NO_ROOM.items() if isinstance(error, ValueError) and words in str(error)), 0
    )
