"""How much memory a device has left, and work on a batch in parts that fit it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from tqdm import tqdm

from janus_jax.progress import shown, step_bar
from janus_jax.sharding import batch_shards

_MEMINFO, _CGROUP = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")


class OutOfMemory(RuntimeError):
    """The smallest possible part of the work does not fit the device."""

    @staticmethod
    def says(error: BaseException) -> bool:
        """Whether XLA's error is about memory."""
        return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def available_bytes(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on `device`; None where nobody tells."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform == "cpu" and _MEMINFO.exists():
        sizes = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return min(int(sizes["MemAvailable"].split()[0]) * 1024, _cgroup_bytes())
    return None


def _cgroup_bytes() -> float:
    """What a container's own limit leaves; infinite without one."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return math.inf
    return math.inf if limit == "max" else max(int(limit) - int(used), 0)


def fitting_parts(total: int, size: int, multiple: int = 1) -> tuple[list[slice], int]:
    """Cuts `total` items into the fewest equal parts of at most `size` (at least `multiple`).

    Returns: the parts, and the size to pad each of them to: a multiple of `multiple`.
    """
    size = max(size // multiple, 1) * multiple
    count = -(-total // size)
    even = -(-total // count)
    padded = -(-even // multiple) * multiple
    return [slice(start, min(start + padded, total)) for start in range(0, total, padded)], padded


def fitting(total: int, per_item: int, mesh: Mesh | None, coming: Any) -> int:
    """How many of `total` items, of `per_item` bytes each, fit the memory that is free now; at least one.

    Args:
      mesh: what the items are spread over; None for one device.
      coming: a tree, in which shapes stand for arrays that are still to be allocated.
    """
    shards = batch_shards(mesh)
    free = available_bytes((jax.devices() if mesh is None else mesh.devices.flat)[0])
    if free is None:
        return -(-total // shards) * shards
    # All processes of a mesh must run the same programs; without one, this process works alone.
    if mesh is not None and jax.process_count() > 1:
        free = int(process_allgather(np.float32(free)).min())
    free -= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(coming) if isinstance(x, jax.ShapeDtypeStruct))
    return max(1, free * 8 // 10 // max(per_item // shards, 1))


def in_parts(
    work: Callable[[slice, int, tqdm], np.ndarray],
    total: int,
    size: int,
    multiple: int,
    name: str,
    steps: int,
    progress: bool | None,
) -> np.ndarray:
    """Runs `work(part, padded size, bar)` over `total` items in equal parts of at most `size`, and joins the results.

    Parts halve when the device runs out of memory. Sizes are multiples of `multiple`; the last part is padded to the
    others' size. OutOfMemory where not even one fits.

    Args:
      name, steps: of the work, for the bar; `steps` of one part.
      progress: see `progress.shown`.
    """
    while True:
        parts, padded = fitting_parts(total, size, multiple)
        with step_bar(name, steps * len(parts), shown(progress)) as bar:
            try:
                return np.concatenate([work(part, padded, bar) for part in parts])
            except jax.errors.JaxRuntimeError as error:
                if not OutOfMemory.says(error):
                    raise
                if padded <= multiple:
                    raise OutOfMemory(f"{name} one image at a time does not fit the device's memory") from error
                size = padded // 2
