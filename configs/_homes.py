"""TPU slices that the shipped runs are meant for, and how each is laid out there (`python -m train.compile --all`)."""

from __future__ import annotations

from train.config import Home, MeshConfig


def homes(parts: dict[str, int], fsdp: int, tensor: dict[str, int] | None = None) -> tuple[Home, ...]:
    """A home for each slice.

    Args:
      parts: in how many parts a step is worked off, by slice.
      fsdp: over how many chips parameters are split: the width by it is a multiple of a TPU's 128 lanes.
      tensor: over how many chips heads are split, where a slice has more chips than a part has rows.
    """
    tensor = tensor or {}
    return tuple(
        Home(name, MeshConfig(data=-1, fsdp=fsdp, tensor=tensor.get(name, 1)), accumulate=count)
        for name, count in parts.items()
    )


# One image at a time: every chip holds a part of each layer.
DRAWING = tuple(Home(name, MeshConfig(fsdp=1, tensor=-1)) for name in ("v5e-8", "v6e-1", "v5p-8"))
