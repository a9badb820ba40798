"""Prepares training data: `python -m train.prepare --kind generation --source captions.jsonl --model DIR --out DIR`.

Reads any format and schema of `train.raw.sources`, checks and tokenizes every sample, encodes generation images to
codes, and writes a folder for `train.data.prepared.open_prepared`. Each shard covers a fixed range of the source and
appears when it is complete, so that an interrupted run resumes with the missing shards and produces the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.config import read_config
from janus_jax.hub import resolve
from janus_jax.io.files import parse_json
from janus_jax.io.messages import print_any_text, print_error, print_line
from janus_jax.io.progress import shown, step_bar
from janus_jax.io.store_access import is_store
from janus_jax.io.store_cache import local_copy
from janus_jax.io.stores import as_path
from janus_jax.model.janus import Janus
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.torch_weights import place
from train.config import KINDS
from train.data.fingerprints import VQ, params_fingerprint
from train.data.prepared import DROPPED, ENDS, FORMAT_VERSION, IMAGES, LENGTHS, META, SPECIAL_IDS, TOKENIZER, read_meta
from train.data.shards import Encode, ShardWriter, appearing, data_file, index_file, read_indices, replace_file
from train.data.tokenize import STORES, SampleTokenizer, resized_by, tokenizer_fingerprint
from train.raw.sources import FORMATS, NAMES, SCHEMAS, BadSample, RawSample, open_source
from train.raw.storage import patiently

_REQUESTS = 32  # to a store at a time


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a preparation: samples of the source read and dropped (by reason), samples kept, their tokens.

    `pictures` counts the images of the kept samples; `changed` counts samples that a finished folder lacks and that
    could be prepared now.
    """

    folder: pathlib.Path
    kind: str
    read: int
    kept: int
    tokens: int
    dropped: dict[str, int]
    pictures: int
    changed: int = 0

    def __str__(self) -> str:
        rows = [("read", self.read), ("kept", self.kept), ("images kept", self.pictures)]
        rows += [("dropped", sum(self.dropped.values()))]
        rows += [(f"  {reason}", count) for reason, count in self.dropped.items()]
        rows += [("tokens", self.tokens), ("mean length", round(self.tokens / max(self.kept, 1)))]
        lines = [f"{name:24} {value:>16,}" for name, value in rows]
        if self.changed:
            lines += [
                f"{self.changed:,} of the dropped samples would be treated differently now, since their files have "
                "appeared or changed; delete the folder and prepare it again to include them"
            ]
        return "\n".join([f"{self.folder} ({self.kind})", *lines])


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
        "source": getattr(source, "description", {"samples": len(source)}) | {"probe": _probe(source)},
    }
    if kind == "generation":
        # Codes are computed in full precision, but platforms sum in different orders.
        settings["encoded_on"] = {"platform": jax.default_backend(), "precision": "float32"}
    if store == "resized" and kind == "understanding":
        settings["resized"] = list(resized_by(processor.settings))
    meta = _begin(out, settings)
    work = ShardWriter(source, out, tokenize, encode, batch_size, max_bad_share)
    if meta["finished"]:
        _drop_indices(out)
        totals = meta["read"], meta["samples"], meta["tokens"], meta["dropped"]
        images = np.load(local_copy(out / IMAGES) if is_store(out) else out / IMAGES, allow_pickle=False)
        return Report(out, kind, *totals, _pictures(kind, images), work.decides_anew(_read_dropped(out)))

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
    return _finish(out, meta, [done[shard] for shard in range(count)], processor)


def default_workers(source: Sequence[RawSample]) -> int:
    """Threads that read: one per core, and enough for many requests at once if samples come from a store."""
    path = getattr(source, "description", {}).get("path", "")
    return max(os.cpu_count() or 1, _REQUESTS if is_store(path) else 1)


# ---------------------------------------------------------------- the folder


def _probe(source: Sequence[RawSample]) -> str:
    """A hash of some samples' contents, which tells sources of equal size apart, whatever their paths."""
    digest = hashlib.sha256()
    # `allow_outside` determines what is dropped, not what the data are: it may be set later.
    read = getattr(source, "anywhere", source.__getitem__)
    for item in np.unique(np.linspace(0, len(source) - 1, 16).astype(int)):
        try:
            raw = patiently(lambda item=int(item): read(item))
            images = [hashlib.sha256(image).hexdigest() for image in raw.images if isinstance(image, bytes)]
            content = (raw.messages, raw.text, raw.caption, images, *([raw.untrained] if raw.untrained else []))
            digest.update(repr(content).encode(errors="replace"))
        except BadSample as error:
            digest.update(error.reason.encode())
    return digest.hexdigest()[:16]


