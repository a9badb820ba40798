"""Reads the headers of safetensors files, as strictly as the specification, and writes such files.

The specification (huggingface/safetensors): 8 bytes of header size, a JSON object of at most 100 MB with the dtype,
shape and offsets of each name, then the tensors, which cover the rest of the file without gaps or overlaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from janus_jax.io.files import open_regular, parse_json
from janus_jax.io.messages import one_line
from janus_jax.io.stores import size_of
from janus_jax.io.whole.files import appearing
from janus_jax.weights.formats.stored_tensor import Tensor, row_major

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the specification's limit
_MAX_TENSORS = 100_000
_MAX_AXES, _MAX_SIZE = 32, 1 << 62

_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"{kind}{bits}": f"{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
}
_DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of the file `path`, by name; ValueError if it violates the specification."""
    with open_regular(path) as file:
        try:
            return _read_header(path, file, size_of(file))
        except ValueError as error:
            raise ValueError(
                f"{one_line(path)} is damaged or not a safetensors file ({one_line(error, 500)}); download it again"
            ) from None


def _read_header(path: pathlib.Path, file, size: int) -> dict[str, Tensor]:
    start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"it has only {size} bytes")
    (header_size,) = struct.unpack("<Q", start)
    if header_size > _MAX_HEADER:
        raise ValueError(f"its header would have {header_size:,} bytes, the format allows {_MAX_HEADER:,}")
    if 8 + header_size > size:
        raise ValueError("its header is truncated")
    raw = file.read(header_size)
    # Bounds the memory that parsing the JSON takes; real headers stay far below.
    if raw.count(b"{") > 2 * _MAX_TENSORS or raw.count(b"[") > 2 * _MAX_TENSORS or raw.count(b",") > 2_000_000:
        raise ValueError(f"its header is not a list of at most {_MAX_TENSORS:,} tensors")
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    header = parse_json(raw.decode("utf-8"), "its header", unique_names=True)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    places = {name: _entry(name, entry) for name, entry in header.items()}
    # The tensors must follow each other without gaps, from the first byte to the last.
    end = 0
    for name, (_, _, begin, its_end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise ValueError(f"{one_line(name)} begins at byte {begin} of the tensors instead of {end}")
        end = its_end
    if 8 + header_size + end != size:
        raise ValueError(f"it has {size:,} bytes, its header describes {8 + header_size + end:,}")
    return {
        name: Tensor(path, dtype, shape, row_major(shape), 8 + header_size + begin)
        for name, (dtype, shape, begin, _) in places.items()
    }


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of one tensor."""
    name = one_line(name)
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has the unknown dtype {one_line(entry['dtype'], 40)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in numbers):
            raise ValueError(f"the shape or the offsets of {name} are not integers of at least 0")
    if len(shape) > _MAX_AXES or len(offsets) != 2:
        raise ValueError(f"{name} has {len(shape)} axes and {len(offsets)} offsets")
    dtype, (begin, end) = _DTYPES[entry["dtype"]], offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the offsets of {name} do not match its shape")
    return dtype, tuple(shape), begin, end


# ---------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written: `read()` returns [*shape] of `dtype` when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: pathlib.Path, tensors: Iterable[TensorToWrite], on_bytes: Callable[[int], Any] = lambda n: None
):
    """Writes one safetensors file, a tensor at a time; `on_bytes` is called with each tensor's size once written.

    For a store it is first written to the folder for temporary files.
    """
    tensors = list(tensors)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with appearing(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                found, wanted = (f"{a.dtype} {list(a.shape)}" for a in (array, tensor))
                raise ValueError(f"{tensor.name} must be {wanted}, got {found}")
            file.write(array.reshape(-1).view(np.uint8).data)
            on_bytes(tensor.num_bytes)


def write_sharded(
    folder: pathlib.Path,
    tensors: Sequence[TensorToWrite],
    max_shard_bytes: int,
    on_bytes: Callable[[int], Any] = lambda n: None,
):
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (or of one tensor) and their index."""
    shards: list[list[TensorToWrite]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    if len(shards) == 1:
        write_safetensors(folder / SAFETENSORS, tensors, on_bytes)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, on_bytes)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": weight_map}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
