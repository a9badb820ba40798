"""Finds the arrays of an orbax checkpoint in each of the layouts that orbax's savers write.

Arrays are zarr or zarr3, in separate folders or in one OCDBT store, at the top or under the name of an item:
`orbax.checkpoint.v1.save`, PyTreeCheckpointer, StandardCheckpointer, AsyncCheckpointer and CheckpointManager differ
only in that, as far as reading goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tensorstore as ts

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store, kvstore_spec, request, request_all, store_context
from janus_jax.io.stores import as_path

T = TypeVar("T")

_OCDBT = "manifest.ocdbt"
_METADATA = {".zarray": "zarr", "zarr.json": "zarr3"}  # the metadata file of each driver
# Names that orbax versions have given a single item; the last is the folder itself, when several are saved together.
_ITEMS = ("state", "pytree", "default", "params", "")
_MAX_FILES = 1_000_000
# A missing chunk counts as lost, as it does for orbax, so chunks of zeros have to be stored too.
_POLICY = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder inside the orbax checkpoint `folder` that has the arrays, or None."""
    return next((path for path in (folder / name for name in _ITEMS) if _holds_arrays(path)), None)


def _holds_arrays(folder: pathlib.Path) -> bool:
    if (folder / _OCDBT).is_file():
        return True
    if not folder.is_dir():
        return False
    if is_store(folder):
        return bool(_drivers_below(folder))
    with os.scandir(folder) as entries:
        return any(_plain_driver(pathlib.Path(entry.path)) for entry in entries if entry.is_dir())


def _plain_driver(folder: pathlib.Path) -> str | None:
    return next((driver for name, driver in _METADATA.items() if (folder / name).is_file()), None)


@dataclasses.dataclass(frozen=True)
class Store:
    """The arrays in one folder: `drivers` maps each name (path entries joined by dots) to its zarr driver."""

    folder: pathlib.Path
    ocdbt: bool
    drivers: dict[str, str]

    def open_all(self, names: Sequence[str]) -> dict[str, ts.TensorStore]:
        """The arrays called `names`; ValueError if one is damaged."""
        starts = [functools.partial(start_to_open, self.folder, name, self.drivers[name], self.ocdbt) for name in names]
        if is_store(self.folder):
            arrays = request_all(os.fspath(self.folder), starts)
        else:
            arrays = [start()() for start in starts]
        for name, array in zip(names, arrays, strict=True):
            self._check_chunks(name, array)
        return dict(zip(names, arrays, strict=True))

    def _check_chunks(self, name: str, array: ts.TensorStore):
        # Bounds the memory of a read; orbax's chunks are never larger than the array.
        if any(size > most for size, most in zip(array.chunk_layout.read_chunk.shape, array.shape, strict=True)):
            chunk = list(array.chunk_layout.read_chunk.shape)
            raise ValueError(f"{one_line(name)} has chunks of {one_line(chunk)}, larger than the array")


def open_store(folder: pathlib.Path) -> Store:
    """Opens `folder`, found by `find`; ValueError if it is damaged."""
    _refuse_special_files(folder)
    ocdbt = (folder / _OCDBT).is_file()
    drivers: dict[str, str] = {}
    if ocdbt:
        keys = asked(
            folder, lambda: ts.KvStore.open(_kvstore(folder), context=_context(folder)).result().list().result()
        )
        for key in keys:
            name, _, file = key.decode("utf-8", "surrogateescape").rpartition("/")
            if file in _METADATA:
                drivers[name] = _METADATA[file]
    elif is_store(folder):
        drivers = _drivers_below(folder)
    else:
        for path in folder.iterdir():
            if path.is_dir() and (driver := _plain_driver(path)):
                drivers[path.name] = driver
    return Store(folder, ocdbt, drivers)


def _drivers_below(folder: pathlib.Path) -> dict[str, str]:
    """The drivers of the arrays in separate folders of a store, from one listing."""
    found = as_path(folder).walk()  # type: ignore[attr-defined]
    below = [path for path in found if path.parent.parent == folder and path.name in _METADATA]
    return {path.parent.name: _METADATA[path.name] for path in below}


def start_to_open(folder: pathlib.Path, name: str, driver: str, ocdbt: bool) -> Callable[[], ts.TensorStore]:
    """Starts to open the array called `name` in `folder` for reading; returns what waits for it."""
    kvstore = _kvstore(folder) | {"path": f"{name}/"} if ocdbt else _files(folder / name)
    spec = {"driver": driver, "kvstore": kvstore, **_POLICY}
    return ts.open(spec, context=_context(folder)).result


def create_array(folder: pathlib.Path, name: str, codecs: list[dict[str, Any]], **options: Any) -> ts.Future:
    """Creates a zarr3 array in the OCDBT store `folder`, replacing any of that name; `options` are tensorstore's."""
    kvstore = _kvstore(folder) | {"path": f"{name}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": {"codecs": codecs}, **_POLICY}
    return ts.open(spec, create=True, delete_existing=True, **options)


def _files(folder: pathlib.Path) -> dict[str, str]:
    return kvstore_spec(f"{folder}/") if is_store(folder) else {"driver": "file", "path": f"{folder.absolute()}/"}


def asked(folder: pathlib.Path, function: Callable[[], T]) -> T:
    """The result of `function`, which reads from `folder`; tried again if that is in a store which is busy."""
    return request(os.fspath(folder), function) if is_store(folder) else function()


def _context(folder: pathlib.Path) -> ts.Context | None:
    return store_context() if is_store(folder) else None


def _kvstore(folder: pathlib.Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": _files(folder)}


def _refuse_special_files(folder: pathlib.Path):
    """ValueError for a FIFO or a device in `folder`, since tensorstore would open it."""
    if is_store(folder):
        return
    count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            count += 1
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{one_line(path)} is not a regular file")
    if count > _MAX_FILES:
        raise ValueError(f"it has more than {_MAX_FILES:,} files")


@contextlib.contextmanager
def named(folder: pathlib.Path) -> Iterator[None]:
    """Turns tensorstore's errors into a message that names `folder` and what to do."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        cause = one_line(str(error).partition(" [")[0], 300)  # the rest are lines of tensorstore's source
        raise ValueError(f"{one_line(folder)} is damaged ({cause}); convert the checkpoint again") from None
