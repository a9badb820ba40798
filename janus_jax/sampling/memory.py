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

from janus_jax.io.progress import shown, step_bar
from janus_jax.sharding import batch_shards

_MEMINFO, _CGROUP = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")


class OutOfMemory(RuntimeError):
    """The model, or the smallest possible part of the work, does not fit the memory."""

    @staticmethod
    def says(error: BaseException) -> bool:
        """Whether XLA's error is about memory."""
        return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def available_bytes(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on `device`, one of this process's own; None where nobody tells."""
    if device.platform == "cpu":
        free = min(_host_bytes(), _cgroup_bytes())
        return None if math.isinf(free) else int(free)
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def least_available_bytes(mesh: Mesh | None) -> int | None:
    """Bytes that can still be allocated on every device of `mesh` (None: of this process's first one).

    None where nobody tells. Where `mesh` spans processes, each of them calls this, and all get the same answer.
    """
    # A process knows nothing of another's devices: asking one of them for its memory is an error.
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    least = min((free for free in map(available_bytes, devices) if free is not None), default=None)
    if mesh is None or not mesh.is_multi_process:
        return least
    # Whole MiB: arrays of 64-bit numbers become 32-bit ones on their way.
    told = process_allgather(np.int32(-1 if least is None else max(least, 0) >> 20))
    return min((int(mib) << 20 for mib in told if mib >= 0), default=None)


def _host_bytes() -> float:
    """What the machine's memory has left; infinite where it does not tell, as in some sandboxes."""
    try:
        sizes = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return math.inf


def _cgroup_bytes() -> float:
    """What a container's own limit leaves, files' pages dropped; infinite without one."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return math.inf if limit == "max" else max(int(limit) - int(used) + _cgroup_files(), 0)
    except (OSError, ValueError):
        return math.inf


def _cgroup_files() -> int:
    """Bytes of files' pages, which a cgroup counts as used though it gives them back when asked for memory."""
    try:
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return sum(int(counts[name]) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError, KeyError):
        return 0


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
    free = least_available_bytes(mesh)
    if free is None:
        return -(-total // shards) * shards
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
    unit: str = "image",
) -> np.ndarray:
    """Runs `work(part, padded size, bar)` over `total` items in equal parts of at most `size`, and joins the results.

    Parts halve when the device runs out of memory. Sizes are multiples of `multiple`; the last part is padded to the
    others' size. OutOfMemory where not even one fits.

    Args:
      name, steps: of the work, for the bar; `steps` of one part.
      progress: see `progress.shown`.
      unit: what an item is, for the error.
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
                    raise OutOfMemory(f"{name} one {unit} at a time does not fit the device's memory") from error
                size = padded // 2
