"""Checkpoint folders of every kind, in particular the *converted* kind.

A converted folder contains

    config.json           the source checkpoint's own, in either dialect; see `quantized_files` for quantized kernels
    params/               the parameters in canonical layout, as an orbax checkpoint
    carried.safetensors   tensors of the original dialect that Janus never uses, if the source had them
    tokenizer.json, ...   the source's tokenizer and processor files

`orbax.checkpoint.v1.load(folder / "params")` reads the parameters like any other orbax checkpoint. Each chunk has a
checksum, which is verified whenever the chunk is read; folders written by orbax's own savers, and those converted
before checksums were added, are read without.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from janus_jax.config import JanusConfig, dialect_of, original_config, parse_config
from janus_jax.io.messages import one_line
from janus_jax.io.progress import byte_bar
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path
from janus_jax.weights import orbax_layouts, quantized_files, store_arrays
from janus_jax.weights.formats.stored_tensor import Tensor
from janus_jax.weights.formats.torch_files import open_file, weight_file
from janus_jax.weights.mismatch import Problem, summary
from janus_jax.weights.quantize import is_quantized
from janus_jax.weights.torch_names import Path
from janus_jax.weights.torch_weights import (
    Index,
    LazyArray,
    LazyParams,
    abstract_params,
    compare,
    lazy_params,
    place,
    read_now,
    read_raw_config,
    total_bytes,
)

PARAMS, CARRIED = "params", "carried.safetensors"
_LARGE_BYTES = 16 << 20  # larger arrays are written piece by piece
_PIECE_BYTES = 128 << 20  # read, transposed and written at once
_CHUNK_BYTES = 1 << 20  # the least that a reader has to fetch
# Parameters that `load` rearranged for sampling; no checkpoint has them.
_FOR_SAMPLING = re.compile(r"kernel_scale$|\.(qkv|gate_up)_proj\.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder of any kind; only headers have been read."""

    folder: pathlib.Path
    kind: str
    config: JanusConfig
    raw_config: dict[str, Any]
    leaves: LazyParams
    carried: dict[str, Tensor]
    weights: str | None = None  # the form of quantized kernels, one of `quantize.FORMS`


def kind_of(folder: str | pathlib.Path) -> str:
    """'converted', 'original' or 'transformers'; FileNotFoundError or ValueError if `folder` is none of them."""
    folder = as_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a Janus checkpoint there")
    dialect = dialect_of(read_raw_config(folder))
    if has_arrays(folder / PARAMS):
        return "converted"
    if weight_file(folder) is None:
        raise FileNotFoundError(
            f"{folder} has a config.json but no weights; expected {PARAMS}/ (converted), "
            "model.safetensors or pytorch_model.bin (whole or in shards)"
        )
    return dialect


def open_checkpoint(
    folder: str | pathlib.Path, config: JanusConfig | None = None, quantized: bool = False
) -> Checkpoint:
    """Opens a folder of any kind; `config` defaults to the folder's own. Raises as `kind_of` and `read_params`.

    Without `quantized`, a folder of quantized kernels is refused, as one that is no source for anything but `load`.
    """
    folder = as_path(folder)
    kind = kind_of(folder)
    raw = read_raw_config(folder)
    try:
        config = config or parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    weights = quantized_files.form_of(raw, folder, kind)
    if weights and not quantized:
        raise ValueError(
            f"{one_line(folder)} has {weights} weights, which only janus_jax.load reads; "
            "give the checkpoint that it was converted from"
        )
    if kind == "converted":
        carried = open_file(folder / CARRIED) if (folder / CARRIED).is_file() else {}
        wanted = quantized_files.stored_shapes(abstract_params(config), weights)
        leaves = quantized_files.unpacked(array_leaves(folder / PARAMS, wanted, weights), weights)
        return Checkpoint(folder, kind, config, raw, leaves, carried, weights)
    return Checkpoint(folder, kind, config, raw, *lazy_params(folder, config))