def _begin(out: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The meta of `out`, created if missing; ValueError if it is another folder or was begun with other settings."""
    if not is_store(out) and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a new folder, or one begun before")
    out.mkdir(parents=True, exist_ok=True)
    meta = read_meta(out)
    if meta is None:
        there = out.iterdir() if not is_store(out) or out.exists() else ()
        if any(not child.name.endswith(".partial") for child in there):
            raise ValueError(f"{out} has other files in it; choose a new folder, or one begun before")
        meta = {"version": FORMAT_VERSION, "kind": settings["kind"], "finished": False, "shards": []}
        meta["settings"] = settings
        replace_file(out / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        return meta
    ours, theirs = _flat(settings), _flat(meta.get("settings", {}))
    # The same data may have another path, format or schema; the probe compares their content.
    free = ("source.path", "source.format", "source.schema", "encoded_on")
    other = [key for key in ours | theirs if key not in free and ours.get(key) != theirs.get(key)]
    if other:
        told = ", ".join(f"{key} {theirs.get(key)!r:.60}, now {ours.get(key)!r:.60}" for key in other)
        raise ValueError(f"{out} was begun with other settings ({told}); choose another folder, or delete this one")
    here, there = ours.get("encoded_on"), theirs.get("encoded_on")
    if here != there and not meta["finished"]:
        print_line(f"note: {out} was begun on {_platform(there)}; the remaining codes are made on {_platform(here)}")
    return meta


def _platform(encoded_on: Any) -> str:
    return str(encoded_on.get("platform")) if isinstance(encoded_on, dict) else "an unrecorded platform"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    source = settings.get("source", {})
    return {k: v for k, v in settings.items() if k != "source"} | {f"source.{k}": v for k, v in source.items()}


def _finish(out: pathlib.Path, meta: dict[str, Any], shards: list[dict[str, Any]], processor: Processor) -> Report:
    tokenizer = processor.tokenizer
    (out / TOKENIZER).write_text(tokenizer.state(), encoding="utf-8")
    lengths = np.array([n for index in shards for n in index["lengths"]], np.int32)
    images = np.array([n for index in shards for n in index["images"]], np.int32)
    ends = np.array([n for index in shards for n in index.get("ends", ())], np.uint64)
    for name, array in ((LENGTHS, lengths), (IMAGES, images), (ENDS, ends)):
        with appearing(out / name) as path, open(path, "wb") as file:
            np.save(file, array)
    dropped = [one for index in shards for one in index["dropped"]]
    (out / DROPPED).write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in dropped), encoding="utf-8")
    counts = dict(collections.Counter(one["reason"] for one in dropped).most_common())
    read, tokens = sum(index["read"] for index in shards), int(lengths.sum(dtype=np.int64))
    files = [
        {
            "file": data_file(shard),
            "samples": len(index["lengths"]),
            "bytes": index.get("bytes", 0),
            "sha256": index.get("sha256", ""),
        }
        for shard, index in enumerate(shards)
    ]
    totals = {"version": FORMAT_VERSION, "read": read, "samples": len(lengths), "tokens": tokens}
    totals |= {"dropped": counts, "shards": files}
    # Not among the settings, which determine the samples: this is for decoding them.
    totals["ids"] = {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_IDS}
    replace_file(out / META, json.dumps(meta | totals | {"finished": True}, indent=2, ensure_ascii=False) + "\n")
    _drop_indices(out)
    return Report(out, meta["kind"], read, len(lengths), tokens, counts, _pictures(meta["kind"], images))


def _pictures(kind: str, images: np.ndarray) -> int:
    """Number of images in the samples of a finished folder: generation samples have one each."""
    return len(images) if kind == "generation" else int(images.sum(dtype=np.int64))


def _read_dropped(out: pathlib.Path) -> list[dict[str, Any]]:
    try:
        found = [parse_json(line, DROPPED) for line in (out / DROPPED).read_text(encoding="utf-8").split("\n") if line]
    except (FileNotFoundError, ValueError):
        return []  # the file is for people, and may have been edited
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("item"), int) and "reason" in one]


def _drop_indices(out: pathlib.Path):
    # Their content is in the folder's own index by now; records of version 2 were written again.
    for path in [*out.glob("data-*.json"), *out.glob("data-*.array_record")]:
        path.unlink()


# ---------------------------------------------------------------- command line


def vq_encoder(folder: str | os.PathLike) -> tuple[Encode, str]:
    """Compiled `encode_codes` of a checkpoint folder, and a hash of its VQ parameters; nothing else is read."""
    checkpoint = open_checkpoint(folder, quantized=True)  # the VQ model never is
    params = place({path: leaf for path, leaf in checkpoint.leaves.items() if path[0] == VQ}, "float32")
    model = Janus(checkpoint.config, dtype=jnp.float32, param_dtype=jnp.float32)
    encode = jax.jit(lambda params, images: model.apply({"params": params}, images, method="encode_codes"))
    return lambda images: encode(params, images), params_fingerprint(params)


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
