"""How much memory a device has left."""

from __future__ import annotations

import math
import pathlib

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

_MEMINFO, _CGROUP = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")


class OutOfMemory(RuntimeError):
    """The model, or the smallest batch of the work, does not fit the memory."""

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
