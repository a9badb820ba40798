"""Compiles the programs of a run for TPUs or GPUs that need not be present, and reports what they need there."""

from __future__ import annotations

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
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax.loading import layout
from janus_jax.model.janus import Janus
from janus_jax.processing.images import ImageSettings
from janus_jax.sampling.cache import cache_sizes
from janus_jax.sampling.images import continue_image, decode_images, start_image
from janus_jax.sampling.sampler import Sampler
from janus_jax.serving import programs as serving
from janus_jax.serving.device import CONTEXT, cache_slots
from janus_jax.sharding import make_mesh, param_shardings
from janus_jax.weights.fuse import fuse
from janus_jax.weights.quantize import array_bytes, quantized_shapes
from janus_jax.weights.torch_weights import abstract_params
from train.config import TrainConfig, refused_options
from train.plan import hlo
from train.plan.executed import executed_flops, least_flops
from train.plan.flops import peak_flops, typical_flops
from train.plan.topologies import GIB, GPUS, Topology
from train.rl.update import abstract_rows, make_dpo_step, make_updates
from train.step.state import abstract_batch, abstract_state
from train.step.step import make_train_step
from train.validate import check_mesh

SPARE = 0.05  # the share of a chip's memory that a program should leave free
_PROMPT = 64  # tokens of a sampled prompt
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
      accessed: bytes of main memory that one sampling step reads and writes.
      floor: bytes of parameters and cache that a sampling step has to read.
      executed, needed: FLOPs of a chip in a training step: those that it executes, and those of a step that computes
        nothing twice (`executed.least_flops`).
      between: the collectives between slices, likewise.
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
        if self.executed is not None:
            yield (
                f"  {self.recomputation:.3f} times the FLOPs that a step needs are executed; {self.overlap:.0%} of the "
                "bytes of collectives move while a chip computes"
            )
        if self.accessed is not None:
            yield f"  a step moves {self.accessed / GIB:.3f} GiB; parameters and cache are {self.floor / GIB:.3f} GiB"
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

    Of reinforcement learning, that are the updates after the drawing.
    """
    state, frozen = abstract_state(config, mesh)
    # Made outside the mesh: the optimizer's initial state is computed, and devices of a topology compute nothing.
    if config.grpo or config.dpo:
        step, batch = (make_updates if config.grpo else make_dpo_step)(config, mesh), abstract_rows(config, mesh)
    else:
        step, batch = make_train_step(config, mesh, settings), abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, batch)
    return lowered, {
        "parameters": _shard_bytes((state.trained, frozen)),
        "optimizer state": _shard_bytes(state.opt_state),
        "batch": _shard_bytes(batch),
    }


def compile_training(config: TrainConfig, place: Topology) -> Compiled:
    """The train step of `config`, with its own mesh, for `place`."""
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices_of(place))
    check_mesh(config, mesh)
    lowered, arguments = lower_step(config, mesh, ImageSettings(config.model.vision.image_size))
    with jax.set_mesh(mesh):
        made = _compile(lowered)
    return _report(
        config.name, place, mesh, arguments, made, flops=typical_flops(config), accumulate=config.accumulate,
        executed=executed_flops(made.text), needed=least_flops(config) / place.chips,
    )  # fmt: skip


def compile_sampling(
    config: TrainConfig, place: Topology, images: int = 1, weights: str | None = None, decoder: bool = True
) -> list[Compiled]:
    """`config`'s model for `place`: the image loop with guidance and, with `decoder`, the VQ decoder.

    It computes in bfloat16, or float16 on GPUs without bfloat16 units. `weights`: None, or the form of quantized
    kernels, see `quantize`. A cache that grows is compiled at its largest size.
    """
    mesh, model, params = _loaded(config, place, weights)
    g = config.model.gen_vision
    ids = jax.ShapeDtypeStruct((images, 2, _PROMPT), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    scalar, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    sampler = Sampler(temperature=scalar, top_k=count, top_p=scalar)
    sizes = cache_sizes(model, params, 2 * images, _PROMPT, g.num_tokens)
    with jax.set_mesh(mesh):
        given = (params, ids, mask, keys, scalar, sampler, g.num_tokens, False)
        start = _compile(start_image.lower(model, *given, sizes[0]))
        state = _on(start_image.eval_shape(model, *given, sizes[-1]), start.compiled.output_shardings)
        loop = _compile(continue_image.lower(model, params, state, keys, scalar, sampler, count, count))
        codes = jax.ShapeDtypeStruct((images, g.num_tokens), jnp.int32)
        vq = {"gen_vision_model": params["gen_vision_model"]}
        decode = _compile(decode_images.lower(model, vq, codes)) if decoder else None
    cache = _shard_bytes(state.cache)
    decoder = {k: v for k, v in params.items() if k in ("language_model", "gen_aligner", "gen_embed", "gen_head")}
    read = dict(decoder, language_model={k: v for k, v in decoder["language_model"].items() if k.startswith("layers")})
    found = tuple(one.line for one in hlo.copies(loop.text, _least(params, state.cache)))
    name = f"{config.name} sampling {images}" + (f" {weights}" if weights else "")
    made = [
        _report(f"{name}: prefill", place, mesh, {"parameters": _shard_bytes(params)}, start),
        _report(
            name, place, mesh, {"parameters": _shard_bytes(params), "cache": cache}, loop, copies=found,
            accessed=hlo.loop_bytes(loop.text), floor=float(_shard_bytes(read) + cache),
        ),
    ]  # fmt: skip
    if decode:
        made.append(_report(f"{name}: VQ decode", place, mesh, {"parameters": _shard_bytes(vq)}, decode))
    return made


def compile_serving(config: TrainConfig, place: Topology, slots: int, weights: str | None = None) -> list[Compiled]:
    """The step of `janus_jax.serving` with so many rows for `config`'s model on `place`; see `compile_sampling`.

    The cache has its largest size by default, and all of it counts as filled; both heads are read, as in a step of
    answers and images.
    """
    mesh, model, params = _loaded(config, place, weights)
    with jax.set_mesh(mesh):
        context = min(config.model.language.max_positions, CONTEXT)
        empty = _compile(serving.new_cache.lower(model, slots, cache_slots(context)[-1]))
        cache = serving.new_cache.eval_shape(model, slots, cache_slots(context)[-1])
        cache = _on(cache, empty.compiled.output_shardings)
        tokens, active = (jax.ShapeDtypeStruct((slots,), dtype) for dtype in (jnp.int32, bool))
        made = _compile(serving.step.lower(model, params, cache, tokens, serving.Rows.idle(slots), active))
    sizes = {"parameters": _shard_bytes(params), "cache": _shard_bytes(cache)}
    read = {name: params[name] for name in ("language_model", "gen_aligner", "gen_head")}
    read["language_model"] = {name: x for name, x in read["language_model"].items() if name != "embed_tokens"}
    name = f"{config.name} serving {slots} slots" + (f" {weights}" if weights else "")
    found = tuple(one.line for one in hlo.copies(made.text, _least(params, cache), anywhere=True))
    accessed, floor = hlo.program_bytes(made.text), float(_shard_bytes(read) + sizes["cache"])
    return [_report(name, place, mesh, sizes, made, copies=found, accessed=accessed, floor=floor)]


def _loaded(config: TrainConfig, place: Topology, weights: str | None) -> tuple[Mesh, Janus, Any]:
    """The mesh, the model and its parameters' shapes as `janus_jax.load` would have them on `place`."""
    devices = devices_of(place)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    gpu = GPUS.get(place.generation)
    dtype = jnp.float16 if gpu and gpu.capability < 8 else jnp.bfloat16
    model = Janus(config.model, dtype=dtype, **layout(config.model, devices[0].platform, on_mesh=True))
    params = abstract_params(config.model, model.scan_layers, dtype)
    params = quantized_shapes(params, weights)
    params = jax.eval_shape(fuse, params) if model.fused else params
    return mesh, model, _on(params, param_shardings(params, mesh))


