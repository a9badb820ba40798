"""Compiles a run for TPUs or GPUs that need not be present, and reports what it would need there.

    python -m train.compile --config 7b_stage3 --topology v5p:4x8x8
    python -m train.compile --config 7b_stage3 --topology 2xv5e-256
    python -m train.compile --config 7b_stage3 --topology v5e-8 --sampling
    python -m train.compile --config 7b_stage3 --topology h100-1 --sampling --images 16 --weights int8
    python -m train.compile --config 7b_stage3 --topology v5e-8 --serving 16
    python -m train.compile --config 7b_stage3 --topology h100-1 --sampling --images 4 --speculate 16
    python -m train.compile --config 7b_stage3 --topology v5p-128 --tune
    python -m train.compile --config grpo_7b --topology v5p-64
    python -m train.compile --all --table compiled.md

It uses TPU's own compiler (libtpu, extra `tpu`), which needs no TPU, or XLA's for GPUs (extra `cuda`), without a GPU.
The program is exactly the one that would run there, except that on a GPU, XLA also chooses kernels by timing them.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from janus_jax.io.messages import print_any_text, print_error
from janus_jax.weights.quantize import FORMS
from train.config import MeshConfig, TrainConfig
from train.overrides import config_names, load_config
from train.plan.drawing import compile_sampling, compile_serving
from train.plan.hlo import Traffic
from train.plan.programs import Compiled, DoesNotFit, compile_training
from train.plan.reinforcement import compile_reinforcement, step_table
from train.plan.topologies import GIB, KNOWN, Topology, laid_out, topology
from train.plan.tune import near, report, tune

# ---------------------------------------------------------------- the command


def jobs(config: TrainConfig, place: Topology | None, sample: bool) -> Iterator[tuple[TrainConfig, Topology]]:
    """What to compile for `config`: for `place`, with its layout there if it has one; for None, all its layouts."""
    layouts = config.sampling_layouts if sample else config.layouts
    if place is None:
        yield from ((laid_out(config, layout), topology(layout.topology)) for layout in layouts)
        return
    fitting = [layout for layout in layouts if topology(layout.topology) == place and config.mesh == MeshConfig()]
    yield (laid_out(config, fitting[0]) if fitting else config), place


_COLUMNS = ("program", "topology", "mesh", "micro-batches", "parameters", "optimizer", "batch", "temporaries", "peak",
            "of HBM", "collectives a step", "between slices", "overlapped", "executed / needed FLOPs",
            "s a step at 50% MFU", "compiled in")  # fmt: skip


def table(compiled: Sequence[Compiled]) -> str:
    """A Markdown table with a row for each program."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for one in compiled:
        bytes_of = one.arguments.get
        batch = bytes_of("batch", bytes_of("cache", 0))
        sizes = [bytes_of("parameters", 0), bytes_of("optimizer state", 0), batch]
        rows.append((
            one.name, one.place.name, "x".join(str(n) for n in one.mesh.values()), str(one.accumulate),
            *(f"{size / GIB:.2f}" for size in (*sizes, one.temporaries, one.peak)), f"{one.peak / one.place.hbm:.0%}",
            _traffic(one.collectives), _traffic(one.between),
            f"{one.overlap:.0%}", f"{one.recomputation:.3f}" if one.needed else "",
            f"{one.step_seconds()[0.5]:.2f}" if one.flops else "", f"{one.seconds:.0f} s",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _traffic(found: Mapping[str, Traffic]) -> str:
    return "; ".join(f"{t.count:,} {kind} {t.bytes / GIB:.2f}" for kind, t in found.items()) or "none"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything compiles and fits, 1 when something does not, 2 for bad input."""
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m train.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="name of a configuration, or path of its file")
    parser.add_argument(
        "--topology",
        help="TPU slices such as v5e-256, v5p:4x8x8 or 2xv5e-256, or GPUs such as h100-8; default: all that the config "
        "names",
    )
    parser.add_argument(
        "--sampling", action="store_true", help="compile the sampling loop and VQ decoder instead of the train step"
    )
    parser.add_argument("--images", type=int, default=1, help="with --sampling: images drawn at once (default 1)")
    parser.add_argument(
        "--serving", type=int, metavar="SLOTS", help="compile the step of a server of so many slots instead"
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=False,
        metavar="CODES",
        help="with --sampling or --serving: a pass that gives each image so many codes",
    )
    parser.add_argument(
        "--weights", choices=FORMS, help="with --sampling or --serving: quantized kernels in the decoder"
    )
    parser.add_argument("--all", action="store_true", help="compile every config on every topology that it names")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="compile the train step with other meshes, micro-batches and remat, too, and compare them",
    )
    parser.add_argument("--table", type=pathlib.Path, help="write a Markdown table into this file")
    parser.add_argument("overrides", nargs="*", help="fields of the config, such as mesh.tensor=2")
    args = parser.parse_args(argv)
    try:
        if bool(args.config) == args.all:
            raise ValueError("give --config NAME, or --all")
        if args.images < 1:
            raise ValueError(f"--images must be at least 1, got {args.images}")
        if args.serving is not None and (args.serving < 2 or args.sampling or args.all):
            raise ValueError("--serving takes at least 2 slots, and neither --sampling nor --all")
        sampling = args.sampling or bool(args.serving)
        if (args.images != 1 and not args.sampling) or (args.weights and not sampling):
            raise ValueError("--images and --weights are for --sampling, and --weights for --serving")
        if args.speculate is not False and not sampling:
            raise ValueError("--speculate is for --sampling and --serving")
        if args.tune and (sampling or not args.config):
            raise ValueError("--tune is for the train step of one --config")
        names = [args.config] if args.config else config_names()
        configs = [load_config(name, args.overrides) for name in names]
        configs = [config for config in configs if isinstance(config, TrainConfig) and (args.config or config.layouts)]
        place = topology(args.topology) if args.topology else None
        kinds = (False, True) if args.all else (sampling,)
        todo = [(*job, sample) for sample in kinds for config in configs for job in jobs(config, place, sample)]
        if not todo:
            raise ValueError(f"{args.config} names no topology; give --topology, one of {', '.join(KNOWN)}")
        _environment()
        if args.tune:
            return _tune(todo, args)
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
        made: list[Compiled] = []
        try:
            decoder = (config.model.gen_vision, place) not in decoders
            for one in _compiled(config, place, sample, args, decoder):
                print("\n".join(one.lines()), flush=True)
                made.append(one)
            if made[0].part:
                print("\n".join(step_table(config, made)), flush=True)
        except ValueError as error:
            if len(todo) == 1 and not isinstance(error, DoesNotFit):
                raise
            print_error(error)
            failed += 1
        failed += sum(not one.fits for one in made)
        done += made
        decoders |= {(config.model.gen_vision, place)} if sample else set()
        if args.table:
            args.table.write_text(table(done) + "\n", encoding="utf-8")
    if len(todo) > 1:
        print(
            f"{len(done)} programs compiled; {failed} failed or do not fit"
            if failed
            else f"{len(done)} programs compiled; all fit"
        )
    return int(failed > 0)


def _compiled(
    config: TrainConfig, place: Topology, sample: bool, args: argparse.Namespace, decoder: bool
) -> Iterable[Compiled]:
    if args.serving:
        return compile_serving(config, place, args.serving, args.weights, args.speculate)
    if sample:
        return compile_sampling(config, place, args.images, args.weights, decoder, args.speculate)
    if config.grpo or config.dpo:
        return compile_reinforcement(config, place)
    return [compile_training(config, place)]


def _tune(todo: Sequence[tuple[TrainConfig, Topology, bool]], args: argparse.Namespace) -> int:
    done: list[Compiled] = []
    failed = 0
    given = any(override.startswith("mesh.") for override in args.overrides)
    for config, place, _ in todo:
        meshes = [config.mesh] if given else near(config.mesh, place)
        found = tune(config, place, meshes, lambda line: print(line, file=sys.stderr, flush=True))
        if not found:
            print_error(f"{config.name}: no layout that was tried fits on {place.name}; give the mesh more chips")
            failed += 1
        print("\n".join(report(found)), flush=True)
        done += [made for _, made in found]
        if args.table:
            args.table.write_text(table(done) + "\n", encoding="utf-8")
    return int(failed > 0)


def _environment():
    # Otherwise libtpu would query the cloud's metadata server, and use the host's own TPU.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so processes cannot conflict
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    sys.exit(main())
