"""From complete shards to a finished prepared folder."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from janus_jax.io.files import parse_json
from janus_jax.processing.chat import Processor
from train.data.prepared import DROPPED, ENDS, FORMAT_VERSION, IMAGES, LENGTHS, META, SPECIAL_IDS, TOKENIZER
from train.data.shard_files import appearing, data_file, replace_file


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


def finish(out: pathlib.Path, meta: dict[str, Any], shards: list[dict[str, Any]], processor: Processor) -> Report:
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
    drop_indices(out)
    return Report(out, meta["kind"], read, len(lengths), tokens, counts, pictures(meta["kind"], images))


def pictures(kind: str, images: np.ndarray) -> int:
    """Number of images in the samples of a finished folder: generation samples have one each."""
    return len(images) if kind == "generation" else int(images.sum(dtype=np.int64))


def read_dropped(out: pathlib.Path) -> list[dict[str, Any]]:
    try:
        found = [parse_json(line, DROPPED) for line in (out / DROPPED).read_text(encoding="utf-8").split("\n") if line]
    except (FileNotFoundError, ValueError):
        return []  # the file is for people, and may have been edited
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("item"), int) and "reason" in one]


def drop_indices(out: pathlib.Path):
    # Their content is in the folder's own index by now; records of version 2 were written again.
    for path in [*out.glob("data-*.json"), *out.glob("data-*.array_record")]:
        path.unlink()
