"""Converts torch checkpoints to converted folders and back, a few tensors at a time.

`convert/from_torch.py` and `convert/to_torch.py` are its command lines.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from janus_jax.config import dialect_of, original_config, transformers_config
from janus_jax.hub import resolve
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.progress import byte_bar
from janus_jax.io.stores import copy_file
from janus_jax.io.whole.folders import destination, staged
from janus_jax.processing.processor_files import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    copy_files,
    token_ids,
    write_processor_files,
)
from janus_jax.weights import quantized_files
from janus_jax.weights.adapters.attach import merged_leaves
from janus_jax.weights.adapters.peft_files import read_adapter
from janus_jax.weights.checkpoint import (
    CARRIED,
    PARAMS,
    Checkpoint,
    has_arrays,
    open_checkpoint,
    pieces,
    write_json,
    write_lazy,
)
from janus_jax.weights.formats.safetensors_files import TensorToWrite, write_safetensors, write_sharded
from janus_jax.weights.torch_names import DIALECTS
from janus_jax.weights.torch_weights import LazyArray, LazyParams, parse_dtype, tensors_to_write, total_bytes

# What folders converted here contained before they were marked.
_UNMARKED = frozenset({"config.json", PARAMS, CARRIED, *TOKENIZER_FILES, *PROCESSOR_FILES})
_PLACEHOLDER, _USUAL_PLACEHOLDER_ID = "<image_placeholder>", 100581


def from_torch(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    dtype: Any = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    note: Callable[[str], Any] = print,
    weights: str | None = None,
) -> None:
    """Converts the torch checkpoint folder `src`, of either dialect, to the folder `out`, which may be in a store.

    Args:
        dtype: dtype to cast the parameters to; None keeps theirs.
        weights: 'int8' or 'int4' quantizes the decoder's and the heads' kernels as `load` does, see `quantize`.
        verify: compare the result with the source, or with what its kernels are quantized to, bit for bit.
        overwrite: replace `out` if it is a folder that was converted or exported here.
        progress: show bars on stderr.
        note: called with a sentence for each leftover of a killed conversion that was removed next to `out`.

    Raises OSError and ValueError; `out` is then unchanged.
    """
    source = open_checkpoint(resolve(src))
    if source.kind == "converted":
        raise ValueError(f"{source.folder} is already converted")
    dtype = parse_dtype(dtype)
    leaves = {p: leaf.astype(dtype or leaf.dtype, "/".join(p)) for p, leaf in source.leaves.items()}
    raw = source.raw_config if dtype is None else _with_dtype(source.raw_config, dtype.name)
    if weights is not None:
        raw = quantized_files.marked(raw, weights)
        leaves = quantized_files.packed(leaves, weights)
    num_bytes = total_bytes(leaves) + sum(_carried(source, name, dtype).num_bytes for name in source.carried)
    with _staged(source, out, num_bytes, overwrite=overwrite, note=note) as folder:
        write_lazy(folder / PARAMS, leaves, progress)
        if source.carried:
            write_safetensors(folder / CARRIED, [_carried(source, name, dtype) for name in source.carried])
        copy_files(source.folder, folder, TOKENIZER_FILES + PROCESSOR_FILES)
        if raw is source.raw_config:
            copy_file(source.folder / "config.json", folder / "config.json")
        else:
            write_json(folder / "config.json", raw)
        if verify:
            written = open_checkpoint(folder, source.config, quantized=True)
            _verify(leaves, quantized_files.packed_as_stored(written.leaves), progress)


def to_torch(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    dialect: str,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
    note: Callable[[str], Any] = print,
    adapter: str | pathlib.Path | None = None,
) -> None:
    """Writes the checkpoint folder `src`, of any kind, as a torch checkpoint of `dialect` into the folder `out`, which
    may be in a store.

    Args:
        dialect: 'original' or 'transformers'.
        max_shard_size: bytes, or a string like '5GB'; a larger checkpoint becomes several safetensors files and an
            index.
        overwrite: replace `out` if it is a folder that was converted or exported here.
        progress: show a bar on stderr.
        note: called with a sentence for each thing that the result lacks or assumes.
        adapter: folder of a low-rank adapter that is merged into the kernels.

    Raises OSError and ValueError; `out` is then unchanged.
    """
    max_shard_bytes = parse_size(max_shard_size)
    if dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    source = open_checkpoint(resolve(src))
    same = dialect_of(source.raw_config) == dialect
    raw = source.raw_config if same else _translated(source, dialect, note)
    leaves = source.leaves
    if adapter is not None:
        leaves = merged_leaves(leaves, read_adapter(adapter, source.config))
    tensors = tensors_to_write(leaves, source.carried, source.config, dialect)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    with _staged(source, out, num_bytes, overwrite=overwrite, note=note) as folder:
        with byte_bar("writing", num_bytes, progress) as bar:
            write_sharded(folder, tensors, max_shard_bytes, bar.update)
        copy_files(source.folder, folder, TOKENIZER_FILES)
        write_processor_files(source.folder, folder, source.config, dialect, note)
        if same and _untied(raw) is raw:
            copy_file(source.folder / "config.json", folder / "config.json")
        else:
            write_json(folder / "config.json", _untied(raw))


def _carried(source: Checkpoint, name: str, dtype: np.dtype | None) -> TensorToWrite:
    tensor = source.carried[name]
    cast = dtype or tensor.dtype
    return TensorToWrite(name, tensor.shape, cast, lambda: tensor.view().astype(cast))


def _verify(leaves: LazyParams, written: LazyParams, progress: bool) -> None:
    with byte_bar("verifying", total_bytes(leaves), progress) as bar:
        for path, leaf in leaves.items():
            for piece in pieces(leaf):
                if not _same_bits(leaf, written[path], piece):
                    raise ValueError(f"{'/'.join(path)} on disk differs from the source; the disk may be failing")
            bar.update(leaf.num_bytes)


def _same_bits(one: LazyArray, other: LazyArray, index: tuple[slice, ...]) -> bool:
    unsigned = f"u{one.dtype.itemsize}"  # as floats, NaN differs from itself and -0 equals 0
    return one.dtype == other.dtype and np.array_equal(one.read(index).view(unsigned), other.read(index).view(unsigned))


# ---------------------------------------------------------------- config.json


def _with_dtype(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`raw` with every dtype in it changed, and one added if there was none."""
    keys = ("dtype", "torch_dtype")

    def change(value: Any, key: str | None = None) -> Any:
        if isinstance(value, dict):
            return {k: change(v, k) for k, v in value.items()}
        return dtype if key in keys and value is not None else value

    changed = change(raw)
    return changed if any(changed.get(key) for key in keys) else {**changed, "torch_dtype": dtype}


