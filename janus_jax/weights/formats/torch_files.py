"""Reads torch checkpoint files without torch: finds the weight files of a folder, and the tensors in them.

Opening reads headers only. A tensor's bytes are mapped by `view()` and unmapped when the array is freed, so that a
process has only a few tensors in memory, however large the checkpoint.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path, lexists
from janus_jax.weights.formats.pickle_files import PICKLE, PICKLE_INDEX, open_pickle
from janus_jax.weights.formats.safetensors_files import SAFETENSORS, SAFETENSORS_INDEX, open_safetensors
from janus_jax.weights.formats.stored_tensor import Tensor

# If a folder has several, the first is read, as in transformers.
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_MAX_SHARDS = 10_000

Note = Callable[[str], Any]


def weight_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of `folder` from which its weights are read, or None."""
    # A dangling link counts, so that the error names it.
    return next((folder / name for name in WEIGHT_FILES if lexists(folder / name)), None)


def open_tensors(folder: str | pathlib.Path, note: Note = lambda text: None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name, from `model.safetensors` or `pytorch_model.bin`, whole or in shards.

    Args:
      note: called with a sentence that says which of several sets of weights in a file is read.
    Raises: FileNotFoundError if a file is missing, ValueError if one is damaged or a name appears in two shards.
    """
    folder = as_path(folder)
    path = weight_file(folder)
    if path is None:
        raise FileNotFoundError(f"{one_line(folder)} has no weights; expected one of {', '.join(WEIGHT_FILES)}")
    shards = _shards(path) if path.suffix == ".json" else [path]
    tensors: dict[str, Tensor] = {}
    twice = []
    for shard in shards:
        opened = open_file(shard, note)
        twice += [
            f"{one_line(name)} ({tensors[name].file.name}, {shard.name})" for name in opened.keys() & tensors.keys()
        ]
        tensors |= opened
    if twice:
        more = f" and {len(twice) - 4} more" if len(twice) > 4 else ""
        raise ValueError(f"{one_line(folder)}: tensors appear in two shards: {', '.join(sorted(twice)[:4])}{more}")
    return tensors


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{one_line(index)} is not an index of shards: weight_map must map tensors to files")
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_SHARDS:
        raise ValueError(f"{one_line(index)} names {len(names):,} shards, more than the limit of {_MAX_SHARDS:,}")
    for name in names:
        if pathlib.Path(name).name != name or name in ("", "..") or "\0" in name or "\\" in name:
            raise ValueError(f"{one_line(index)} names a shard outside its own folder: {one_line(name)}")
    absent = [one_line(name) for name in names if not lexists(index.parent / name)]
    if absent:
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise FileNotFoundError(
            f"{one_line(index)} names shards that are missing: {', '.join(absent[:4])}{more}; download them again"
        )
    return [index.parent / name for name in names]


def open_file(path: pathlib.Path, note: Note = lambda text: None) -> dict[str, Tensor]:
    """Every tensor of one file, by name; `note` as for `open_tensors`."""
    if not lexists(path):
        raise FileNotFoundError(f"{one_line(path)} does not exist; expected a file of tensors there")
    return open_pickle(path, note) if path.suffix in _PICKLE_SUFFIXES else open_safetensors(path)
