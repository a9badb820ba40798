"""Compiles a run for TPUs or GPUs that are not at hand, and says what it would need there.

    python -m train.compile --config 7b_stage3 --topology v5p:4x8x8
    python -m train.compile --config 7b_stage3 --topology v5e-8 --sampling
    python -m train.compile --config 7b_stage3 --topology h100-1 --sampling --images 16 --int8
    python -m train.compile --all --table compiled.md

The compiler is TPU's own (libtpu, extra `tpu`), which needs no TPU, or XLA's for GPUs (extra `cuda`), which needs none.
What is compiled is the very program that runs there, but that on a GPU XLA also chooses among kernels by timing them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax.io.messages import print_any_text, print_error
from janus_jax.loading import layout
from janus_jax.model.janus import Janus
from janus_jax.processing.images import ImageSettings
from janus_jax.sampling import loops
from janus_jax.sharding import make_mesh, param_shardings
from janus_jax.weights.fuse import fuse
from janus_jax.weights.quantize import quantize
from janus_jax.weights.torch_weights import abstract_params
from train.config import MeshConfig, TrainConfig
from train.overrides import config_names, load_config
from train.plan import hlo
from train.plan.flops import peak_flops, typical_flops
from train.plan.topologies import GIB, GPUS, KNOWN, Topology, laid_out, topology
from train.run.loop import check_mesh
from train.step.state import abstract_batch, abstract_state
from train.step.step import make_train_step

SPARE = 0.05  # of a chip's memory, that a program should leave
_PROMPT = 64  # tokens of a sampled prompt
_MFUS = (0.4, 0.5, 0.6)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a chip needs for a program, in bytes, and what the program does.

    Attributes:
      name, place, mesh: what was compiled, for what.
      parts: bytes of what is passed in, by name.
      temporaries: bytes of intermediate results.
      peak: bytes of everything at the worst moment.
      seconds: of compilation.
      collectives: of one run of the program, by kind.
      accumulate: parts that a training step is worked off in.
      copies: lines of the copies in loops that are as large as a layer's cache or kernel (sampling alone).
      flops: of a training step over all chips.
      accessed: bytes of main memory that one sampling step reads and writes.
      floor: bytes of parameters and cache that a sampling step has to read.
    """

    name: str
    place: Topology
    mesh: dict[str, int]
    parts: dict[str, int]
    temporaries: int
    peak: int
    seconds: float
    collectives: dict[str, hlo.Traffic]
    accumulate: int = 1
    copies: tuple[str, ...] = ()
    flops: float | None = None
    accessed: float | None = None
    floor: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the chip keeps SPARE of its memory."""
        return self.peak <= (1 - SPARE) * self.place.hbm

    def lines(self) -> Iterator[str]:
        """The report of one program."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        yield f"{self.name} on {self.place.name}: {self.place.chips} chips, {mesh}"
        for name, size in (*self.parts.items(), ("temporaries", self.temporaries)):
            yield f"  {name:16} {size / GIB:8.2f} GiB a chip"
        verdict = "" if self.fits else f"; less than {SPARE:.0%} to spare"
        yield (
            f"  {'peak':16} {self.peak / GIB:8.2f} GiB of {self.place.hbm / GIB:.2f} "
            f"({self.peak / self.place.hbm:.0%}){verdict}"
        )
        for kind, traffic in self.collectives.items():
            yield (
                f"  {kind:16} {traffic.count:8,} of {traffic.bytes / GIB:.2f} GiB together on each chip, "
                f"the largest {traffic.largest / GIB:.3f}"
            )
        if self.flops is not None:
            yield f"  {self.flops / 1e15:.2f} PFLOP a step: " + ", ".join(
                f"{seconds:.2f} s at {mfu:.0%} MFU" for mfu, seconds in self.step_seconds().items()
            )
        if self.accessed is not None:
            yield f"  a step moves {self.accessed / GIB:.3f} GiB; parameters and cache are {self.floor / GIB:.3f} GiB"
            yield f"  copies of cache or weights in the loop: {len(self.copies)}"
            yield from (f"    {line[:160]}" for line in self.copies)
        yield f"  compiled in {self.seconds:.0f} s"

    def step_seconds(self) -> dict[float, float]:
        """Seconds that a training step takes, by model FLOPs utilization."""
        return {mfu: self.flops / (mfu * self.place.chips * peak_flops(self.place.device_kind)) for mfu in _MFUS}


# ---------------------------------------------------------------- compiling


