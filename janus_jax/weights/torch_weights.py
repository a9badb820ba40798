"""Parameters of a torch checkpoint folder, in either dialect, read and written through the table of `torch_names`.

Nothing is read before it is needed: a checkpoint becomes a flat dict of `LazyArray`s, which `place` turns into arrays
on devices, `checkpoint.write_lazy` into an orbax checkpoint, and `tensors_to_write` into torch tensors again.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from janus_jax.config import JanusConfig, dialect_of
from janus_jax.io.ahead import in_order
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.progress import byte_bar
from janus_jax.io.stores import as_path
from janus_jax.weights.formats.safetensors_files import TensorToWrite
from janus_jax.weights.formats.stored_tensor import Tensor
from janus_jax.weights.formats.torch_files import open_tensors
from janus_jax.weights.mismatch import Problem, summary
from janus_jax.weights.torch_names import Path, Slot, carried_shapes, is_harmless, slots

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
_LAYERS: Path = ("language_model", "layers")
_LM_HEAD: Path = ("language_model", "lm_head", "kernel")
_EMBED_TOKENS: Path = ("language_model", "embed_tokens", "embedding")

_BLOCK_BYTES = 64 << 20
_SMALL_BYTES, _AT_ONCE = 16 << 20, 16  # arrays up to this size are read from a store so many at once

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array still in its file: `read(index)` gives the region under one slice per axis, maybe a view of the file.

    Attributes:
      late: whether it is in a store, which answers late, and many requests at once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    late: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: np.dtype, name: str = "array") -> LazyArray:
        """The same, cast when read; ValueError if a finite value would overflow float16."""
        if dtype == self.dtype:
            return self

        def read(index: Index) -> np.ndarray:
            source = self.read(index)
            with np.errstate(over="ignore"):
                result = source.astype(dtype)
            if dtype == np.float16 and np.any(np.isinf(result) & np.isfinite(source)):
                raise ValueError(f"{name} has values beyond float16's range; use bfloat16 or float32 instead")
            return result

        return dataclasses.replace(self, dtype=dtype, read=read)


LazyParams = dict[Path, LazyArray]


def parse_dtype(dtype: Any) -> np.dtype | None:
    """The numpy dtype of 'bfloat16', 'float16', 'float32' or of an equal dtype object; None stays None."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"parameters of dtype {name} are not supported; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def abstract_params(config: JanusConfig, scan_layers: bool = True, dtype: Any = None) -> dict[str, Any]:
    """The parameter tree of `config` as nested dicts of `jax.ShapeDtypeStruct`, in `dtype` (None: the config's own).

    With `scan_layers` the decoder's layers are stacked under `layers`, else each is separate under `layers_<i>`.
    """
    dtype = parse_dtype(dtype or config.dtype)
    leaves: LazyParams = {}
    for path, filled in _by_path(slots(config, "original")).items():
        leaves[path] = LazyArray(_stacked_shape(filled), dtype, lambda index: None)
    leaves = leaves if scan_layers else unstack(leaves)
    return traverse_util.unflatten_dict({p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in leaves.items()})


def _by_path(all_slots: list[Slot]) -> dict[Path, list[Slot]]:
    by_path: dict[Path, list[Slot]] = {}
    for slot in all_slots:
        by_path.setdefault(slot.path, []).append(slot)
    return by_path


def _stacked_shape(filled: list[Slot]) -> tuple[int, ...]:
    return filled[0].shape if filled[0].layer is None else (len(filled), *filled[0].shape)


# ---------------------------------------------------------------- reading


