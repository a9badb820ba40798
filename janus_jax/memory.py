"""How much memory a device has left, and how to cut a batch into parts that fit it."""

from __future__ import annotations

import math
import pathlib

import jax

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