def devices_of(place: Topology) -> list[Any]:
    """The devices of `place`, for compilation alone. ImportError where the compiler is missing."""
    from jax.experimental import topologies

    if gpu := GPUS.get(place.generation):
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise ImportError("compiling for GPUs needs JAX's CUDA plugin; pip install 'janus_jax[cuda]'")
        hosts = f"1x{place.name.split(':')[1]}"
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=place.name, target_config=gpu.target(), topology=hosts
        )
        return list(found.devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for TPUs needs libtpu; pip install 'janus_jax[tpu]'")
    found = topologies.get_topology_desc(platform="tpu", topology_name=place.name, **_bounds(place))
    return list(found.devices)


def _bounds(place: Topology) -> dict[str, Any]:
    # A host of the flat slices drives up to eight chips; libtpu takes four for granted.
    if place.generation in ("v5e", "v6e") and place.chips <= 8:
        x, y = (int(n) for n in place.name.split(":")[1].split("x"))
        return {"chips_per_host_bounds": (x, y, 1)}
    return {}


def compile_training(config: TrainConfig, place: Topology) -> Compiled:
    """The train step of `config`, with its own mesh, for `place`."""
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices_of(place))
    check_mesh(config, mesh)
    state, frozen = abstract_state(config, mesh)
    batch = abstract_batch(config, mesh)
    step = make_train_step(config, mesh, ImageSettings(config.model.vision.image_size))
    with jax.set_mesh(mesh):
        made = _compile(step.lower(state, frozen, batch))
    parts = {
        "parameters": _shard_bytes((state.trained, frozen)),
        "optimizer state": _shard_bytes(state.opt_state),
        "batch": _shard_bytes(batch),
    }
    return _report(config.name, place, mesh, parts, made, flops=typical_flops(config), accumulate=config.accumulate)


