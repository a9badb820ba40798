"""Prepares training data: `python -m train.prepare --kind generation --source captions.jsonl --model DIR --out DIR`.

Reads any format and schema of `train.raw.sources`, checks and tokenizes every sample, encodes generation images to
codes, and writes a folder for `train.data.prepared.open_prepared`. Each shard covers a fixed range of the source and
appears when it is complete, so that an interrupted run resumes with the missing shards and produces the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from janus_jax.io.messages import print_any_text, print_error
from janus_jax.processing.chat import Processor
from janus_jax.sampling.memory import OutOfMemory
from train.config import PREPARED
from train.data.shards import Encode
from train.data.tokenize import STORES
from train.fleet import ray_engine
from train.fleet.encoder import vq_encoder
from train.fleet.job import Job
from train.fleet.merge import Report, merge
from train.fleet.preparation import Preparation, PrepareOptions
from train.fleet.shares import ALL, Part, find_part, parse_part
from train.raw.sources import FORMATS, NAMES, SCHEMAS, RawSample

__all__ = ["Report", "main", "prepare", "vq_encoder"]


def prepare(
    source: Sequence[RawSample],
    out: str | os.PathLike,
    kind: str,
    processor: Processor,
    *,
    encode: Encode | None = None,
    vq_fingerprint: str = "",
    progress: bool | None = None,
    part: Part = ALL,
    **options: Any,
) -> Report:
    """Writes the prepared folder `out`, or the rest of it; the bytes depend neither on `workers` nor on `part`.

    Args:
      source: from `train.raw.sources.open_source`, or any sequence of `RawSample`.
      out: the folder to write; a folder begun with other settings is refused.
      kind: 'understanding', 'text', 'generation' or 'preference'.
      processor: the processor of the checkpoint to be trained.
      encode: for generation and preference: float32 images [B, h, w, 3] in [-1, 1] to int32 codes [B, num_tokens]; B is
        `batch_size`, but at least as many as a sample has.
      vq_fingerprint: fingerprint of the VQ model of `encode`, see `vq_encoder`.
      progress: whether to show a bar; default in a terminal or a notebook.
      part: the share of this process, where several prepare the same folder; whichever ends last finishes it.
      options: attributes of `PrepareOptions`, such as `context`, `shard_size` and `batch_size`.
    Raises: ValueError with the counts by reason for too many bad samples, and for inconsistent arguments.
    """
    given = {"encode": encode, "vq_fingerprint": vq_fingerprint, "progress": progress}
    return Preparation(source, out, kind, processor, PrepareOptions(**options), **given).run(part)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Returns 0 on success, 2 for bad input (with one line on standard error), 130 if interrupted."""
    print_any_text()
    args = _parser().parse_args(argv)
    try:
        if args.merge:
            _say(merge(args.out, args.max_bad_share))
            return 0
        if absent := [name for name in ("kind", "source", "model") if getattr(args, name) is None]:
            raise ValueError(f"{' and '.join(f'--{name}' for name in absent)} missing; see --help")
        names = [field.name for field in dataclasses.fields(Job)]
        report = _run(Job(**{name: getattr(args, name) for name in names}), args)
    except (OSError, ValueError) as error:
        print_error(error)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not OutOfMemory.says(error):
            raise
        print_error(f"{args.batch_size} images at a time do not fit in memory; lower --batch-size")
        return 2
    except MemoryError:
        print_error("out of memory; run the same command again with lower --workers or --batch-size to continue")
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue from here", file=sys.stderr)
        return 130
    _say(report)
    return 0


def _run(job: Job, args: argparse.Namespace) -> Report:
    if args.engine == "ray":
        if args.part:
            raise ValueError("--part is for processes without an engine; Ray shares the work by itself")
        return ray_engine.run(job, args.address)
    if args.address:
        raise ValueError("--address is that of a Ray cluster; add --engine ray")
    part = parse_part(args.part) if args.part else find_part()
    if part.count > 1:
        _say(f"{part}, by {part.told}")
    source = job.open_source(part)
    _say(source)
    return job.join(source).run(part)


def _say(what: Any):
    # Names in the data may contain characters that the terminal's or file's encoding lacks.
    encoding = sys.stdout.encoding or "utf-8"
    print(str(what).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.prepare", description="Prepares data for training.")
    usual = {field.name: field.default for field in dataclasses.fields(PrepareOptions)}
    parser.set_defaults(**usual)
    parser.add_argument("--kind", choices=PREPARED)
    parser.add_argument("--source", metavar="PATH", help="file, folder or glob")
    parser.add_argument(
        "--format", choices=NAMES, metavar="FORMAT", help=f"of the files: {', '.join(FORMATS)} (default: detected)"
    )
    parser.add_argument("--schema", choices=SCHEMAS, help="of the records (default: detected by their fields)")
    parser.add_argument("--images", metavar="DIR", help="folder for image paths (default: that of the source file)")
    parser.add_argument(
        "--allow-outside", action="store_true", help="allow image paths outside that folder (absolute, .., links)"
    )
    parser.add_argument("--names", metavar="FILE", help="names of category folders, as JSON or lines")
    parser.add_argument("--model", help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--context", type=int, help=f"the most tokens of a sample (default {usual['context']})")
    parser.add_argument("--shard-size", type=int, help="samples of the source per file (default: 8192 or more)")
    parser.add_argument("--max-bad-share", type=float, help=f"stop above this share (default {usual['max_bad_share']})")
    parser.add_argument(
        "--batch-size", type=int, help=f"images encoded at a time by each device (default {usual['batch_size']})"
    )
    parser.add_argument("--system-prompt", help="for conversations without one; empty for none")
    parser.add_argument(
        "--store",
        choices=STORES,
        help="store understanding images as their files, or as PNGs of the pixels the model sees (default original)",
    )
    parser.add_argument("--workers", type=int, help="threads that read and decode (default: one per core)")
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="make only the share I, from 0, of N processes (default: as SLURM or a TPU slice says, else all)",
    )
    parser.add_argument("--engine", choices=("ray",), help="a cluster that makes the shards, instead of this process")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster, or auto (default: this machine)")
    parser.add_argument("--merge", action="store_true", help="finish the folder --out, whose shards are all complete")
    return parser


if __name__ == "__main__":
    sys.exit(main())
