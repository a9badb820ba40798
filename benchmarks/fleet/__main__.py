"""Measures preparation by several processes on the same cores, and how far VQ encoding is hidden behind reading.

    python -m benchmarks.fleet [--samples 384] [--processes 2] [--rounds 3]

Captions with photographs (JPEG, 640 x 480) are prepared for generation, with a small VQ encoder on these cores, by one
process and by several that take parts of the shards (`--part`). They start together, compiled; starting and compiling
are not counted. The second table is of one process whose encoder is a clock, as slow as reading is: an accelerator that
takes nothing of these cores. Where encoding is hidden, the whole takes as long as the slower of the two, not their sum.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.common import runs as common
from benchmarks.data import write_captions
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.io.messages import print_any_text

_BATCH, _SHARD = 8, 48


class _Clock:
    """An encoder that computes nothing, and takes `seconds` for each batch, one after the other."""

    def __init__(self, seconds: float, tokens: int):
        self.seconds, self.tokens, self.free = seconds, tokens, 0.0

    def __call__(self, images: np.ndarray) -> Any:
        self.free = max(self.free, time.monotonic()) + self.seconds
        return _Later(self.free, np.zeros((len(images), self.tokens), np.int32))


class _Later:
    """An array that is ready at `due`."""

    def __init__(self, due: float, array: np.ndarray):
        self.due, self.array = due, array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return self.array


def _encoder() -> Any:
    """A small VQ encoder of 384 x 384 pixels on these cores, with random weights, compiled."""
    import jax
    import jax.numpy as jnp

    from janus_jax.config import VQConfig
    from janus_jax.model.vq import VQModel

    config = VQConfig(ch=8, num_res_blocks=1, z_channels=32, norm_groups=8)
    model = VQModel(config)
    images = np.zeros((_BATCH, config.image_size, config.image_size, 3), np.float32)
    few = jnp.zeros((1, config.downsampling, config.downsampling, 3))  # parameters do not depend on the size
    params = model.init(jax.random.key(0), few, method="encode")
    encode = jax.jit(lambda params, images: model.apply(params, images, method="encode"))
    jax.block_until_ready(encode(params, images))
    return functools.partial(encode, params)


def work(folder: pathlib.Path, part: str, encoding: str) -> dict[str, float]:
    """Prepares a part once a line comes on standard input; with a clock's seconds for `encoding`, with a clock."""
    from janus_jax.processing.chat import Processor
    from train.fleet.preparation import Preparation, PrepareOptions
    from train.fleet.shares import Part
    from train.overrides import load_config
    from train.raw.sources import open_source

    config = load_config("7b_stage3").model
    processor = Processor.from_folder(folder / "tokenizer", config)
    encode = _Clock(float(encoding), config.gen_vision.num_tokens) if encoding else _encoder()
    index, count = (int(number) for number in part.split("/"))
    options = PrepareOptions(shard_size=_SHARD, batch_size=_BATCH)
    print("ready", flush=True)
    out = sys.stdin.readline().strip()
    source = open_source(folder / "source" / "captions.jsonl", "captions")
    began, cpu = time.monotonic(), time.process_time()
    made = Preparation(source, out, "generation", processor, options, encode=encode, progress=False)
    report = made.run(Part(index, count))
    return {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "read": report.read}


def prepare(folder: pathlib.Path, processes: int, encoding: str = "") -> tuple[float, float]:
    """Seconds until the last of `processes` is done with its part, and the seconds of processor of all of them."""
    own = [sys.executable, "-m", "benchmarks.fleet", "--folder", str(folder), f"--encoding={encoding}", "--part"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*own, f"{index}/{processes}"], **pipes) for index in range(processes)]
    for worker in workers:
        if worker.stdout.readline() != "ready\n":
            raise SystemExit("error: a process of the preparation failed, see above")
    out = tempfile.mkdtemp(dir=folder)
    began = time.monotonic()
    for worker in workers:
        worker.stdin.write(f"{out}/prepared\n")
        worker.stdin.flush()
    told = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    return time.monotonic() - began, sum(one["cpu"] for one in told)


def main(argv: list[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=common.count, default=384, help="(default %(default)s)")
    parser.add_argument("--processes", type=common.count, default=2, help="beside one alone (default %(default)s)")
    parser.add_argument("--rounds", type=common.count, default=3, help="of all, by turns (default %(default)s)")
    for hidden in ("--folder", "--part", "--encoding"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder:
        print(json.dumps(work(pathlib.Path(args.folder), args.part, args.encoding)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder / "tokenizer", image_size=384, num_image_tokens=576)
        write_captions(folder / "source", args.samples)
        print(several(folder, args), "\n", hidden_encoding(folder, args), sep="\n")
    return 0


def several(folder: pathlib.Path, args: argparse.Namespace) -> str:
    """A table of samples/s by one process and by several."""
    counts = (1, args.processes)
    runs: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for number in range(args.rounds):
        for count in counts:
            print(f"round {number + 1} of {args.rounds}: {count} at once", file=sys.stderr, flush=True)
            runs[count].append(prepare(folder, count))
    rows: common.Table = [("processes", "samples/s", "x one process", "CPU ms a sample")]
    for count in counts:
        ratio = statistics.median(one[0] / own[0] for one, own in zip(runs[1], runs[count], strict=True))
        seconds, cpu = (statistics.median(values) for values in zip(*runs[count], strict=True))
        cells = (args.samples / seconds, ratio, 1e3 * cpu / args.samples)
        rows.append((str(count), *map(common.cell, cells)))
    return common.markdown(rows)


def hidden_encoding(folder: pathlib.Path, args: argparse.Namespace) -> str:
    """A table of the seconds that reading, encoding by a clock, and both together take."""
    batches = sum(-(-min(_SHARD, args.samples - first) // _BATCH) for first in range(0, args.samples, _SHARD))
    rows: common.Table = [("reading and writing s", "encoding s", "both s", "hidden of the shorter")]
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}: encoding by a clock", file=sys.stderr, flush=True)
        reading = prepare(folder, 1, "0")[0]
        both = prepare(folder, 1, str(reading / batches))[0]
        hidden = (2 * reading - both) / reading
        rows.append((*map(common.cell, (reading, reading, both)), f"{hidden:.0%}"))
    return common.markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