def compile_sampling(
    config: TrainConfig, place: Topology, images: int = 1, int8: bool = False, decoder: bool = True
) -> list[Compiled]:
    """`config`'s model for `place` in bfloat16: the image loop with guidance and, with `decoder`, the VQ decoder.

    `int8`: see `quantize`. A cache that grows is taken at its largest.
    """
    devices = devices_of(place)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    model = Janus(config.model, dtype=jnp.bfloat16, **layout(config.model, devices[0].platform, on_mesh=True))
    g = config.model.gen_vision

    def on(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    params = abstract_params(config.model, model.scan_layers, "bfloat16")
    params = jax.eval_shape(quantize, params) if int8 else params
    params = jax.eval_shape(fuse, params) if model.fused else params
    params = on(params, param_shardings(params, mesh))
    ids = jax.ShapeDtypeStruct((images, 2, _PROMPT), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    scalar, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    sampler = loops.Sampler(scalar, count, scalar)
    sizes = loops.cache_sizes(model, params, 2 * images, _PROMPT, g.num_tokens)
    with jax.set_mesh(mesh):
        given = (params, ids, mask, keys, scalar, sampler, g.num_tokens, False)
        start = _compile(loops.start_image.lower(model, *given, sizes[0]))
        state = on(loops.start_image.eval_shape(model, *given, sizes[-1]), start.compiled.output_shardings)
        loop = _compile(loops.continue_image.lower(model, params, state, keys, scalar, sampler, count, count))
        codes = jax.ShapeDtypeStruct((images, g.num_tokens), jnp.int32)
        vq = {"gen_vision_model": params["gen_vision_model"]}
        decode = _compile(loops.decode_images.lower(model, vq, codes)) if decoder else None
    cache = _shard_bytes(state.cache)
    decoder = {k: v for k, v in params.items() if k in ("language_model", "gen_aligner", "gen_embed", "gen_head")}
    read = dict(decoder, language_model={k: v for k, v in decoder["language_model"].items() if k.startswith("layers")})
    least = min(
        _shard_bytes(state.cache.keys[0]),
        _shard_bytes(decoder["language_model"]["layers_0"]["self_attn"]["o_proj"]["kernel"]),
    )
    found = tuple(one.line for one in hlo.copies(loop.text, least))
    name = f"{config.name} sampling {images}" + " int8" * int8
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


class DoesNotFit(ValueError):
    """A program that needs more memory than a chip has."""


class _Made(NamedTuple):
    compiled: Any
    text: str
    seconds: float


def _compile(lowered: Any) -> _Made:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        # From a file: the program's own way to text fails on instructions that only TPU's compiler knows.
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        seconds = time.monotonic() - started
        largest = max(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return _Made(compiled, largest.read_text(encoding="utf-8"), seconds)


def _report(name: str, place: Topology, mesh: Mesh, parts: dict[str, int], made: _Made, **more: Any) -> Compiled:
    memory = made.compiled.memory_analysis()
    # What a program does not use lies in memory all the same.
    passed = max(memory.argument_size_in_bytes, sum(parts.values()))
    peak = (
        passed
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(
        name, place, dict(mesh.shape), parts, memory.temp_size_in_bytes, peak, made.seconds,
        hlo.collectives(made.text), **more,
    )  # fmt: skip


def _shard_bytes(tree: Any) -> int:
    """Bytes of `tree`'s arrays on one device."""

    def of(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


# ---------------------------------------------------------------- the command


def jobs(config: TrainConfig, place: Topology | None, sample: bool) -> Iterator[tuple[TrainConfig, Topology]]:
    """What to compile for `config`: on `place`, with its layout there if it has one; without `place` on each."""
    layouts = config.sampling_layouts if sample else config.layouts
    if place is None:
        yield from ((laid_out(config, layout), topology(layout.topology)) for layout in layouts)
        return
    fitting = [layout for layout in layouts if topology(layout.topology) == place and config.mesh == MeshConfig()]
    yield (laid_out(config, fitting[0]) if fitting else config), place


def compile_job(
    config: TrainConfig, place: Topology, sample: bool, images: int = 1, int8: bool = False, decoder: bool = True
) -> list[Compiled]:
    """Everything of one job, or all but the VQ decoder.

    Raises: ValueError in one line where it cannot be compiled, or needs more memory than there is.
    """
    try:
        if sample:
            return compile_sampling(config, place, images, int8, decoder)
        return [compile_training(config, place)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        what = f"{used[1]} of {used[2]} a chip" if used else str(error).split(". ")[0]
        raise DoesNotFit(
            f"{config.name} does not fit {place.name}: {what}; give the mesh more chips, or raise accumulate"
        ) from None


_COLUMNS = ("program", "topology", "mesh", "parts", "parameters", "optimizer", "batch", "temporaries", "peak", "of HBM",
            "collectives a step", "s a step at 50% MFU", "compiled in")  # fmt: skip


def table(compiled: Sequence[Compiled]) -> str:
    """A Markdown table, a line each."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for one in compiled:
        parts = one.parts
        sizes = [parts.get("parameters", 0), parts.get("optimizer state", 0), parts.get("batch", parts.get("cache", 0))]
        rows.append((
            one.name, one.place.name, "x".join(str(n) for n in one.mesh.values()), str(one.accumulate),
            *(f"{size / GIB:.2f}" for size in (*sizes, one.temporaries, one.peak)), f"{one.peak / one.place.hbm:.0%}",
            "; ".join(f"{t.count:,} {kind} {t.bytes / GIB:.2f}" for kind, t in one.collectives.items()) or "none",
            f"{one.step_seconds()[0.5]:.2f}" if one.flops else "", f"{one.seconds:.0f} s",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything compiles and fits, 1 when something does not, 2 for bad input."""
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m train.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="name of a configuration, or path of its file")
    parser.add_argument(
        "--topology",
        help="a TPU slice, as v5e-256 or v5p:4x8x8, or GPUs, as h100-8; default: all that the config names",
    )
    parser.add_argument(
        "--sampling", action="store_true", help="the sampling loop and the VQ decoder, not the train step"
    )
    parser.add_argument("--images", type=int, default=1, help="drawn at once, with --sampling (default 1)")
    parser.add_argument(
        "--int8", action="store_true", help="with --sampling: the decoder's kernels in one byte a weight"
    )
    parser.add_argument("--all", action="store_true", help="every configuration on every topology that it names")
    parser.add_argument("--table", type=pathlib.Path, help="write a Markdown table into this file")
    parser.add_argument("overrides", nargs="*", help="fields of the configuration, as mesh.tensor=2")
    args = parser.parse_args(argv)
    try:
        if bool(args.config) == args.all:
            raise ValueError("give --config NAME, or --all")
        if args.images < 1:
            raise ValueError(f"--images {args.images} is out of range: a whole number from 1")
        if (args.images, args.int8) != (1, False) and not args.sampling:
            raise ValueError("--images and --int8 are for --sampling")
        names = [args.config] if args.config else config_names()
        configs = [load_config(name, args.overrides) for name in names]
        configs = [config for config in configs if isinstance(config, TrainConfig) and (args.config or config.layouts)]
        place = topology(args.topology) if args.topology else None
        kinds = (False, True) if args.all else (args.sampling,)
        todo = [(*job, sample) for sample in kinds for config in configs for job in jobs(config, place, sample)]
        if not todo:
            raise ValueError(f"{args.config} names no topology; give --topology, one of {', '.join(KNOWN)}")
        _environment()
        return _run(todo, args)
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return 2


def _run(todo: Sequence[tuple[TrainConfig, Topology, bool]], args: argparse.Namespace) -> int:
    done: list[Compiled] = []
    decoders: set[Any] = set()  # one program for all models that share it
    failed = 0
    for number, (config, place, sample) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {config.name} on {place.name} ...", file=sys.stderr, flush=True)
        try:
            decoder = (config.model.gen_vision, place) not in decoders
            made = compile_job(config, place, sample, args.images, args.int8, decoder)
        except ValueError as error:
            if len(todo) == 1 and not isinstance(error, DoesNotFit):
                raise
            print_error(error)
            failed += 1
            continue
        print("\n".join(line for one in made for line in one.lines()), flush=True)
        failed += sum(not one.fits for one in made)
        done += made
        decoders |= {(config.model.gen_vision, place)} if sample else set()
        if args.table:
            args.table.write_text(table(done) + "\n", encoding="utf-8")
    if len(todo) > 1:
        print(
            f"{len(done)} programs compiled, {failed} of them or of what is missing do not fit"
            if failed
            else f"{len(done)} programs compiled; all fit"
        )
    return int(failed > 0)


def _environment():
    # libtpu asks the cloud's metadata server otherwise, and would take the host's own TPU.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used that two could quarrel about
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    sys.exit(main())
