"""The shards of a prepared folder in the making: their files and indices, and which are complete.

Any number of processes may write to the folder, even the same shard: the bytes are the same.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from janus_jax.io.ahead import in_order
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from train.records.bags import ENDING

_INDICES_AT_ONCE = 32  # requests to a store
_MAX_INDEX = 1 << 30  # bytes of a shard's index


def data_file(shard: int) -> str:
    return f"data-{shard:05d}{ENDING}"


def index_file(shard: int) -> str:
    return f"data-{shard:05d}.json"


# ---------------------------------------------------------------- complete shards


# Of each sample: tokens, images, and where its record ends.
_ARRAYS = {"lengths": np.dtype("<i4"), "images": np.dtype("<i4"), "ends": np.dtype("<u8")}


def index_text(index: Mapping[str, Any]) -> str:
    """The content of a shard's index file: JSON, with its lists of numbers in base64, which is read much faster."""
    arrays = {name: np.asarray(index[name], dtype).tobytes() for name, dtype in _ARRAYS.items()}
    coded = {name: base64.b64encode(data).decode() for name, data in arrays.items()}
    return json.dumps({**index, **coded}, ensure_ascii=False)


def read_index(out: pathlib.Path, shard: int, mark: str = "") -> dict[str, Any] | None:
    """The index of a complete shard, with arrays; None if it is not complete, or of an earlier format.

    Raises: ValueError if it was prepared with other settings than those of `mark`.
    """
    try:
        index = read_json_object(out / index_file(shard), _MAX_INDEX)
        for name, dtype in _ARRAYS.items():
            found = index.get(name, ()) if name == "ends" else index[name]
            data = np.frombuffer(base64.b64decode(found), dtype) if isinstance(found, str) else np.asarray(found, dtype)
            index[name] = data
        whole = not len(index["lengths"]) or (out / data_file(shard)).stat().st_size == index["bytes"]
        whole = whole and len(index["lengths"]) == len(index["images"]) == len(index["ends"])
        other = index.get("settings", mark) != mark
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        return None
    if whole and other:
        raise ValueError(
            f"{one_line(out / data_file(shard))} was prepared with other settings than {one_line(out)}; delete "
            f"{index_file(shard)} beside it and run the same `python -m train.prepare` again"
        )
    return index if whole else None


def read_indices(out: pathlib.Path, shards: Sequence[int], mark: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """The complete shards of `shards` and their indices, in order, with a few of them in memory; see `read_index`."""
    known = present(out, shards) if len(shards) > 1 else shards
    if not is_store(out):
        found = ((shard, read_index(out, shard, mark)) for shard in known)
        yield from ((shard, index) for shard, index in found if index is not None)
        return
    with ThreadPoolExecutor(_INDICES_AT_ONCE) as pool:
        read = in_order(known, lambda shard: read_index(out, shard, mark), pool, 2 * _INDICES_AT_ONCE)
        yield from ((shard, index) for shard, index in read if index is not None)


def present(out: pathlib.Path, shards: Sequence[int]) -> list[int]:
    """Those of `shards` that have an index, by one listing."""
    there = {path.name for path in out.iterdir()} if is_store(out) else set(os.listdir(out))
    return [shard for shard in shards if index_file(shard) in there]


def shard_count(meta: dict[str, Any]) -> int:
    """The number of shards of a folder in the making, by its settings; 0 if they do not say."""
    settings = meta.get("settings")
    samples, size = None, None
    if isinstance(settings, dict) and isinstance(settings.get("source"), dict):
        samples, size = settings["source"].get("samples"), settings.get("shard_size")
    return -(-samples // size) if isinstance(samples, int) and isinstance(size, int) and size > 0 else 0


def missing_shards(out: pathlib.Path, count: int) -> list[int]:
    return sorted(set(range(count)) - set(present(out, range(count))))


def listed_shards(shards: Sequence[int], most: int = 8) -> str:
    """Numbers of shards for a message: ranges, shortened if there are many."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    told = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:most]]
    return ", ".join(told + (["..."] if len(runs) > most else []))