def read_params(
    folder: str | pathlib.Path,
    config: JanusConfig,
    dtype: Any = None,
    shardings: Any = None,
    scan_layers: bool = True,
    as_numpy: bool = False,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters of a torch checkpoint folder in either dialect, and the tensors that are only carried along.

    Args:
        folder: has config.json and safetensors or `.bin` weights.
        config: the configuration in the folder's config.json (`config.read_config`).
        dtype: dtype to cast to; None keeps the checkpoint's own.
        shardings: nested dict of `jax.sharding.Sharding` in the parameters' structure, or one for all: each device's
            slice is read directly onto it. None puts whole arrays onto the default device.
        scan_layers: stacked decoder layers, or one subtree for each.
        as_numpy: leave the arrays in host memory as numpy arrays.
        progress: show a bar on stderr.

    Returns:
        (nested dict of arrays, {name in the original dialect: array}).

    Raises FileNotFoundError for missing files and ValueError for damaged ones, and for tensors that are missing,
    unexpected, misshapen or duplicated, all in one message.
    """
    leaves, carried = lazy_params(folder, config)
    params = place(leaves, dtype, shardings, scan_layers, as_numpy, progress)
    return params, {name: np.array(tensor.view()) for name, tensor in carried.items()}


def read_raw_config(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json of `folder`; FileNotFoundError if it is missing, ValueError if it is not JSON."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{one_line(path)} does not exist; expected the config.json of a Janus checkpoint there"
        )
    return read_json_object(path)


def lazy_params(folder: str | pathlib.Path, config: JanusConfig) -> tuple[LazyParams, dict[str, Tensor]]:
    """Like `read_params`, with everything still in its file."""
    folder = as_path(folder)
    raw = read_raw_config(folder)
    dialect = dialect_of(raw)
    tensors = open_tensors(folder, _say)
    by_path = _by_path(slots(config, dialect))
    if by_path[_LM_HEAD][0].name not in tensors and _is_tied(raw, dialect):
        # The head's slot needs [vocabulary, width], the shape of the embedding.
        by_path[_LM_HEAD] = [dataclasses.replace(by_path[_LM_HEAD][0], name=by_path[_EMBED_TOKENS][0].name)]
    expected = {slot.name: slot.tensor_shape for filled in by_path.values() for slot in filled}
    carried = carried_shapes(config) if dialect == "original" else {}

    if problems := compare(tensors, expected, carried, is_harmless):
        raise ValueError(
            f"{one_line(folder)}: the tensors do not match config.json ({dialect} dialect): {summary(problems)}"
        )

    leaves = leaves_of([slot for filled in by_path.values() for slot in filled], tensors)
    return leaves, {name: tensors[name] for name in carried if name in tensors}


def _say(text: str):
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def compare(
    found: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    carried: Mapping[str, tuple[int, ...]],
    is_harmless: Callable[[str], bool],
    exact: Mapping[str, np.dtype] | None = None,
) -> list[Problem]:
    """Mismatches between the arrays that were `found` (objects with a shape and a dtype) and those that are expected.

    Args:
      expected: shapes, by name, of arrays that must exist, in a dtype of `DTYPES`.
      carried: shapes, by name, of arrays that may exist.
      is_harmless: whether an array of this name may exist in any shape.
      exact: dtypes, by name, of those that must have another one.
    """
    exact = exact or {}
    problems = [Problem("missing", name, str(list(shape))) for name, shape in expected.items() if name not in found]
    for name, array in found.items():
        wanted, shape = expected.get(name, carried.get(name)), one_line(list(array.shape), 80)
        if wanted is None:
            if not is_harmless(name):
                problems.append(Problem("unexpected", name, shape))
        elif tuple(array.shape) != wanted:
            problems.append(Problem("misshapen", name, f"is {shape}, expected {list(wanted)}"))
        elif name in exact and array.dtype != exact[name]:
            problems.append(Problem("unsupported", name, f"is {array.dtype}, expected {exact[name]}"))
        elif name in expected and name not in exact and array.dtype not in DTYPES.values():
            problems.append(Problem("unsupported", name, f"is {array.dtype}, expected {', '.join(DTYPES)}"))
    return problems


def _is_tied(raw: Mapping[str, Any], dialect: str) -> bool:
    """Whether config.json ties the head to the embedding; the two libraries' defaults for a missing key differ."""
    if dialect == "original":
        block = raw.get("language_config")
        return isinstance(block, dict) and bool(block.get("tie_word_embeddings", False))
    return bool(raw.get("tie_word_embeddings", True))


def leaves_of(filled: list[Slot], tensors: dict[str, Tensor]) -> LazyParams:
    """The parameters that `tensors` fill, by the slots' names."""
    return {path: _leaf(own, tensors) for path, own in _by_path(filled).items()}


def _leaf(filled: list[Slot], tensors: dict[str, Tensor]) -> LazyArray:
    shape = _stacked_shape(filled)
    # A float32 layer must not lose precision to bfloat16 neighbors.
    dtypes = {tensors[slot.name].dtype for slot in filled}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read_slot(slot: Slot, index: Index) -> np.ndarray:
        rows = slot.torch_shape[0]
        # When several processes each read a share of a file, none should read all of it to verify its checksum.
        section = tensors[slot.name].view(verify=jax.process_count() == 1)[
            slot.section[0] * rows : (slot.section[0] + 1) * rows
        ]
        return slot.from_torch(section, index).astype(dtype, copy=False)

    def read(index: Index) -> np.ndarray:
        if filled[0].layer is None:
            return read_slot(filled[0], index)
        layers = [read_slot(slot, index[1:]) for slot in filled[index[0]]]
        return layers[0][None] if len(layers) == 1 else np.stack(layers)

    return LazyArray(shape, dtype, read)


def unstack(leaves: LazyParams) -> LazyParams:
    """Decoder leaves [L, ...] under `layers` -> leaves [...] under `layers_0`, `layers_1`, ...; others unchanged."""

    def layer(leaf: LazyArray, i: int) -> LazyArray:
        return LazyArray(leaf.shape[1:], leaf.dtype, lambda index: leaf.read((slice(i, i + 1), *index))[0])

    result: LazyParams = {}
    for path, leaf in leaves.items():
        if path[: len(_LAYERS)] != _LAYERS:
            result[path] = leaf
            continue
        for i in range(leaf.shape[0]):
            result[(_LAYERS[0], f"{_LAYERS[1]}_{i}", *path[len(_LAYERS) :])] = layer(leaf, i)
    return result


def place(
    leaves: LazyParams,
    dtype: Any = None,
    shardings: Any = None,
    scan_layers: bool = True,
    as_numpy: bool = False,
    progress: bool = False,
    made: Callable[[str, jax.Array], dict[str, jax.Array]] | None = None,
) -> dict[str, Any]:
    """Reads lazy leaves into arrays; the arguments and the result are those of `read_params`.

    `made(path, array)` is called as soon as each array is read, and returns what replaces it: several arrays by path,
    such as int8 and scales, or the array itself.
    """
    dtype = parse_dtype(dtype)
    leaves = leaves if scan_layers else unstack(leaves)
    spread = None
    if isinstance(shardings, Mapping):
        spread = traverse_util.flatten_dict(shardings)
        if spread.keys() != leaves.keys():
            wrong = sorted("/".join(path) for path in spread.keys() ^ leaves.keys())
            raise ValueError(f"shardings must have the parameters' structure; they differ in {', '.join(wrong)}")
    elif shardings is not None:
        spread = dict.fromkeys(leaves, shardings)

    arrays = {}
    with byte_bar("loading", total_bytes(leaves), progress) as bar, ThreadPoolExecutor(_AT_ONCE) as pool:

        def read(path: Path) -> Any:
            cast = leaves[path].astype(dtype or leaves[path].dtype, "/".join(path))
            if spread and not as_numpy:
                return _read_sharded(cast, spread[path])
            if as_numpy:
                return read_now(cast)
            return jax.device_put(read_now(cast))  # of which nothing else holds the copy on the host

        def early(path: Path) -> bool:
            return leaves[path].late and leaves[path].num_bytes <= _SMALL_BYTES

        for path, array in in_order(leaves, read, pool, 2 * _AT_ONCE, early):
            leaf, arrays[path] = leaves[path], array
            if made is not None:
                name = "/".join(path)
                arrays |= {tuple(key.split("/")): x for key, x in made(name, arrays.pop(path)).items()}
            bar.update(leaf.num_bytes)
    return traverse_util.unflatten_dict(arrays)


def _read_sharded(leaf: LazyArray, sharding: jax.sharding.Sharding) -> jax.Array:
    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def shard(index: Index) -> np.ndarray:
        # Devices with copies of the same shard ask for it one by one.
        key = tuple(axis.indices(size) for axis, size in zip(index, leaf.shape, strict=True))
        if key not in read:
            read[key] = read_now(leaf, index)
        return read[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def read_now(leaf: LazyArray, index: Index | None = None) -> np.ndarray:
    """A row-major copy of the region under `index` (None: all), read in blocks so that nothing is held twice."""
    index = (slice(None),) * len(leaf.shape) if index is None else index
    ranges = [range(*axis.indices(size)) for axis, size in zip(index, leaf.shape, strict=True)]
    result = np.empty([len(r) for r in ranges], leaf.dtype)
    rows = max(1, int(_BLOCK_BYTES / max(1, result[:1].nbytes)))
    for begin in range(0, len(result), rows):
        end = min(begin + rows, len(result))
        block = slice(ranges[0].start + begin, ranges[0].start + end)
        result[begin:end] = leaf.read((block, *index[1:]))
    return result


def total_bytes(leaves: LazyParams) -> int:
    """The size of all `leaves` together."""
    return sum(leaf.num_bytes for leaf in leaves.values())


# ---------------------------------------------------------------- writing


def tensors_to_write(
    leaves: LazyParams, carried: Mapping[str, Tensor], config: JanusConfig, dialect: str
) -> list[TensorToWrite]:
    """The torch tensors of `dialect` for `leaves`, in the order of the table, still to be read.

    The original dialect's unused tensors come from `carried`, or are zeros if missing there.
    """
    tensors = tensors_of(slots(config, dialect), leaves)
    for name, shape in carried_shapes(config).items() if dialect == "original" else ():
        if name in carried:
            tensors.append(TensorToWrite(name, shape, carried[name].dtype, carried[name].view))
        else:
            dtype = parse_dtype(config.dtype)
            tensors.append(TensorToWrite(name, shape, dtype, lambda shape=shape, dtype=dtype: np.zeros(shape, dtype)))
    return tensors


def tensors_of(filled: list[Slot], leaves: LazyParams) -> list[TensorToWrite]:
    """The torch tensors that `leaves` fill, by the slots' names."""
    by_name: dict[str, list[Slot]] = collections.defaultdict(list)
    for slot in filled:
        by_name[slot.name].append(slot)
    return [_tensor_to_write(name, own, leaves) for name, own in by_name.items()]


def _tensor_to_write(name: str, filled: list[Slot], leaves: LazyParams) -> TensorToWrite:
    dtypes = {leaves[slot.path].dtype for slot in filled}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read_slot(slot: Slot) -> np.ndarray:
        whole = (slice(None),) * len(slot.shape)
        if slot.layer is None:
            return slot.to_torch(leaves[slot.path].read(whole))
        return slot.to_torch(leaves[slot.path].read((slice(slot.layer, slot.layer + 1), *whole))[0])

    def read() -> np.ndarray:
        sections = [read_slot(slot) for slot in filled]
        return (sections[0] if len(sections) == 1 else np.concatenate(sections)).astype(dtype, copy=False)

    return TensorToWrite(name, filled[0].tensor_shape, dtype, read)
