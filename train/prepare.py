"""Prepares training data: `python -m train.prepare --kind generation --source captions.jsonl --model DIR --out DIR`.

Reads any format and schema of `train.raw.sources`, checks and tokenizes every sample, encodes generation images to
codes, and writes a folder for `train.data.prepared.open_prepared`. Each shard covers a fixed range of the source and
appears when it is complete, so that an interrupted run resumes with the missing shards and produces the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from janus_jax.config import read_config
from janus_jax.hub import resolve
from janus_jax.io.messages import print_any_text, print_error
from janus_jax.io.progress import shown, step_bar
from janus_jax.io.store_access import is_store
from janus_jax.io.store_cache import local_copy
from janus_jax.io.stores import as_path
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from janus_jax.sampling.memory import OutOfMemory
from train.config import KINDS
from train.data.prepared import IMAGES
from train.data.shard_files import index_file, read_indices
from train.data.shards import Encode, ShardWriter
from train.data.tokenize import STORES, SampleTokenizer, resized_by, tokenizer_fingerprint
from train.fleet.encoder import vq_encoder
from train.fleet.folder import begin, probe
from train.fleet.merge import Report, drop_indices, finish, pictures, read_dropped
from train.raw.sources import FORMATS, NAMES, SCHEMAS, RawSample, open_source

_REQUESTS = 32  # to a store at a time


def prepare(
    source: Sequence[RawSample],
    out: str | os.PathLike,
    kind: str,
    processor: Processor,
    *,
    encode: Encode | None = None,
    vq_fingerprint: str = "",
    context: int = 4096,
    shard_size: int = 8192,
    batch_size: int = 32,
    max_bad_share: float = 0.01,
    system_prompt: str = SYSTEM_PROMPT,
    store: str = "original",
    workers: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Writes the prepared folder `out`, or the rest of it; the bytes do not depend on `workers`.

    Args:
      source: from `train.raw.sources.open_source`, or any sequence of `RawSample`.
      out: the folder to write; a folder begun with other settings is refused.
      kind: 'understanding', 'text' or 'generation'.
      processor: the processor of the checkpoint to be trained.
      encode: for generation: float32 images [B, h, w, 3] in [-1, 1] to int32 codes [B, num_tokens], B = `batch_size`.
      vq_fingerprint: fingerprint of the VQ model of `encode`, see `vq_encoder`.
      context: samples with more tokens are dropped; plain texts are split instead.
      shard_size: samples of the source per file.
      max_bad_share: the preparation stops if more than this share of the samples is bad.
      system_prompt: for conversations without one.
      store: how understanding images are stored: 'original', as their files; or 'resized', as PNGs of the pixels that
        the model sees, which are small and fast to read if the originals are large.
      workers: threads that read, decode and tokenize; None for one per core.
    Raises: ValueError with the counts by reason for too many bad samples, and for inconsistent arguments.
    """
    if kind == "generation" and encode is None:
        raise ValueError("preparing generation data needs encode, from images to codes")
    if min(shard_size, batch_size) < 1 or (workers is not None and workers < 1):
        raise ValueError("shard_size, batch_size and workers must be at least 1")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share must be between 0 and 1, got {max_bad_share}")
    if not len(source):
        raise ValueError("the source is empty")
    out = as_path(out)
    tokenize = SampleTokenizer(processor, kind, context, system_prompt, store)
    settings = {
        "kind": kind,
        "context": context,
        "shard_size": shard_size,
        "system_prompt": system_prompt,
        "tokenizer": tokenizer_fingerprint(processor),
        "vq": vq_fingerprint if kind == "generation" else "",
        "image_size": processor.config.gen_vision.image_size if kind == "generation" else 0,
        "patches": processor.config.vision.num_patches,
        "source": getattr(source, "description", {"samples": len(source)}) | {"probe": probe(source)},
    }
    if kind == "generation":
        # Codes are computed in full precision, but platforms sum in different orders.
        settings["encoded_on"] = {"platform": jax.default_backend(), "precision": "float32"}
    if store == "resized" and kind == "understanding":
        settings["resized"] = list(resized_by(processor.settings))
    meta = begin(out, settings)
    work = ShardWriter(source, out, tokenize, encode, batch_size, max_bad_share)
    if meta["finished"]:
        drop_indices(out)
        totals = meta["read"], meta["samples"], meta["tokens"], meta["dropped"]
        images = np.load(local_copy(out / IMAGES) if is_store(out) else out / IMAGES, allow_pickle=False)
        return Report(out, kind, *totals, pictures(kind, images), work.decides_anew(read_dropped(out)))

    count = -(-len(source) // shard_size)
    ranges = [range(shard * shard_size, min((shard + 1) * shard_size, len(source))) for shard in range(count)]
    done = read_indices(out, count)
    for shard, index in list(done.items()):
        if work.decides_anew(index["dropped"]):
            # For example, missing images have appeared: without its index, the shard is written again.
            (out / index_file(shard)).unlink()
            del done[shard]
        else:
            work.add(index["read"], index["dropped"])
    pool = ThreadPoolExecutor(workers or default_workers(source))
    try:
        with step_bar("preparing", len(source), shown(progress)) as bar:
            for shard, items in enumerate(ranges):
                if shard in done:
                    bar.update(len(items))
                else:
                    done[shard] = work.write(pool, shard, items, bar.update)
    finally:
        pool.shutdown(cancel_futures=True)
    work.check()
    return finish(out, meta, [done[shard] for shard in range(count)], processor)


def default_workers(source: Sequence[RawSample]) -> int:
    """Threads that read: one per core, and enough for many requests at once if samples come from a store."""
    path = getattr(source, "description", {}).get("path", "")
    return max(os.cpu_count() or 1, _REQUESTS if is_store(path) else 1)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Returns 0 on success, 2 for bad input (with one line on standard error), 130 if interrupted."""
    print_any_text()
    args = _parser().parse_args(argv)
    try:
        source = open_source(args.source, args.format, args.images, args.names, args.allow_outside, args.schema)
        _say(source)
        folder = resolve(args.model)
        processor = Processor.from_folder(folder, read_config(folder))
        encode, fingerprint = vq_encoder(folder) if args.kind == "generation" else (None, "")
        report = prepare(
            source,
            args.out,
            args.kind,
            processor,
            encode=encode,
            vq_fingerprint=fingerprint,
            context=args.context,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            max_bad_share=args.max_bad_share,
            system_prompt=args.system_prompt,
            store=args.store,
            workers=args.workers,
        )
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


def _say(what: Any):
    # Names in the data may contain characters that the terminal's or file's encoding lacks.
    encoding = sys.stdout.encoding or "utf-8"
    print(str(what).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.prepare", description="Prepares data for training.")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--source", required=True, metavar="PATH", help="file, folder or glob")
    parser.add_argument(
        "--format", choices=NAMES, metavar="FORMAT", help=f"of the files: {', '.join(FORMATS)} (default: detected)"
    )
    parser.add_argument("--schema", choices=SCHEMAS, help="of the records (default: detected by their fields)")
    parser.add_argument("--images", metavar="DIR", help="folder for image paths (default: that of the source file)")
    parser.add_argument(
        "--allow-outside", action="store_true", help="allow image paths outside that folder (absolute, .., links)"
    )
    parser.add_argument("--names", metavar="FILE", help="names of category folders, as JSON or lines")
    parser.add_argument("--model", required=True, help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--context", type=int, default=4096, help="the most tokens of a sample (default 4096)")
    parser.add_argument("--shard-size", type=int, default=8192, help="samples of the source per file (default 8192)")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="stop above this share (default 0.01)")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at a time (default 32)")
    parser.add_argument("--system-prompt", default=SYSTEM_PROMPT, help="for conversations without one; empty for none")
    parser.add_argument(
        "--store",
        choices=STORES,
        default="original",
        help="store understanding images as their files, or as PNGs of the pixels the model sees (default original)",
    )
    parser.add_argument("--workers", type=int, help="threads that read and decode (default: one per core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
