"""Files that appear whole or not at all, on a disk or in a store, whichever of several processes writes them.

What is written has a name of its own until it is whole, and then replaces what is there.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator

from janus_jax.io.store_access import is_store, read_versioned, write_if
from janus_jax.io.stores import StorePath

PARTIAL = ".partial"
_LEFT_AFTER = 3600  # seconds without a change after which a partial file counts as that of a killed process


def new_partial(path: pathlib.Path) -> pathlib.Path:
    """A local path to write a file at that `publish` then moves to `path`; no other process has the same."""
    name = f"{path.name}.{secrets.token_hex(4)}{PARTIAL}"
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
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local path to write a file at, which appears at `path`, whole, unless the block fails."""
    partial = new_partial(path)
    try:
        yield partial
        publish(partial, path)
    finally:
        discard(partial, path)


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically."""
    if is_store(path):
        path.write_text(text, encoding="utf-8")
        return
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