def load_params(
    folder: str | pathlib.Path,
    config: JanusConfig | None = None,
    dtype: Any = None,
    shardings: Any = None,
    scan_layers: bool = True,
    as_numpy: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Parameters of a checkpoint folder of any kind as nested dicts of arrays; see `torch_weights.read_params`.

    With `shardings`, each device's slice is read directly onto it.
    """
    leaves = open_checkpoint(folder, config).leaves
    return place(leaves, dtype, shardings, scan_layers, as_numpy, progress)


# ---------------------------------------------------------------- the orbax folder


def saving_context() -> ocp.Context:
    """The orbax settings for saving, so that `array_leaves` can read the result."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False  # weights hardly shrink, and load faster uncompressed
    return context


def save_params(folder: str | pathlib.Path, params: Any) -> None:
    """Writes arrays in canonical (stacked) layout as the orbax checkpoint `folder`; every process of a run calls it.

    A single process writes a checksum with each chunk. Several processes write through orbax, without checksums; to a
    store, each of any number writes what it has, with checksums.

    Raises ValueError if `folder` already exists.
    """
    if is_store(folder):
        store_arrays.write_params(as_path(folder), params)
    elif jax.process_count() == 1:
        flat = traverse_util.flatten_dict(params)
        write_lazy(as_path(folder), {path: _lazy(array) for path, array in flat.items()})
    else:
        _save_by_orbax(as_path(folder), params)


def _lazy(array: Any) -> LazyArray:
    # Slice by slice: an array that was once copied to host memory as a whole keeps that copy.
    return LazyArray(array.shape, np.dtype(array.dtype), lambda index: np.asarray(array[index]))


def _save_by_orbax(folder: pathlib.Path, params: Any) -> None:
    with saving_context():
        ocp.save(folder.absolute(), params)


def save(folder: str | pathlib.Path, config: JanusConfig, params: Any) -> None:
    """Writes a converted folder of `config` and `params`; the caller adds tokenizer files.

    Every process of a run calls it, with numpy arrays that all of them have, or with arrays on all their devices.

    Raises ValueError if the folder already has parameters, or the original dialect cannot express `config`.
    """
    folder = as_path(folder)
    raw = original_config(config)
    save_params(folder / PARAMS, params)
    if jax.process_index() == 0:
        write_json(folder / "config.json", raw)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def has_arrays(folder: pathlib.Path) -> bool:
    """Whether `folder` is an orbax checkpoint that `array_leaves` can read."""
    return orbax_layouts.find(folder) is not None


def array_leaves(
    folder: pathlib.Path, wanted: Mapping[str, Any], weights: str | None = None, beside: str = ""
) -> LazyParams:
    """The arrays of the orbax checkpoint `folder` that `wanted` asks for: nested dicts of objects with a `shape`.

    Any of orbax's savers may have written it; decoder layers may be unstacked, and everything may be under `params`.
    With `weights`, the kernels are quantized, and `wanted` has their dtypes. What is under `beside` is left alone.

    Raises ValueError if the arrays do not match, with all mismatches in one message.
    """
    state = orbax_layouts.find(folder)
    if state is None:
        raise ValueError(f"{one_line(folder)} has no arrays in a layout of orbax's savers")
    wanted = traverse_util.flatten_dict(wanted)
    with orbax_layouts.named(folder):
        store = orbax_layouts.open_store(state)
    for_sampling = [name for name in store.drivers if _FOR_SAMPLING.search(name)]
    if for_sampling and not weights:
        raise ValueError(
            f"{one_line(folder)} has kernels that were fused or quantized for sampling, such as "
            f"{one_line(for_sampling[0])}; save the parameters of janus_jax.load(..., fused=False) without weights="
        )
    top = "params." if store.drivers and all(name.startswith("params.") for name in store.drivers) else ""
    stored = {path: _stored_names(path, leaf.shape, store.drivers, top) for path, leaf in wanted.items()}
    expected = {name: shape for names in stored.values() for name, shape in names.items()}
    with orbax_layouts.named(folder):
        opened = store.open_all([name for name in expected if name in store.drivers])
    found = {name: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype) for name, array in opened.items()}
    exact = {
        name: leaf.dtype for path, leaf in wanted.items()
        if weights and is_quantized("/".join(path)) for name in stored[path]
    }  # fmt: skip
    problems = compare(found, expected, {}, lambda name: False, exact)
    others = [name for name in store.drivers if not beside or not name.startswith(f"{beside}.")]
    problems += [Problem("unexpected", name) for name in sorted(set(others) - expected.keys())]
    if problems:
        raise ValueError(f"{one_line(folder)}: the arrays do not match config.json: {summary(problems)}")
    return {path: _leaf(folder, leaf.shape, [opened[name] for name in stored[path]]) for path, leaf in wanted.items()}


