"""Draws a benchmark's pictures: `python -m evals.generation.draw --benchmark geneval --prompts FILE --out DIR ...`.

Stopped and started again, the command goes on and ends with the same pictures. `python -m evals.main` draws GenEval's
and DPG-Bench's too, and scores them.
"""

from __future__ import annotations

import argparse
import pathlib

from evals import hosts, model
from evals.generation.drawing import How, brush, draw_all, drawn_with, settle, write_map
from evals.generation.prompts import BENCHMARKS
from janus_jax.io import commands
from janus_jax.io.messages import one_line
from janus_jax.io.stores import local_only
from janus_jax.sampling.sampler import check_count


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evals.generation.draw", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument(
        "--prompts", type=pathlib.Path, required=True, metavar="PATH", help="its file or folder of them"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--samples", type=int, metavar="N", help="pictures of a prompt (default: the benchmark's)")
    parser.add_argument("--limit", type=int, metavar="N", help="draw only the first prompts")
    How.add_options(parser)
    model.add_options(parser)
    hosts.add_options(parser)
    args = parser.parse_args(argv)
    return commands.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    for name in ("samples", "limit"):
        if getattr(args, name) is not None:
            check_count("--" + name, getattr(args, name))
    how, out = How.of(args), local_only(args.out)
    hosts.start(args.coordinator, args.processes, args.process)
    hosts.check_mesh(args.mesh)
    read, samples = BENCHMARKS[args.benchmark]
    samples = args.samples or samples
    with hosts.together():  # before minutes of loading
        every = read(args.prompts, out, samples)
        drawings = every[: args.limit]
        ours = drawn_with(model.asked_identity(args), args.benchmark, samples, how, every)
        if hosts.is_first():
            settle(out, ours)
    asked = model.Asked(args)
    draw_all(drawings, brush(lambda: asked.janus, how), args.benchmark, how.per_call)
    if hosts.is_first():
        if args.benchmark == "geneval2":
            write_map(out, drawings)
        print(f"{len(drawings):,} of {len(every):,} prompts are drawn in {one_line(out)}")


if __name__ == "__main__":
    commands.leave(main())
