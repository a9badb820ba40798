"""Prepared folders, read: `open_prepared(folder)[i]` is a `Sample`.

A folder holds `data-00000.array_record` and so on (one record a sample), `lengths.npy` and `images.npy` (int32, one
value a sample), `dropped.jsonl`, and `prepared.json`, which is finished last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from grain.sources import ArrayRecordDataSource

from train.samples import Sample
from train.sources import missing_path

META, LENGTHS, IMAGES, DROPPED = "prepared.json", "lengths.npy", "images.npy", "dropped.jsonl"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Random access to the samples of one prepared folder; may be pickled, and shared by threads.

    Attributes:
      folder: where it lies.
      kind: of all its samples.
      lengths: int32 [N], tokens of a row that each sample takes.
      images: int32 [N], understanding images of each sample.
      meta: the content of prepared.json.
      fingerprint: a hash over index and meta, and so over the shards, whose hashes these hold.
    """

    folder: pathlib.Path
    kind: str
    lengths: np.ndarray
    images: np.ndarray
    meta: dict[str, Any]
    fingerprint: str
    records: ArrayRecordDataSource = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError beyond the end, ValueError where the record is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        try:
            return Sample.from_bytes(self.records[index])
        except (ValueError, RuntimeError, IndexError, OSError) as error:
            raise ValueError(f"{self.folder} sample {index} is damaged ({_first_line(error)}); {_again()}") from None


def open_prepared(folder: str | os.PathLike) -> Prepared:
    """Opens what `train.prepare` wrote.

    Raises FileNotFoundError where there is nothing, ValueError where it is unfinished, empty, damaged or of another
    version; each names the cure.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{missing_path(folder)}; make it with `python -m train.prepare --out {folder} ...`")
    meta = read_meta(folder)
    if meta is None:
        raise FileNotFoundError(
            f"{folder} is no prepared folder (it has no {META}); make one with `python -m train.prepare --out ...`"
        )
    if not meta["finished"]:
        raise ValueError(f"the preparation of {folder} is unfinished: run the same `python -m train.prepare` again")
    lengths, images = _read_array(folder / LENGTHS), _read_array(folder / IMAGES)
    shards = [shard for shard in meta["shards"] if shard["samples"]]
    expected = sum(shard["samples"] for shard in shards)
    if not expected:
        raise ValueError(f"{folder} is empty: no sample was kept, {DROPPED} there says why; {_again()}")
    for name, array in ((LENGTHS, lengths), (IMAGES, images)):
        if array.shape != (expected,):
            raise ValueError(f"{folder / name} is for {len(array)} samples, {META} for {expected}; {_again()}")
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy it again, or {_again()}")
        if path.stat().st_size != shard["bytes"]:
            found = path.stat().st_size
            raise ValueError(f"{path} has {found} bytes, not {shard['bytes']}: copy it again, or {_again()}")
    try:
        records = ArrayRecordDataSource([str(folder / shard["file"]) for shard in shards])
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder} has a damaged shard ({_first_line(error)}); {_again()}") from None
    if len(records) != expected:
        raise ValueError(f"the shards in {folder} hold {len(records)} samples, {META} says {expected}; {_again()}")
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    digest.update(lengths.tobytes() + images.tobytes())
    return Prepared(folder, meta["kind"], lengths, images, meta, digest.hexdigest()[:16], records)


def read_meta(folder: pathlib.Path) -> dict[str, Any] | None:
    """prepared.json of `folder`, None where there is none; ValueError where it is damaged or of another version."""
    path = folder / META
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["version"]
        if version == FORMAT_VERSION:
            meta["kind"], meta["finished"], meta["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {_again()}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format version {version}, not {FORMAT_VERSION}; {_again()}")
    return meta


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path).astype(np.int32)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy it again, or {_again()}") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {_again()}") from None


def _again() -> str:
    return "delete the folder and run `python -m train.prepare` again"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