def _stored_names(path: Path, shape: tuple[int, ...], there: Container[str], top: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stored arrays that make up the one of `shape` at `path`: one, or one for each layer."""
    stacked = top + ".".join(path)
    layers = [top + ".".join((path[0], f"layers_{i}", *path[2:])) for i in range(shape[0] if shape else 0)]
    if stacked in there or path[:2] != ("language_model", "layers") or not any(name in there for name in layers):
        return {stacked: shape}
    return dict.fromkeys(layers, shape[1:])


def _leaf(folder: pathlib.Path, shape: tuple[int, ...], arrays: list[ts.TensorStore]) -> LazyArray:
    dtypes = {array.dtype.numpy_dtype for array in arrays}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(index: Index) -> np.ndarray:
        if arrays[0].shape == shape:
            return arrays[0][index].read().result()
        layers = [array[index[1:]].read() for array in arrays[index[0]]]
        return np.stack([layer.result().astype(dtype, copy=False) for layer in layers])

    def named(index: Index) -> np.ndarray:
        with orbax_layouts.named(folder):
            return orbax_layouts.asked(folder, lambda: read(index))

    return LazyArray(shape, dtype, named, late=is_store(folder))


def write_lazy(folder: pathlib.Path, leaves: LazyParams, progress: bool = False) -> None:
    """Writes `leaves` as the orbax checkpoint `folder`, with a few pieces of `_PIECE_BYTES` in memory at a time.

    Orbax needs whole arrays in memory (three gigabytes each for a 7B model), several at once, and writes no checksums.
    So orbax saves a scalar for each array, for its metadata, and tensorstore then replaces them by the arrays, piece
    by piece; in a store likewise, where the arrays are in separate folders.
    """
    if is_store(folder):
        with byte_bar("writing", total_bytes(leaves), progress) as bar:
            store_arrays.write_pieces(folder, leaves, pieces, bar.update)
        return
    scalars = {path: np.zeros((), leaf.dtype) for path, leaf in leaves.items()}
    with byte_bar("writing", total_bytes(leaves), progress) as bar:
        _save_by_orbax(folder, traverse_util.unflatten_dict(scalars))
        state = orbax_layouts.find(folder)
        small = [path for path, leaf in leaves.items() if leaf.num_bytes <= _LARGE_BYTES]
        while small:
            batch, num_bytes = [], 0
            while small and num_bytes < _PIECE_BYTES:
                batch.append(small.pop())
                num_bytes += leaves[batch[-1]].num_bytes
            _write_together(state, {path: leaves[path] for path in batch})
            bar.update(num_bytes)
        for path, leaf in leaves.items():
            if leaf.num_bytes > _LARGE_BYTES:
                _write_in_pieces(state, path, leaf, bar.update)


def _create(state: pathlib.Path, path: Path, leaf: LazyArray, context: ts.Context) -> ts.Future:
    # Uncompressed, as in `saving_context`, and each chunk with a checksum, which every reader verifies.
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return orbax_layouts.create_array(
        state,
        ".".join(path),
        codecs,
        dtype=ts.dtype(leaf.dtype),
        shape=leaf.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk_shape(leaf)),
        context=context,
    )


def _write_together(state: pathlib.Path, leaves: LazyParams) -> None:
    # Written concurrently in one context they share commits, each of which costs more than a small array.
    context = ts.Context()
    stores = {path: _create(state, path, leaf, context) for path, leaf in leaves.items()}
    writing = [stores[path].result().write(read_now(leaf)) for path, leaf in leaves.items()]
    for written in writing:
        written.result()


def _write_in_pieces(state: pathlib.Path, path: Path, leaf: LazyArray, on_bytes: Callable[[int], Any]) -> None:
    store = _create(state, path, leaf, ts.Context()).result()
    writing = None
    for piece in pieces(leaf):
        array = leaf.read(piece)  # while the previous piece is being written
        if writing:
            writing.result()
        writing = store[piece].write(array)
        on_bytes(array.nbytes)
    writing.result()


def chunk_shape(leaf: LazyArray) -> tuple[int, ...]:
    """The shape of the stored chunks of `leaf`: at most `_CHUNK_BYTES`, cut about equally often along every axis.

    Reading a device's slice along any axis then reads little else. Layers never share a chunk, unless the whole array
    fits into one.
    """
    shape = list(leaf.shape)
    cuts = [0] * len(shape)
    if leaf.num_bytes > _CHUNK_BYTES and len(shape) > 2:
        cuts[0] = shape[0].bit_length()
        shape[0] = 1
    while math.prod(shape) * leaf.dtype.itemsize > _CHUNK_BYTES:
        axis = min((a for a in range(len(shape)) if shape[a] > 1), key=lambda a: cuts[a])
        shape[axis] = -(-shape[axis] // 2)
        cuts[axis] += 1
    return tuple(shape)


def pieces(leaf: LazyArray, chunk: tuple[int, ...] | None = None) -> Iterator[Index]:
    """Indices of the pieces that cover `leaf`: whole chunks, each piece not much more than `_PIECE_BYTES`.

    They run over the layers if the array has them, else over its longest axis. `chunk` defaults to `chunk_shape`'s.
    """
    if leaf.num_bytes <= _PIECE_BYTES:
        yield tuple(slice(0, n) for n in leaf.shape)
        return
    chunk = chunk or chunk_shape(leaf)
    axis = 0 if len(chunk) > 2 else leaf.shape.index(max(leaf.shape))
    size = leaf.shape[axis]
    slab_bytes = leaf.num_bytes * chunk[axis] // size
    step = chunk[axis] * max(1, _PIECE_BYTES // slab_bytes)
    for begin in range(0, size, step):
        index = [slice(0, n) for n in leaf.shape]
        index[axis] = slice(begin, min(begin + step, size))
        yield tuple(index)
