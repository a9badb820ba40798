"""Checkpoint folders of every kind, and the *converted* kind in particular.

A converted folder holds

    config.json           the source checkpoint's own, in whichever dialect that was
    params/               the parameters in canonical layout, as orbax writes and reads them
    carried.safetensors   tensors of the original dialect that Janus never uses, where they were read
    tokenizer.json, ...   the source's tokenizer and processor files

`orbax.checkpoint.v1.load(folder / "params")` reads the parameters like any other orbax checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from janus_jax.config import JanusConfig, dialect_of, original_config, parse_config
from janus_jax.progress import byte_bar
from janus_jax.stored_tensor import Tensor
from janus_jax.torch_files import open_file, weight_file
from janus_jax.torch_names import Path
from janus_jax.torch_weights import (
    DTYPES,
    Index,
    LazyArray,
    LazyParams,
    abstract_params,
    lazy_params,
    place,
    read_now,
    read_raw_config,
    total_bytes,
)

PARAMS, CARRIED = "params", "carried.safetensors"
_LARGE_BYTES = 16 << 20  # what is written piece by piece
_PIECE_BYTES = 128 << 20  # what is read, transposed and written at once
_CHUNK_BYTES = 1 << 20  # what a reader has to fetch whole


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder of any kind; nothing but headers has been read."""

    folder: pathlib.Path
    kind: str
    config: JanusConfig
    raw_config: dict[str, Any]
    leaves: LazyParams
    carried: dict[str, Tensor]


def kind_of(folder: str | pathlib.Path) -> str:
    """'converted', 'original' or 'transformers'; FileNotFoundError or ValueError where `folder` is none of them."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected a Janus checkpoint there")
    dialect = dialect_of(read_raw_config(folder))
    if _state(folder / PARAMS) is not None:
        return "converted"
    if weight_file(folder) is None:
        raise FileNotFoundError(
            f"{folder} holds a config.json but no weights: expected {PARAMS}/ (converted), "
            "model.safetensors or pytorch_model.bin (whole or in shards)"
        )
    return dialect


def open_checkpoint(folder: str | pathlib.Path, config: JanusConfig | None = None) -> Checkpoint:
    """Opens a folder of any kind; `config` None means the folder's own. Errors as in `kind_of` and `read_params`."""
    folder = pathlib.Path(folder)
    kind = kind_of(folder)
    raw = read_raw_config(folder)
    try:
        config = config or parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if kind == "converted":
        carried = open_file(folder / CARRIED) if (folder / CARRIED).is_file() else {}
        return Checkpoint(folder, kind, config, raw, array_leaves(folder / PARAMS, abstract_params(config)), carried)
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

    With `shardings` every device's part is read straight onto it.
    """
    leaves = open_checkpoint(folder, config).leaves
    return place(leaves, dtype, shardings, scan_layers, as_numpy, progress)


# ---------------------------------------------------------------- the orbax folder


def saving_context() -> ocp.Context:
    """Orbax's settings under which `array_leaves` reads what is saved."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False  # weights hardly shrink, and load faster so
    return context


def save_params(folder: str | pathlib.Path, params: Any) -> None:
    """Writes arrays in canonical (stacked) layout as the orbax checkpoint `folder`; every process of a run calls it.

    Raises ValueError where `folder` exists already.
    """
    with saving_context():
        ocp.save(pathlib.Path(folder).absolute(), params)


def save(folder: str | pathlib.Path, config: JanusConfig, params: Any) -> None:
    """Writes a converted folder of `config` and `params`; adding tokenizer files is the caller's affair.

    Every process of a run calls it, with numpy arrays that all of them have, or with arrays of all their devices.

    Raises ValueError where the folder has parameters already, or where the original dialect cannot say `config`.
    """
    folder = pathlib.Path(folder)
    raw = original_config(config)
    save_params(folder / PARAMS, params)
    if jax.process_index() == 0:
        write_json(folder / "config.json", raw)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_arrays(folder: pathlib.Path) -> bool:
    """Whether `folder` is an orbax checkpoint that `array_leaves` reads."""
    return _state(folder) is not None


def _state(params: pathlib.Path) -> pathlib.Path | None:
    """The folder inside the orbax checkpoint `params` that holds the arrays, None where there is none."""
    # The names that orbax has had for it; it is the folder itself where several trees are saved together.
    folders = (params / name for name in ("state", "pytree", "default", ""))
    return next((folder for folder in folders if (folder / "manifest.ocdbt").is_file()), None)


def _open_array(state: pathlib.Path, path: Iterable[str], **options: Any) -> ts.TensorStore:
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{state.absolute()}/"},
        "path": f"{'.'.join(path)}/",
    }
    # An absent chunk is a lost one, to orbax as to us, so that chunks of zeros have to be there too.
    policy = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
    spec = {"driver": "zarr3", "kvstore": kvstore, **policy, **options.pop("spec", {})}
    return ts.open(spec, **options).result()


