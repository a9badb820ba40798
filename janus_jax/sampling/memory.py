"""The free memory of devices."""

from __future__ import annotations

import math
import pathlib

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

_MEMINFO, _CGROUP = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")


class OutOfMemory(RuntimeError):
    """The model, or the smallest batch of the work, does not fit in memory."""

    @staticmethod
    def says(error: BaseException) -> bool:
        """Whether XLA's error is about memory."""
        return any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def available_bytes(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on `device`, one of this process's own; None if unknown."""
    if device.platform == "cpu":
        free = min(_host_bytes(), _cgroup_bytes())
        return None if math.isinf(free) else int(free)
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def least_available_bytes(mesh: Mesh | None) -> int | None:
    """Bytes that can still be allocated on every device of `mesh` (None: on this process's first device).

    None if unknown. If `mesh` spans processes, all of them call this, and get the same result.
    """
    # Only local devices: asking another process's device for its memory is an error.
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    least = min((free for free in map(available_bytes, devices) if free is not None), default=None)
    if mesh is None or not mesh.is_multi_process:
        return least
    # In MiB, since the collective turns 64-bit values into 32-bit ones.
    every = process_allgather(np.int32(-1 if least is None else max(least, 0) >> 20))
    return min((int(mib) << 20 for mib in every if mib >= 0), default=None)


def _host_bytes() -> float:
    """The machine's available memory; infinite if it is not reported, as in some sandboxes."""
    try:
        sizes = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return math.inf


def _cgroup_bytes() -> float:
    """What a container's memory limit leaves, not counting the page cache; infinite without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return math.inf if limit == "max" else max(int(limit) - int(used) + _cgroup_files(), 0)
    except (OSError, ValueError):
        return math.inf


def _cgroup_files() -> int:
    """Bytes of page cache, which a cgroup counts as used although they are freed when memory is needed."""
    try:
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return sum(int(counts[name]) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError, KeyError):
        return 0
