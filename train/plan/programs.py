"""Compiles the programs of a run for TPUs or GPUs that need not be present, and reports what they need there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from janus_jax.processing.images import ImageSettings
from janus_jax.sharding import make_mesh
from janus_jax.weights.quantize import array_bytes
from train.config import TrainConfig, refused_options
from train.plan import hlo
from train.plan.executed import executed_flops, least_flops
from train.plan.flops import peak_flops, typical_flops
from train.plan.topologies import GIB, GPUS, Topology
from train.rl.update import abstract_rows, make_dpo_step, make_updates, reference_shapes
from train.step.state import Params, TrainState, abstract_batch, abstract_state
from train.step.step import make_train_step
from train.validate import check_mesh

SPARE = 0.05  # the share of a chip's memory that a program should leave free
_MFUS = (0.4, 0.5, 0.6)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The memory that a chip needs for a program, in bytes, and what the program does.

    Attributes:
      name, place, mesh: what was compiled, and for what.
      arguments: their bytes, by name.
      temporaries: bytes of intermediate results.
      peak: bytes of everything at the peak.
      seconds: compilation time.
      collectives: the collectives in one run of the program, by kind, without those between slices.
      accumulate: micro-batches of a training step.
      copies: lines of the copies in loops that are as large as a layer's cache or kernel (sampling only).
      flops: of a training step over all chips.
      accessed: bytes of main memory that one run, or one sampling step, reads and writes.
      floor: bytes of parameters and cache that a sampling step has to read.
      executed, needed: FLOPs of a chip in a run: those that it executes, and of a training step those of one that
        computes nothing twice (`executed.least_flops`).
      between: the collectives between slices, likewise.
      part, runs: of a program of reinforcement learning: the part of a step that it belongs to, and how often a step
        runs it.
    """

    name: str
    place: Topology
    mesh: dict[str, int]
    arguments: dict[str, int]
    temporaries: int
    peak: int
    seconds: float
    collectives: dict[str, hlo.Traffic]
    accumulate: int = 1
    copies: tuple[str, ...] = ()
    flops: float | None = None
    accessed: float | None = None
    floor: float | None = None
    executed: float | None = None
    needed: float | None = None
    between: dict[str, hlo.Traffic] = dataclasses.field(default_factory=dict)
    part: str = ""
    runs: float = 1

    @property
    def least_seconds(self) -> float:
        """Seconds that a run takes at least: of products at the chip's peak, or of memory at its bandwidth, whichever
        is longer, and then of what nothing is computed beside at its links' speed.

        A prediction from data sheets, which real runs only come near; what is not known counts as nothing.
        """
        products = (self.executed or 0) / (peak_flops(self.place.device_kind) or math.inf)
        return max(products, (self.accessed or 0) / self.place.bandwidth) + self.waited_for / self.place.links

    @property
    def recomputation(self) -> float:
        """FLOPs that the chips execute, as a multiple of those that a training step needs."""
        return self.executed / self.needed if self.executed and self.needed else math.nan

    @property
    def waited_for(self) -> int:
        """Bytes of collectives, without those between slices, during which a chip computes nothing."""
        return sum(traffic.bytes - traffic.overlapped for traffic in self.collectives.values())

    @property
    def overlap(self) -> float:
        """The share of the bytes of these collectives that move while a chip computes; 1 if there are none."""
        moved = sum(traffic.bytes for traffic in self.collectives.values())
        return 1 - self.waited_for / moved if moved else 1.0

    @property
    def fits(self) -> bool:
        """Whether SPARE of the chip's memory stays free."""
        return self.peak <= (1 - SPARE) * self.place.hbm

    def lines(self) -> Iterator[str]:
        """The lines of the program's report."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        slices = f" in {self.place.slices} slices" if self.place.slices > 1 else ""
        yield f"{self.name} on {self.place.name}: {self.place.chips} chips{slices}, {mesh}"
        for name, size in (*self.arguments.items(), ("temporaries", self.temporaries)):
            yield f"  {name:16} {size / GIB:8.2f} GiB per chip"
        verdict = "" if self.fits else f"; less than {SPARE:.0%} to spare"
        yield (
            f"  {'peak':16} {self.peak / GIB:8.2f} GiB of {self.place.hbm / GIB:.2f} "
            f"({self.peak / self.place.hbm:.0%}){verdict}"
        )
        for kind, traffic in self.collectives.items():
            yield (
                f"  {kind:16} {traffic.count:8,} with {traffic.bytes / GIB:.2f} GiB in total on each chip, "
                f"the largest {traffic.largest / GIB:.3f}"
            )
        for kind, traffic in self.between.items():
            yield (
                f"  between slices   {traffic.count:8,} {kind} with {traffic.bytes / GIB:.3f} GiB in total of "
                f"each chip, the largest {traffic.largest / GIB:.3f}"
            )
        if self.flops is not None:
            yield f"  {self.flops / 1e15:.2f} PFLOP per step: " + ", ".join(
                f"{seconds:.2f} s at {mfu:.0%} MFU" for mfu, seconds in self.step_seconds().items()
            )
        if self.part and self.executed is not None:
            moved = f" and {self.accessed / GIB:.2f} GiB of memory moved" if self.accessed is not None else ""
            yield (
                f"  {self.executed / 1e12:.3f} TFLOP executed{moved} on each chip: at least "
                f"{1e3 * self.least_seconds:.2f} ms a run (predicted), {self.runs:,g} runs a step"
            )
        if self.needed is not None:
            yield (
                f"  {self.recomputation:.3f} times the FLOPs that a step needs are executed; {self.overlap:.0%} of the "
                "bytes of collectives move while a chip computes"
            )
        if self.accessed is not None and self.floor is not None:
            products = f" and computes {self.executed / 1e12:.3f} TFLOP" if self.executed is not None else ""
            yield (
                f"  a step moves {self.accessed / GIB:.3f} GiB{products}; parameters and cache are "
                f"{self.floor / GIB:.3f} GiB"
            )
            yield f"  copies of cache or weights in the loop: {len(self.copies)}"
            yield from (f"    {line[:160]}" for line in self.copies)
        yield f"  compiled in {self.seconds:.0f} s"

    def step_seconds(self) -> dict[float, float]:
        """Seconds that a training step would take, by model FLOPs utilization."""
        return {mfu: self.flops / (mfu * self.place.chips * peak_flops(self.place.device_kind)) for mfu in _MFUS}


def devices_of(place: Topology) -> list[Any]:
    """The devices of `place`, for compilation only. ImportError if the compiler is missing."""
    from jax.experimental import topologies

    if gpu := GPUS.get(place.generation):
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise ImportError("compiling for GPUs needs JAX's CUDA plugin; pip install 'janus_jax[cuda]'")
        hosts = f"1x{place.shape.split(':')[1]}"
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=place.shape, target_config=gpu.target(), topology=hosts
        )
        return list(found.devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for TPUs needs libtpu; pip install 'janus_jax[tpu]'")
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=place.shape, num_slices=place.slices, **_bounds(place)
    )
    return list(found.devices)


def _bounds(place: Topology) -> dict[str, Any]:
    # Hosts of v5e and v6e slices have up to eight chips; libtpu assumes four.
    if place.generation in ("v5e", "v6e") and place.chips <= 8 * place.slices:
        x, y = (int(n) for n in place.shape.split(":")[1].split("x"))
        return {"chips_per_host_bounds": (x, y, 1)}
    return {}


def lower_step(config: TrainConfig, mesh: Mesh, settings: ImageSettings) -> tuple[Any, dict[str, int]]:
    """The train step of `config` on `mesh`, lowered, and the bytes of its arguments on a device, by name.

    Of reinforcement learning, that are the updates after the drawing, and the reference lies beside them.
    """
    state, frozen = abstract_state(config, mesh)
    # Made outside the mesh: the optimizer's initial state is computed, and devices of a topology compute nothing.
    if config.grpo or config.dpo:
        step, batch = (make_updates if config.grpo else make_dpo_step)(config, mesh), abstract_rows(config, mesh)
    else:
        step, batch = make_train_step(config, mesh, settings), abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, batch)
    return lowered, held(config, state, frozen) | {"batch": shard_bytes(batch)}


def held(config: TrainConfig, state: TrainState, frozen: Params) -> dict[str, int]:
    """The bytes on a device of what a run keeps there, by name."""
    sizes = {"parameters": shard_bytes((state.trained, frozen)), "optimizer state": shard_bytes(state.opt_state)}
    if config.grpo and config.grpo.kl:
        sizes["reference"] = shard_bytes(reference_shapes(config, state.trained))
    return sizes


def compile_training(config: TrainConfig, place: Topology) -> Compiled:
    """The train step of `config`, with its own mesh, for `place`."""
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices_of(place))
    check_mesh(config, mesh)
    lowered, arguments = lower_step(config, mesh, ImageSettings(config.model.vision.image_size))
    with jax.set_mesh(mesh), fitting(config, place):
        made = compile_lowered(lowered)
    return report(
        config.name, place, mesh, arguments, made, flops=typical_flops(config), accumulate=config.accumulate,
        executed=executed_flops(made.text), needed=least_flops(config) / place.chips,
    )  # fmt: skip


def placed(tree: Any, shardings: Any) -> Any:
    """The `jax.ShapeDtypeStruct`s of `tree` with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has."""


@contextlib.contextmanager
def fitting(config: TrainConfig, place: Topology) -> Iterator[None]:
    """ValueError in one line for options that the compiler refuses, and DoesNotFit if it finds too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if refused := refused_options(error):
            raise ValueError(refused) from None
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        what = f"{used[1]} of {used[2]} per chip" if used else str(error).split(". ")[0]
        raise DoesNotFit(
            f"{config.name} does not fit on {place.name}: {what}; give the mesh more chips, or raise accumulate"
        ) from None