def array_leaves(folder: pathlib.Path, wanted: Mapping[str, Any]) -> LazyParams:
    """The arrays of the orbax checkpoint `folder` that `wanted`, nested dicts of things with a `shape`, asks for.

    Raises ValueError where they are others, all of them in one message.
    """
    state = _state(folder)
    wanted = traverse_util.flatten_dict(wanted)
    suffix = b"/zarr.json"
    with _named(folder):
        kvstore = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{state.absolute()}/"}})
        found = {key.removesuffix(suffix).decode() for key in kvstore.result().list().result() if key.endswith(suffix)}
    names = {".".join(path): path for path in wanted}
    problems = [f"missing: {name} {list(wanted[names[name]].shape)}" for name in names if name not in found]
    problems += [f"unexpected: {name}" for name in sorted(found - names.keys())]
    leaves: LazyParams = {}
    for name, path in names.items():
        if name not in found:
            continue
        with _named(folder):
            store = _open_array(state, path)
        dtype = store.dtype.numpy_dtype
        if store.shape != wanted[path].shape:
            problems.append(f"misshapen: {name} is {list(store.shape)}, expected {list(wanted[path].shape)}")
        elif dtype not in DTYPES.values():
            problems.append(f"unsupported: {name} is {dtype}, expected {', '.join(DTYPES)}")
        leaves[path] = LazyArray(store.shape, dtype, functools.partial(_read_array, folder, store))
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{folder}: the arrays do not fit config.json:\n  {listed}")
    return leaves


def _read_array(folder: pathlib.Path, store: ts.TensorStore, index: Index) -> np.ndarray:
    with _named(folder):
        return store[index].read().result()


@contextlib.contextmanager
def _named(params: pathlib.Path) -> Iterator[None]:
    """Says of tensorstore's errors what they mean."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{params} is damaged ({error}); convert the checkpoint again") from None


def write_lazy(folder: pathlib.Path, leaves: LazyParams, progress: bool = False) -> None:
    """Writes `leaves` as the orbax checkpoint `folder`, holding a few pieces of `_PIECE_BYTES` at a time.

    Orbax wants whole arrays in memory, three gigabytes each for a 7B model, and holds several. So of the large ones it
    is given a scalar each, for its metadata, and tensorstore then puts the arrays in their places, piece by piece.
    """
    large = {path: leaf for path, leaf in leaves.items() if leaf.num_bytes > _LARGE_BYTES}
    tree = {path: np.zeros((), leaf.dtype) for path, leaf in large.items()}
    tree |= {path: read_now(leaf) for path, leaf in leaves.items() if path not in large}
    with byte_bar("writing", total_bytes(leaves), progress) as bar:
        save_params(folder, traverse_util.unflatten_dict(tree))
        bar.update(total_bytes(leaves) - total_bytes(large))
        tree.clear()
        for path, leaf in large.items():
            _write_array(_state(folder), path, leaf, bar.update)


def _write_array(state: pathlib.Path, path: Path, leaf: LazyArray, on_bytes: Callable[[int], Any]) -> None:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]  # uncompressed, as `save_params` leaves them
    store = _open_array(
        state,
        path,
        spec={"metadata": {"codecs": codecs}},
        create=True,
        delete_existing=True,
        dtype=ts.dtype(leaf.dtype),
        shape=leaf.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk_shape(leaf)),
    )
    writing = None
    for piece in pieces(leaf):
        array = leaf.read(piece)  # while the last piece is being written
        if writing:
            writing.result()
        writing = store[piece].write(array)
        on_bytes(array.nbytes)
    writing.result()


def chunk_shape(leaf: LazyArray) -> tuple[int, ...]:
    """The stored chunks of `leaf`: of `_CHUNK_BYTES` at most, cut in as many parts along one axis as along another.

    A device's slice along any axis then takes little more than itself to read. Layers never share a chunk, unless the
    whole array fits into one.
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


def pieces(leaf: LazyArray) -> Iterator[Index]:
    """Indices that cover `leaf`: whole chunks, and not much more than `_PIECE_BYTES` at a time.

    They run over the layers, where an array has them, and else over its longest axis.
    """
    chunk = chunk_shape(leaf)
    axis = 0 if len(chunk) > 2 else leaf.shape.index(max(leaf.shape))
    size = leaf.shape[axis]
    slab_bytes = leaf.num_bytes * chunk[axis] // size
    step = chunk[axis] * max(1, _PIECE_BYTES // slab_bytes)
    for begin in range(0, size, step):
        index = [slice(0, n) for n in leaf.shape]
        index[axis] = slice(begin, min(begin + step, size))
        yield tuple(index)
