"""TPU slices by name, and how a run is laid out on those that it is meant for."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

import jax

from train.config import Home, MeshConfig, TrainConfig
from train.flops import peak_flops

GIB = 2**30
# Generation -> (memory of a chip that programs may use in bytes, `jax.Device.device_kind`).
GENERATIONS: dict[str, tuple[float, str]] = {
    "v4": (30.75 * GIB, "TPU v4"),
    "v5e": (15.75 * GIB, "TPU v5 lite"),
    "v5p": (95.74 * GIB, "TPU v5"),
    "v6e": (31.25 * GIB, "TPU v6 lite"),
}
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, one JAX device each.

    Attributes:
      name: as `v5p:4x4x8`, what libtpu calls it.
      generation: a key of GENERATIONS.
      chips: how many.
      hbm: bytes of a chip's memory that a program may use.
    """

    name: str
    generation: str
    chips: int
    hbm: float

    @property
    def device_kind(self) -> str:
        """JAX's name of its devices."""
        return GENERATIONS[self.generation][1]


def _known() -> dict[str, Topology]:
    known = {}
    for generation, (hbm, _) in GENERATIONS.items():
        flat = generation in ("v5e", "v6e")
        for shape in _SQUARES if flat else _CUBES:
            chips = math.prod(int(n) for n in shape.split("x"))
            # Google counts chips of the flat ones, and TensorCores, two a chip, of the others.
            name = f"{generation}-{chips if flat else 2 * chips}"
            known[name] = Topology(f"{generation}:{shape}", generation, chips, hbm)
    return known


KNOWN = _known()


def topology(name: str) -> Topology:
    """The slice called `name`: Google's name, as v5e-256, or the shape, as v5p:4x4x8.

    Raises: ValueError in one line that lists those known.
    """
    if name in KNOWN:
        return KNOWN[name]
    for found in KNOWN.values():
        if found.name == name:
            return found
    close = difflib.get_close_matches(name, [*KNOWN, *(found.name for found in KNOWN.values())], 1)
    guess = f"; did you mean {close[0]}?" if close else ""
    generation = next((g for g in GENERATIONS if re.match(rf"{g}\b", name)), None)
    shown = [f"{key} ({found.name})" for key, found in KNOWN.items() if generation in (None, found.generation)]
    raise ValueError(f"unknown TPU topology {name!r}{guess} Known: {', '.join(shown)}".replace("' Known", "'. Known"))


def at_home(config: TrainConfig, home: Home) -> TrainConfig:
    """`config` laid out as on `home`, but for what was changed in it."""
    usual = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    own = {key for key in ("mesh", "accumulate", "remat") if getattr(config, key) == usual[key]}
    return dataclasses.replace(config, **{key: getattr(home, key) for key in own})


def settle(config: TrainConfig, devices: list[jax.Device] | None = None) -> TrainConfig:
    """`config` as its home of these devices (default: those at hand) has it.

    A config whose mesh was given, or that has no such home, comes back as it is.
    """
    devices = jax.devices() if devices is None else devices
    if config.mesh != MeshConfig():
        return config
    for home in config.homes:
        place = topology(home.topology)
        if place.chips == len(devices) and peak_flops(devices[0].device_kind) == peak_flops(place.device_kind):
            return at_home(config, home)
    return config
