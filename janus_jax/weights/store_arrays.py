"""Arrays in a store: zarr3, each array under a name of its own, written and read by all processes of a run at once.

Each process writes the shards that are its own, in chunks that lie within one shard, so that no two processes write to
the same object and nothing has to be merged or renamed. Each chunk has a checksum, which every reader verifies. What
says that all of it is there is the caller's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from janus_jax.io.ahead import in_order
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import kvstore_spec, request_all, store_context
from janus_jax.weights import orbax_layouts

_CHUNK_BYTES = 32 << 20  # of an object, at most
_IN_FLIGHT = 128 << 20  # bytes of arrays that are written at the same time
_SMALL_BYTES = 16 << 20  # smaller arrays are read several at a time
_READERS = 16
_PIECES = 4  # of arrays that are not held whole, written at the same time
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclasses.dataclass(frozen=True)
class Held:
    """What this process writes of one array: regions of it, in host memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    regions: Sequence[tuple[tuple[slice, ...], np.ndarray]]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by name: the keys of their paths, joined by dots."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


# ---------------------------------------------------------------- writing


def hold(tree: Any) -> dict[str, Held]:
    """Copies this process's shards of jax arrays to host memory, of replicated ones the first copy; by name."""
    leaves = named(tree)
    for leaf in leaves.values():
        for shard in _own(leaf):
            shard.data.copy_to_host_async()
    return {name: _hold(leaf) for name, leaf in leaves.items()}


def _own(leaf: jax.Array) -> list[Any]:
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


def _hold(leaf: jax.Array) -> Held:
    # Copies: the device's memory, which CPU devices share with numpy, is given to the next step.
    regions = [(shard.index, np.array(shard.data)) for shard in _own(leaf)]
    shard_shape = leaf.sharding.shard_shape(leaf.shape)
    return Held(leaf.shape, np.dtype(leaf.dtype), chunk_shape(leaf.shape, shard_shape, leaf.dtype.itemsize), regions)


