"""Local copies of objects in a store, for files that are mapped: made once for each version of an object."""

from __future__ import annotations

import hashlib
import os
import pathlib
import secrets

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import info, read_spans, version_of

FOLDER = "JANUS_JAX_CACHE"  # the environment variable with the folder of the copies, instead of ~/.cache/janus_jax
_AT_ONCE = 256 << 20  # bytes


def local_copy(address: str | os.PathLike) -> pathlib.Path:
    """A local file with the content of the object at `address`, fetched unless a copy of this version is there.

    Copies of earlier versions are removed; a process that has mapped one keeps it.
    """
    address = os.fspath(address)
    found = info(address)
    if found is None:
        raise FileNotFoundError(2, "no such object", address)
    size = int(found["size"])
    folder = _folder()
    name = hashlib.sha256(address.encode()).hexdigest()[:24]
    path = folder / f"{name}.{hashlib.sha256(version_of(found).encode()).hexdigest()[:16]}"
    if path.exists() and path.stat().st_size == size:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{secrets.token_hex(8)}.partial"
    try:
        with open(partial, "xb") as file:
            for begin in range(0, size, _AT_ONCE):
                file.write(read_spans(address, [(begin, min(begin + _AT_ONCE, size))])[0])
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.filename == address:
            raise
        cause = error.strerror or str(error)
        told = f"no room for a copy of {one_line(address)} ({cause}); set {FOLDER} to another folder"
        raise OSError(error.errno, told, str(folder)) from None
    for other in folder.glob(f"{name}.*"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _folder() -> pathlib.Path:
    if chosen := os.environ.get(FOLDER):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "janus_jax" / "stores"
