"""Torch checkpoint files, read and written without torch: safetensors and zipped `.bin` state dicts.

Opening reads headers only. A tensor's bytes are mapped when its `view()` is asked for and unmapped when the array goes,
so that a process holds a few tensors at a time however large the checkpoint is.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Where a folder has several, the first is read, as transformers does.
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)

_SAFETENSORS_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"{kind}{bits}": f"{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
}
_SAFETENSORS_DTYPES = {name: np.dtype(dtype) for name, dtype in _SAFETENSORS_DTYPES.items()}
_STORAGE_DTYPES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor inside a file: `strides` count elements, `offset` bytes from the file's start."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only array over mapped pages of the file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        num_bytes = _extent(self.shape, self.strides) * self.dtype.itemsize
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as file:
            mapped = mmap.mmap(file.fileno(), self.offset - start + num_bytes, access=mmap.ACCESS_READ, offset=start)
        if hasattr(mmap, "MADV_WILLNEED"):  # transposing reads would otherwise fault in one page after another
            mapped.madvise(mmap.MADV_WILLNEED)
        flat = np.frombuffer(mapped, self.dtype, num_bytes // self.dtype.itemsize, self.offset - start)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to past the last one of a strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def weight_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of `folder` that its weights are read from, None where there is none."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def open_tensors(folder: str | pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name, from `model.safetensors` or `pytorch_model.bin`, whole or in shards.

    Raises FileNotFoundError where a file is absent, ValueError where one is damaged or a name stands in two shards.
    """
    folder = pathlib.Path(folder)
    path = weight_file(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    shards = _shards(path) if path.suffix == ".json" else [path]
    tensors: dict[str, Tensor] = {}
    duplicates = []
    for shard in shards:
        opened = open_file(shard)
        duplicates += [f"{name} ({tensors[name].file.name}, {shard.name})" for name in opened if name in tensors]
        tensors |= opened
    if duplicates:
        raise ValueError(f"{folder}: tensors that stand in two shards: {', '.join(duplicates)}")
    return tensors


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        is_plain = all(pathlib.Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({type(error).__name__}: {error})") from None
    if not is_plain:
        raise ValueError(f"{index} names a shard outside its own folder")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(absent)}; download them again")
    return [index.parent / name for name in names]


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of one file, by name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a file of tensors there")
    return _open_pickle(path) if path.suffix in (".bin", ".pt", ".pth") else _open_safetensors(path)


# ---------------------------------------------------------------- safetensors


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if 8 + header_size > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        return {name: _safetensors_entry(path, entry, 8 + header_size, size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); download it again") from None


def _safetensors_entry(path: pathlib.Path, entry: dict[str, Any], data_start: int, file_size: int) -> Tensor:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's offsets do not fit its shape")
    if data_start + end > file_size:
        raise ValueError(f"it ends at byte {file_size}, its data at {data_start + end}")
    return Tensor(path, dtype, shape, _row_major(shape), data_start + begin)


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written: `read()` gives [*shape] of `dtype` when its turn comes."""

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
    """Writes one safetensors file, a tensor at a time; `on_bytes` hears of every tensor's bytes once written."""
    tensors = list(tensors)
    names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                found, wanted = (f"{a.dtype} {list(a.shape)}" for a in (array, tensor))
                raise ValueError(f"{tensor.name} came as {found}, not {wanted}")
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


# ---------------------------------------------------------------- .bin


@dataclasses.dataclass(frozen=True)
class _PickledTensor:
    storage: tuple[np.dtype, str]  # its dtype, and its name inside the archive
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StateDictUnpickler(pickle.Unpickler):
    """Unpickles a dict of tensors and nothing else: every other class or function it is asked for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(self, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        _, storage, key, _, _ = pid
        return np.dtype(_STORAGE_DTYPES[storage]), key

    def _rebuild_tensor_v2(self, storage, offset, shape, strides, *_) -> _PickledTensor:
        return _PickledTensor(storage, offset, tuple(shape), tuple(strides))

    def _rebuild_parameter(self, data, *_) -> _PickledTensor:
        return data


def _open_pickle(path: pathlib.Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is cut off, or in the format from before torch 1.6: download it again, or save it with newer torch"
        )
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in infos and archive.read(infos["byteorder"]) != b"little":
                raise ValueError("its byte order is not little-endian")
            with archive.open(infos["data.pkl"]) as pickled:
                state = _StateDictUnpickler(pickled).load()
            if isinstance(state, dict) and isinstance(state.get("model"), dict):
                state = state["model"]  # a training checkpoint such as LlamaGen's
            if not isinstance(state, dict) or not all(isinstance(t, _PickledTensor) for t in state.values()):
                raise ValueError("it holds more than tensors")
            return {str(name): _pickle_entry(path, file, infos, tensor) for name, tensor in state.items()}
    except Exception as error:  # a pickle may fail in any way
        reason = "" if isinstance(error, (ValueError, pickle.PickleError)) else f"{type(error).__name__}: "
        raise ValueError(f"{path} is not a plain torch state dict ({reason}{error}); nothing in it was run") from None


def _pickle_entry(path: pathlib.Path, file, infos: dict[str, zipfile.ZipInfo], tensor: _PickledTensor) -> Tensor:
    dtype, key = tensor.storage
    info = infos[f"data/{key}"]
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its tensors are compressed")
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
        raise ValueError("a tensor has a negative size")
    if (tensor.offset + _extent(tensor.shape, tensor.strides)) * dtype.itemsize > info.file_size:
        raise ValueError("a tensor ends after its storage")
    # The central directory says where the local header is; that header's own length varies.
    file.seek(info.header_offset + 26)
    name_size, extra_size = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name_size + extra_size
    return Tensor(path, dtype, tensor.shape, tensor.strides, start + tensor.offset * dtype.itemsize)
