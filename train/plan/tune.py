"""Layouts for a topology: meshes, micro-batches and what is recomputed, compiled and compared.

The compiler says what each needs and does; none of it is run. They are ordered by `Compiled.least_seconds`: a step of
that layout cannot be faster, so that the order is a reason to measure the first ones, and no forecast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from janus_jax.sharding import RULES
from train.config import REMATS, MeshConfig, TrainConfig
from train.plan.programs import Compiled, DoesNotFit, compile_training
from train.plan.topologies import COMPILER_OPTIONS, Topology


def tune(
    config: TrainConfig, place: Topology, meshes: Sequence[MeshConfig], say: Callable[[str], None]
) -> list[tuple[TrainConfig, Compiled]]:
    """The layouts of `config` on `place` that fit, with what was compiled, the best first.

    For each of `meshes` every remat is tried with as few micro-batches as fit; with more of them than a remat that
    recomputes less, it could only be slower. The best is also tried with the topology's `COMPILER_OPTIONS`.

    Args:
      say: called with a line before and after each compilation, which takes minutes.
    Raises: ValueError if a mesh does not divide the model or the topology.
    """
    found: list[tuple[TrainConfig, Compiled]] = []

    def fits(one: TrainConfig) -> bool:
        say(f"{place.name}: {layout_words(one)} ...")
        try:
            made = compile_training(one, place)
        except DoesNotFit as error:
            say(f"  {error}")
            return False
        say(f"  {summary(made)}")
        if made.fits:
            found.append((one, made))
        return made.fits

    config = dataclasses.replace(config, layouts=(), compiler_options=config.compiler_options or ())
    for mesh in meshes:
        counts = micro_batches(config, mesh, place)
        for remat in REMATS:
            for tried, count in enumerate(counts):
                if fits(dataclasses.replace(config, mesh=mesh, accumulate=count, remat=remat)):
                    counts = counts[:tried]
                    break
            if not counts:
                break
    found.sort(key=lambda pair: pair[1].least_seconds)
    if found and not config.compiler_options and (options := COMPILER_OPTIONS.get(place.generation)):
        fits(dataclasses.replace(found[0][0], compiler_options=options))
        found.sort(key=lambda pair: pair[1].least_seconds)
    return found


def micro_batches(config: TrainConfig, mesh: MeshConfig, place: Topology) -> list[int]:
    """The numbers of micro-batches to try: powers of two that leave each device at least a row."""
    rows = config.batch_size * _to_a_row(mesh) // place.chips
    return [2**n for n in range(rows.bit_length()) if rows % 2**n == 0]


def near(mesh: MeshConfig, place: Topology) -> list[MeshConfig]:
    """`mesh`, and those that shard the parameters over half and twice as many chips."""
    own = mesh.fsdp if mesh.fsdp > 0 else place.chips // (math.prod(dataclasses.astuple(mesh)) // mesh.fsdp)
    chips = place.chips // place.slices
    sizes = [size for size in (own, own // 2, 2 * own) if size and chips % (size * _to_a_row(mesh)) == 0]
    return [dataclasses.replace(mesh, data=-1, fsdp=size) for size in sizes]


def _to_a_row(mesh: MeshConfig) -> int:
    """The number of chips that work on the same rows."""
    return math.prod(size for axis, size in dataclasses.asdict(mesh).items() if axis not in RULES["batch"])


def layout_words(config: TrainConfig) -> str:
    """The layout as overrides of the command line."""
    mesh = [f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items()]
    options = [f"compiler_options={','.join(config.compiler_options)}"] if config.compiler_options else []
    return " ".join([*mesh, f"accumulate={config.accumulate}", f"remat={config.remat}", *options])


def summary(made: Compiled) -> str:
    """One line on a compiled layout."""
    verdict = "" if made.fits else ", too little to spare"
    return (
        f"{made.peak / made.place.hbm:.0%} of the memory{verdict}; {made.recomputation:.3f} times the FLOPs that the "
        f"step needs; at least {made.least_seconds:.3f} s a step"
    )


def report(found: Sequence[tuple[TrainConfig, Compiled]]) -> Iterator[str]:
    """The lines of the result, the best last, where a terminal shows it."""
    for config, made in reversed(found):
        yield f"{layout_words(config)}: {summary(made)}"