class Made(NamedTuple):
    """A compiled program, its HLO text, and the seconds that compiling it took."""

    compiled: Any
    text: str
    seconds: float


def compile_lowered(lowered: Any) -> Made:
    """Compiles what `jax.jit(...).lower` has made."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        # From a dump, since `as_text` fails on instructions that only TPU's compiler knows.
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        seconds = time.monotonic() - started
        largest = max(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return Made(compiled, largest.read_text(encoding="utf-8"), seconds)


def memory_of(compiled: Any, arguments: dict[str, int]) -> tuple[int, int]:
    """The bytes of a compiled program's intermediate results, and of everything at its peak, on a device."""
    memory = compiled.memory_analysis()
    # Arguments that a program does not use still occupy memory.
    passed = max(memory.argument_size_in_bytes, sum(arguments.values()))
    peak = (
        passed
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return memory.temp_size_in_bytes, peak


def report(name: str, place: Topology, mesh: Mesh, arguments: dict[str, int], made: Made, **more: Any) -> Compiled:
    """What `made` needs and does, with `more` fields; `arguments`: bytes of all that lies on a device meanwhile."""
    temporaries, peak = memory_of(made.compiled, arguments)
    slice_size = place.chips // place.slices if place.slices > 1 else 0
    more["between"] = hlo.between_slices(made.text, slice_size)
    within = hlo.collectives(made.text, slice_size)
    return Compiled(name, place, dict(mesh.shape), arguments, temporaries, peak, made.seconds, within, **more)


def shard_bytes(tree: Any) -> int:
    """Bytes of `tree`'s arrays on one device."""

    def of(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return array_bytes(shape, x.dtype)

    return sum(map(of, jax.tree.leaves(tree)))
