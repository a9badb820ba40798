"""Seconds until a model draws: `janus_jax.load`, compilation, and the first run of each program.

`python -m benchmarks.load --preset janus_pro_1b` writes random weights as a torch checkpoint into a temporary folder,
converts them, and starts a process for each variant, which finds the converted files on disk and not in memory (their
pages are dropped before), and its compilation cache as in `benchmarks.compile`. Start is everything before
`janus_jax.load`: the interpreter, imports, the device. With `--whole` each process then draws the whole image, and the
table also has the seconds from its start to the pixels; with `--until-loaded` it ends once the parameters are there.

`--weights int8` or `int4` quantizes while loading, and `--source torch` loads the torch checkpoint itself. On Linux the
table ends with the most memory that was resident until the parameters were there (pages of files that were read count)
and what of it is neither theirs nor was there before.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time

from benchmarks.common import device as _device
from benchmarks.common import runs as common
from benchmarks.compile import CACHES, cache_environment, compile_programs

_NAMES = ("prefill", "loop", "VQ decode")
_STARTED = "JANUS_BENCHMARK_STARTED"


def write_checkpoint(folder: pathlib.Path, preset: str, kind: str = "converted") -> pathlib.Path:
    """A checkpoint of `preset` with random bfloat16 weights, under `folder`; returns where it lies.

    `kind` is "converted", or "torch" for the original layout in two shards.
    """
    from benchmarks.convert import write_random_checkpoint
    from janus_jax.config import get_preset
    from janus_jax.weights.conversion import from_torch

    source, converted = folder / "torch", folder / "converted"
    source.mkdir()
    write_random_checkpoint(source, get_preset(preset))
    if kind == "torch":
        return source
    from_torch(source, converted)
    shutil.rmtree(source)
    return converted


def drop_pages(folder: pathlib.Path) -> int:
    """Has the system forget the pages of all files in `folder`; returns their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a page that is not on disk yet stays
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


def peak_gib() -> float:
    """The most memory that was ever resident in this process, in GiB; 0 where the system does not say."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return max([0.0, *(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))])


def measure(checkpoint: pathlib.Path, whole: bool, weights: str | None, until_loaded: bool = False) -> common.Run:
    """Loads, compiles and draws once, in this process; or only loads."""
    import jax

    import janus_jax
    from janus_jax.weights.quantize import array_bytes

    jax.block_until_ready(jax.numpy.zeros(()))
    started = float(os.environ[_STARTED])
    run: common.Run = {"start": time.time() - started}
    before, began = peak_gib(), time.perf_counter()
    janus = janus_jax.load(checkpoint, weights=weights, progress=False)
    jax.block_until_ready(janus.params)
    run |= {"load": time.perf_counter() - began, "dtype": str(janus.model.dtype)}
    memory: common.Run = {"peak GiB": peak_gib()}
    params = sum(array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(janus.params)) / 2**30
    memory["beyond GiB"] = memory["peak GiB"] - before - params
    if until_loaded:
        return run | (memory if memory["peak GiB"] else {})
    programs, seconds = compile_programs(janus.model, janus.params, _NAMES)
    run |= {f"{name} {what}": value for name, own in seconds.items() for what, value in own.items()}
    prefill, loop, decode = (programs[name] for name in _NAMES)
    run["prefill run"], state = _device.timed(prefill[0], janus.params, *prefill[1])
    run["loop run"], state = _device.timed(loop[0], janus.params, state, *loop[1])
    second = time.time() - started
    # Small programs that make arguments, and whatever else lies between the parts.
    run["rest"] = second - sum(value for value in run.values() if isinstance(value, float))
    run["second code"] = second
    if whole:
        *drawing, _, drawn = loop[1]
        stop = jax.numpy.int32(janus.config.gen_vision.num_tokens)
        run["other steps"], state = _device.timed(loop[0], janus.params, state, *drawing, drawn, stop)
    run["VQ decode run"], _ = _device.timed(decode[0], janus.params, state.codes)
    if whole:
        run["image"] = time.time() - started
    return run | (memory if memory["peak GiB"] else {})


def table(runs: common.Runs, whole: bool) -> common.Table:
    """A row for each part, in the order in which they come; a column for each variant."""
    good = common.done(runs)
    parts = {"start": "start", "load": "load"}
    parts |= {f"{name} {what}": f"{name}: {what}" for name in _NAMES for what in ("trace", "compile")}
    parts |= {"prefill run": "prefill: first run", "loop run": "loop: first step"}
    parts |= {"rest": "small programs, and what else there is"}
    parts |= {"second code": "**start to the second code**"}
    parts |= {"other steps": "loop: all other steps"} if whole else {}
    parts |= {"VQ decode run": "VQ decode: first run"}
    parts |= {"image": "**start to the first image**"} if whole else {}
    parts |= {"peak GiB": "GiB: most that was resident until loaded"}
    parts |= {"beyond GiB": "GiB: of these beyond the parameters and what was there before"}
    rows = [("seconds", *good)]
    parts = {key: name for key, name in parts.items() if all(key in run for own in good.values() for run in own)}
    for key, name in parts.items():
        rows.append((name, *(common.cell(common.median(own, key)) for own in good.values())))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("load", __doc__)
    parser.add_argument("--whole", action="store_true", help="draw a whole image, and tell when it was there")
    parser.add_argument("--until-loaded", action="store_true", help="stop once the parameters are there")
    parser.add_argument("--weights", choices=("int8", "int4"), help="quantize while loading (default: no)")
    parser.add_argument("--source", choices=("converted", "torch"), default="converted", help="(default %(default)s)")
    parser.add_argument("--checkpoint", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.json:
        return _device.answer(measure(args.checkpoint, args.whole, args.weights, args.until_loaded))
    if args.whole and args.until_loaded:
        parser.error("--whole draws an image, --until-loaded draws none; give one of them")
    variants = common.chosen(parser, args, CACHES)
    with tempfile.TemporaryDirectory(prefix="janus_load_") as name:
        folder = pathlib.Path(name)
        checkpoint = write_checkpoint(folder, args.preset, args.source)
        num_bytes = drop_pages(checkpoint)

        def environment(number: int, variant: str) -> dict[str, str]:
            drop_pages(checkpoint)
            return cache_environment(folder / "cache", number, variant) | {_STARTED: str(time.time())}

        child = [*arguments, "--checkpoint", str(checkpoint)]
        runs = common.run_rounds("load", child, variants, args.rounds, environment)
    form = f" with {args.weights} weights" if args.weights else ""
    drawn = "" if args.until_loaded else "one image with guidance; "
    about = (
        f"{args.preset}, {args.source}, {common.cell(num_bytes / 1e9)} GB on disk in bfloat16, not in memory; "
        f"computed in {common.dtype_of(runs)}{form}; {drawn}median of {args.rounds} rounds."
    )
    return common.publish("load", "Loading", about, table(runs, args.whole), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
