"""The files of a prepared folder in the making: named by shard, written whole or not at all, complete or not."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from janus_jax.io.files import read_json_object
from janus_jax.io.store_access import is_store
from train.data.bags import ENDING

_INDICES_AT_ONCE = 32  # requests to a store
_MAX_INDEX = 1 << 30  # bytes of a shard's index


def data_file(shard: int) -> str:
    return f"data-{shard:05d}{ENDING}"


def index_file(shard: int) -> str:
    return f"data-{shard:05d}.json"


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local path to write a file at, which then appears at `path`, whole, if it is still there."""
    if is_store(path):
        with tempfile.TemporaryDirectory(prefix="janus_jax_") as folder:
            partial = pathlib.Path(folder) / path.name
            yield partial
            if partial.exists():
                path.upload(partial)
        return
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    if partial.exists():
        partial.replace(path)


def replace_file(path: pathlib.Path, text: str):
    """Writes a file atomically."""
    if is_store(path):
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_index(out: pathlib.Path, shard: int) -> dict[str, Any] | None:
    """The index of a complete shard; None if it is not complete, or of an earlier format."""
    try:
        index = read_json_object(out / index_file(shard), _MAX_INDEX)
        whole = not index["lengths"] or (out / data_file(shard)).stat().st_size == index["bytes"]
        whole = whole and len(index["lengths"]) == len(index.get("ends", ()))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return index if whole else None


def read_indices(out: pathlib.Path, shards: int) -> dict[int, dict[str, Any]]:
    """The indices of the complete shards of `shards`, by number."""
    if not is_store(out):
        return {shard: index for shard in range(shards) if (index := read_index(out, shard)) is not None}
    there = {path.name for path in out.iterdir()}
    known = [shard for shard in range(shards) if index_file(shard) in there]
    with ThreadPoolExecutor(_INDICES_AT_ONCE) as pool:
        read = pool.map(lambda shard: read_index(out, shard), known)
        return {shard: index for shard, index in zip(known, read, strict=True) if index is not None}