def chunk_shape(shape: Sequence[int], shard: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of the stored chunks of an array whose shards have the shape `shard`: each lies within one shard."""
    chunk = list(shard)
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        # The first axes first: those of the layers, and of rows that lie one after the other in memory.
        cuts = [(axis, _cut(chunk[axis], whole=shard[axis] == shape[axis])) for axis in range(len(chunk))]
        found = next(((axis, size) for axis, size in cuts if size < chunk[axis]), None)
        if found is None:
            break
        chunk[found[0]] = found[1]
    return tuple(chunk)


def _cut(size: int, whole: bool) -> int:
    """The next smaller size of a chunk along an axis; a divisor, unless one shard has the `whole` axis."""
    if whole:
        return -(-size // 2)
    return next((size // factor for factor in (2, 3, 5, 7) if size % factor == 0), size)


def write_held(folder: str | os.PathLike, held: Mapping[str, Held], describe: bool) -> None:
    """Writes the arrays `held` into `folder`; the process that is to `describe` them also writes what each array is.

    Raises: OSError in one line.
    """
    sizes = {name: sum(data.nbytes for _, data in each.regions) for name, each in held.items()}
    for batch in _batches(sizes):
        request_all(os.fspath(folder), [_writer(folder, name, held[name], describe) for name in batch])


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names of arrays of these `sizes` in bytes, as many at a time as are written at the same time."""
    batch: list[str] = []
    for name in sizes:
        batch.append(name)
        if sum(sizes[name] for name in batch) >= _IN_FLIGHT:
            yield batch
            batch = []
    if batch:
        yield batch


def _writer(folder: str | os.PathLike, name: str, held: Held, describe: bool) -> Callable[[], Any]:
    """A function that starts to write one array, and returns what waits for it."""

    def start() -> Callable[[], None]:
        # What the array is need not be asked for, so that it takes no more requests than it has objects.
        options = {"dtype": ts.dtype(held.dtype), "shape": held.shape, "open": True, "assume_metadata": True}
        store = _open(folder, name, chunk_layout=ts.ChunkLayout(chunk_shape=held.chunk), **options).result()
        writing = [
            store[index].write(data, can_reference_source_data_indefinitely=True) for index, data in held.regions
        ]
        if describe:
            writing.append(store.kvstore.write("zarr.json", json.dumps(store.spec().to_json()["metadata"])))

        def wait() -> None:
            for written in writing:
                written.result()

        return wait

    return start


def _open(folder: str | os.PathLike, name: str, **options: Any) -> ts.Future:
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore_spec(f"{os.fspath(folder)}/{name}/"),
        # A missing chunk counts as lost, so chunks of zeros have to be stored too.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    if "shape" in options:
        spec["metadata"] = {"codecs": _CODECS}
    return ts.open(spec, context=store_context(), **options)


def write_tree(folder: pathlib.Path, tree: Any, describe: bool) -> None:
    """Writes the leaves of any tree of jax arrays into `folder`, a few at a time, of which this process then holds
    copies; every process of a run calls it."""
    leaves = named(tree)
    sizes = {name: sum(shard.data.nbytes for shard in _own(leaf)) for name, leaf in leaves.items()}
    for batch in _batches(sizes):
        write_held(folder, {name: _hold(leaves[name]) for name in batch}, describe)


def write_params(folder: pathlib.Path, params: Any) -> None:
    """Writes nested dicts of arrays into `folder`, for `checkpoint.array_leaves`; every process of a run calls it.

    What a single process writes is an orbax checkpoint too. (Several would have to save its description together, in a
    folder that they share.)

    Raises: OSError in one line.
    """
    place = folder / _describe(folder, params) if jax.process_count() == 1 else folder
    write_tree(place, jax.tree.map(jax.numpy.asarray, params), describe=jax.process_index() == 0)


def write_pieces(
    folder: pathlib.Path,
    leaves: Mapping[tuple[str, ...], Any],
    pieces: Callable[[Any, tuple[int, ...]], Iterable[tuple[slice, ...]]],
    on_bytes: Callable[[int], Any],
) -> None:
    """Writes arrays that are too large to be held, as `write_params` does, by a single process.

    Args:
      leaves: objects with `shape`, `dtype` and `read`, which gives the values at an index, by their paths.
      pieces: the indices that cover a leaf whose stored chunks have this shape: each begins and ends with chunks.
      on_bytes: called with the size of each piece once it is written.
    """
    place = folder / _describe(folder, traverse_util.unflatten_dict(leaves))

    def held() -> Iterator[tuple[str, Held, bool]]:
        for path, leaf in leaves.items():
            chunk = chunk_shape(leaf.shape, leaf.shape, leaf.dtype.itemsize)
            for number, index in enumerate(pieces(leaf, chunk)):
                region = np.ascontiguousarray(leaf.read(index))
                yield ".".join(path), Held(leaf.shape, leaf.dtype, chunk, [(index, region)]), number == 0

    def written(one: tuple[str, Held, bool]) -> int:
        name, each, first = one
        write_held(place, {name: each}, describe=first)
        return sum(data.nbytes for _, data in each.regions)

    with ThreadPoolExecutor(_PIECES) as pool:
        for _, num_bytes in in_order(held(), written, pool, _PIECES):
            on_bytes(num_bytes)


def _describe(folder: pathlib.Path, params: Any) -> str:
    """Writes orbax's own files for `params`, made from scalars in their place; returns where their arrays belong."""
    context = ocp.Context()
    context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = False, True
    context.array.saving.use_compression = False
    with tempfile.TemporaryDirectory(prefix="janus_jax-") as local:
        made = pathlib.Path(local) / "params"
        with context, _quietly():
            ocp.save(made, jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), params))
        state = orbax_layouts.find(made)
        arrays = {state / name for name in named(params)}
        for path in sorted(made.rglob("*")):
            if path.is_file() and not arrays & set(path.parents):
                (folder / path.relative_to(made).as_posix()).write_bytes(path.read_bytes())
        return state.relative_to(made).as_posix()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without orbax's warning that there was nothing to merge, which is how it should be."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


# ---------------------------------------------------------------- reading


def read_tree(folder: pathlib.Path, abstract: Any) -> Any:
    """The arrays in `folder` as the tree `abstract` of `jax.ShapeDtypeStruct`s with shardings: each device's slice.

    Raises: ValueError if they are missing, damaged, or others than these; OSError if the store does not answer.
    """
    wanted = named(abstract)
    opened = dict(
        zip(
            wanted,
            request_all(
                os.fspath(folder), [lambda name=name: _open(folder, name, open=True).result for name in wanted]
            ),
            strict=True,
        )
    )
    for name, leaf in wanted.items():
        found = opened[name]
        if found.shape != leaf.shape or found.dtype.numpy_dtype != leaf.dtype:
            raise ValueError(
                f"{one_line(name)} is {found.dtype.name}{list(found.shape)}, not {leaf.dtype}{list(leaf.shape)}"
            )

    def read(name: str) -> jax.Array:
        return _read(folder, opened[name], wanted[name])

    def small(name: str) -> bool:
        return wanted[name].size * wanted[name].dtype.itemsize <= _SMALL_BYTES

    with ThreadPoolExecutor(_READERS) as pool:
        arrays = dict(in_order(wanted, read, pool, 2 * _READERS, small))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _read(folder: pathlib.Path, store: ts.TensorStore, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # All of this process's slices at the same time, each once.
    slices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    keys = list(dict.fromkeys(_key(index, leaf.shape) for index in slices))
    data = request_all(
        os.fspath(folder), [lambda key=key: store[tuple(slice(*axis) for axis in key)].read().result for key in keys]
    )
    there = dict(zip(keys, data, strict=True))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: there[_key(index, leaf.shape)])


def _key(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