def _on(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _least(params: Any, cache: Any) -> int:
    """Bytes of the smaller one of a layer's keys and a layer's kernel, on one device."""
    kernel = params["language_model"]["layers_0"]["self_attn"]["o_proj"]["kernel"]
    return min(_shard_bytes(cache.keys[0]), _shard_bytes(kernel))


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has."""


class _Made(NamedTuple):
    compiled: Any
    text: str
    seconds: float


def _compile(lowered: Any) -> _Made:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        # From a dump, since `as_text` fails on instructions that only TPU's compiler knows.
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        seconds = time.monotonic() - started
        largest = max(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return _Made(compiled, largest.read_text(encoding="utf-8"), seconds)


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


def _report(name: str, place: Topology, mesh: Mesh, arguments: dict[str, int], made: _Made, **more: Any) -> Compiled:
    temporaries, peak = memory_of(made.compiled, arguments)
    slice_size = place.chips // place.slices if place.slices > 1 else 0
    more["between"] = hlo.between_slices(made.text, slice_size)
    within = hlo.collectives(made.text, slice_size)
    return Compiled(name, place, dict(mesh.shape), arguments, temporaries, peak, made.seconds, within, **more)


def _shard_bytes(tree: Any) -> int:
    """Bytes of `tree`'s arrays on one device."""

    def of(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return array_bytes(shape, x.dtype)

    return sum(map(of, jax.tree.leaves(tree)))


def compile_job(
    config: TrainConfig,
    place: Topology,
    sample: bool,
    images: int = 1,
    weights: str | None = None,
    decoder: bool = True,
    slots: int = 0,
) -> list[Compiled]:
    """Compiles the programs of one job, with or without the VQ decoder; with `slots`, the server's step.

    Raises: ValueError in one line if a program cannot be compiled, or needs more memory than there is.
    """
    try:
        if slots:
            return compile_serving(config, place, slots, weights)
        if sample:
            return compile_sampling(config, place, images, weights, decoder)
        return [compile_training(config, place)]
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