def _untied(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` for a checkpoint with a separate head, as all checkpoints written here; unchanged if it already says so."""
    top_default = dialect_of(raw) == "transformers"  # there, a missing key means tied
    blocks = [key for key in ("language_config", "text_config") if raw.get(key, {}).get("tie_word_embeddings")]
    if not blocks and not raw.get("tie_word_embeddings", top_default):
        return raw
    return {**raw, **{key: {**raw[key], "tie_word_embeddings": False} for key in blocks}, "tie_word_embeddings": False}


def _translated(source: Checkpoint, dialect: str, note: Callable[[str], Any]) -> dict[str, Any]:
    if dialect == "original":
        return original_config(source.config)
    raw = transformers_config(source.config, _image_token_id(source.folder, note))
    return {**raw, "text_config": {**raw["text_config"], **token_ids(source.folder, source.config)}}


def _image_token_id(folder: pathlib.Path, note: Callable[[str], Any]) -> int:
    path = folder / "tokenizer.json"
    if not path.is_file():
        note(f"{folder} has no tokenizer.json: image_token_id is set to {_USUAL_PLACEHOLDER_ID}, as in Janus-Pro-1B")
        return _USUAL_PLACEHOLDER_ID
    try:
        raw = read_json_object(path)
        added = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
        return added[_PLACEHOLDER] if _PLACEHOLDER in added else raw["model"]["vocab"][_PLACEHOLDER]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} has no token {_PLACEHOLDER}; a Janus tokenizer is needed here") from None


# ---------------------------------------------------------------- folders


def parse_size(size: int | str) -> int:
    """Bytes of a number or a string like '500MB', '5GB' or '4GiB'; ValueError if it is neither, or not positive."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    num_bytes = 0
    if match:
        base = 1024 if match[3] else 1000
        num_bytes = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if num_bytes <= 0:
        raise ValueError(f"{size!r} is not a size; write it like 5GB, 500MB or 4GiB")
    return num_bytes


def _staged(source: Checkpoint, out: str | pathlib.Path, num_bytes: int, **options: Any):
    place = destination(out)
    if place in (source.folder.resolve(), *source.folder.resolve().parents):
        raise ValueError(f"{one_line(out)} contains the source {one_line(source.folder)}; choose another folder")
    known = _UNMARKED if (place / "config.json").is_file() and has_arrays(place / PARAMS) else frozenset()
    return staged(place, known=known, num_bytes=num_bytes, **options)
