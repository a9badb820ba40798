"""Measures what grows with the number of samples: preparation, merge, opening, first batch and resume at 100 million.

    python -m benchmarks.index [--samples 100000000] [--shards 12000] [--folder DIR]

Only the index is real, 16 bytes a sample: the shards are one file under many names, and the source makes each text when
it is asked for. Each row is a process of its own that may open 1,024 files.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from examples.tiny.run import MODEL
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.io.messages import print_any_text
from janus_jax.processing.chat import Processor
from train.config import DataConfig
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.data.prepared import META, open_prepared
from train.data.shard_files import data_file, index_file
from train.fleet.merge import merge
from train.fleet.preparation import Preparation, PrepareOptions
from train.fleet.shares import Part
from train.raw import indices
from train.raw.sources import RawSample, open_source

HANDLES = 1024
CONTEXT, ROWS, STEP = 4096, 256, 200_000
_WORDS = ("a", "small", "red", "house", "stands", "beside", "the", "river", "where", "many", "birds")


class Texts:
    """So many texts, each made when it is asked for; all shards of `period` texts are the same."""

    def __init__(self, count: int, period: int):
        self.count, self.period = count, period
        self.description = {"path": "virtual", "format": "json", "schema": "text", "samples": count, "bytes": 0}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> RawSample:
        rng = np.random.default_rng(index % self.period)
        return RawSample("virtual", text=" ".join(rng.choice(_WORDS, int(rng.integers(20, 200)))))


def preparation(folder: pathlib.Path, samples: int, shards: int) -> Preparation:
    processor = Processor.from_folder(folder / "tokenizer", MODEL)
    size = -(-samples // shards)
    options = PrepareOptions(context=CONTEXT, shard_size=size)
    return Preparation(Texts(samples, size), folder / "prepared", "text", processor, options, progress=False)


def write(folder: pathlib.Path, samples: int, shards: int) -> None:
    """Two real shards, the first under the names of all but the last; not merged."""
    write_tokenizer(folder / "tokenizer", image_size=MODEL.vision.image_size)
    made = preparation(folder, samples, shards)
    for shard in (0, made.count - 1):
        made.run(Part(shard, made.count))
    out = folder / "prepared"
    for shard in range(1, made.count - 1):
        for name in (data_file, index_file):
            os.link(out / name(0), out / name(shard))


def write_lines(folder: pathlib.Path, samples: int) -> None:
    """A file of JSON lines, of which only the index has so many: they are all the same line."""
    path, line = folder / "lines.jsonl", b'{"text": "A red house stands beside the river."}\n'
    path.write_bytes(line * (indices.KEPT_FROM // len(line) + 1))

    def build(add: Any) -> dict[str, Any]:
        for first in range(0, samples, 1 << 20):
            count = min(samples - first, 1 << 20)
            add(indices.rows_of(np.zeros(count), np.full(count, len(line)), np.arange(count) + first + 1, first))
        return {}

    indices.index_of(path, folder / "index", "lines", build)


# ---------------------------------------------------------------- what is measured, each in its own process


def _lines(folder: pathlib.Path, samples: int, shards: int) -> str:
    source = open_source(folder / "lines.jsonl", index=folder / "index")
    found = {source[index].text for index in np.linspace(0, len(source) - 1, 1000).astype(int).tolist()}
    assert len(found) == 1
    return f"{len(source):,} lines, {indices.ROW.itemsize} bytes each"


def _plan(folder: pathlib.Path, samples: int, shards: int) -> str:
    made = preparation(folder, samples, shards)
    return f"{made.count:,} shards of {made.shard_size:,} samples"


def _resume(folder: pathlib.Path, samples: int, shards: int) -> str:
    made = preparation(folder, samples, shards)
    return f"{sum(1 for _ in made.done(range(made.count))):,} shards are complete"


def _merge(folder: pathlib.Path, samples: int, shards: int) -> str:
    report = merge(folder / "prepared")
    return f"{report.kept:,} samples, {report.tokens:,} tokens"


def _open(folder: pathlib.Path, samples: int, shards: int) -> str:
    return f"fingerprint {open_prepared(folder / 'prepared').fingerprint}"


def _assembler(folder: pathlib.Path) -> Assembler:
    data = DataConfig(text=(str(folder / "prepared"),), ratio=(0, 1, 0), context=CONTEXT, images_per_row=0)
    processor = Processor.from_folder(folder / "tokenizer", MODEL)
    return Assembler(Mixture(data, ROWS, seed=0), processor.settings, 0, -1)


def _first(folder: pathlib.Path, samples: int, shards: int) -> str:
    return _batch(_assembler(folder), 0)


def _later(folder: pathlib.Path, samples: int, shards: int) -> str:
    return _batch(_assembler(folder), STEP)


def _batch(assembler: Assembler, step: int) -> str:
    batch, report = assembler(step)
    assert not report["problems"], report["problems"]
    return f"batch {step:,}: {len(batch['ids'])} rows, {report['samples']:,} samples"


STAGES = {
    "open JSON lines": _lines,
    "plan the preparation": _plan,
    "resume the preparation": _resume,
    "merge": _merge,
    "open for training": _open,
    "mixture and first batch": _first,
    f"resume at step {STEP:,}": _later,
}


def measure(folder: pathlib.Path, samples: int, shards: int, stage: str) -> dict[str, Any]:
    begin, cpu = time.monotonic(), time.process_time()
    told = STAGES[stage](folder, samples, shards)
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    own = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))  # noqa: SIM115
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "own": int(own) / 2**20, "told": told}


def run_stage(folder: pathlib.Path, samples: int, shards: int, stage: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.index", "--folder", folder, "--stage", stage]
    command += ["--samples", samples, "--shards", shards]
    done = subprocess.run(
        [str(word) for word in command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (HANDLES, HANDLES)),
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{stage}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=12_000)
    parser.add_argument("--folder", type=pathlib.Path, help="where the index is kept (default: nowhere)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measure(args.folder, args.samples, args.shards, args.stage)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or pathlib.Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "prepared" / META).exists():
            write(folder, args.samples, args.shards)
            write_lines(folder, args.samples)
        print(f"{args.samples:,} samples in {args.shards:,} shards, at most {HANDLES:,} open files\n")
        print("| | seconds | CPU seconds | peak GiB | of it not mapped files | |\n|---|---|---|---|---|---|")
        for stage in STAGES:
            found = run_stage(folder, args.samples, args.shards, stage)
            print(
                f"| {stage} | {found['seconds']:.1f} | {found['cpu']:.1f} | {found['peak']:.2f} | {found['own']:.2f} | "
                f"{found['told']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
