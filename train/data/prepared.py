"""Reads prepared folders: `open_prepared(folder)[i]` is a `Sample`.

A folder contains `data-00000.array_record` and so on (one record per sample), `lengths.npy` and `images.npy` (int32,
one value per sample), `dropped.jsonl`, `tokenizer.json` to decode the samples, and `prepared.json`, which is finished
last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from train.data.records import Records
from train.data.samples import Sample
from train.raw.sources import missing_path
from train.raw.storage import machine_error, patiently

META, LENGTHS, IMAGES, DROPPED = "prepared.json", "lengths.npy", "images.npy", "dropped.jsonl"
TOKENIZER = "tokenizer.json"
# Special tokens whose ids prepared.json has under `ids`.
SPECIAL_IDS = ("bos", "eos", "pad", "begin_of_image", "end_of_image", "image_placeholder")
# 2 stores each sample's place in the source and the tokenizer, and hashes VQ parameters as `train.data.fingerprints`
# does.
FORMAT_VERSION = 2
_READABLE = (1, 2)
_MAX_META = 1 << 30  # bytes; 0.2 KB for each shard
_HASHED_AT_ONCE = 1 << 20  # values


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Random access to the samples of one prepared folder; shared by threads.

    Only its path is pickled: another process maps the same index files, and so shares their memory.

    Attributes:
      folder: path of the folder.
      kind: kind of all its samples.
      lengths: int32 [N], tokens of a row that each sample takes; mapped from its file.
      images: int32 [N], understanding images of each sample; mapped from its file.
      meta: the content of prepared.json.
      fingerprint: a hash over index and meta, and so over the shards, whose hashes they contain.
    """

    folder: pathlib.Path
    kind: str
    lengths: np.ndarray
    images: np.ndarray
    meta: dict[str, Any]
    fingerprint: str
    records: Records = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError beyond the end, ValueError for a damaged record, OSError if the machine cannot read it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        try:
            return Sample.from_bytes(self.records[index])
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{self.folder} sample {index} is damaged ({_first_line(error)}); {_again()}") from None

    def __reduce__(self):
        return _map_again, (self.folder, self.fingerprint, _digest(self.meta))


def open_prepared(folder: str | os.PathLike) -> Prepared:
    """Opens a folder written by `train.prepare`.

    Raises FileNotFoundError if there is none, ValueError if it is unfinished, empty, damaged or of another version; all
    messages say what to do.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{missing_path(folder)}; make it with `python -m train.prepare --out {folder} ...`")
    meta = read_meta(folder)
    if meta is None:
        raise FileNotFoundError(
            f"{folder} is not a prepared folder (it has no {META}); make one with `python -m train.prepare --out ...`"
        )
    if not meta["finished"]:
        raise ValueError(f"the preparation of {folder} is unfinished; run the same `python -m train.prepare` again")
    found = _map(folder, meta)
    lengths, images, records = found.lengths, found.images, found.records
    if not len(records):
        raise ValueError(f"{folder} is empty: no sample was kept, see {DROPPED} in it; {_again()}")
    for name, array in ((LENGTHS, lengths), (IMAGES, images)):
        if array.shape != (len(records),):
            raise ValueError(f"{folder / name} is for {len(array)} samples, {META} for {len(records)}; {_again()}")
    for shard in _filled(meta):
        path = folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy it again, or {_again()}")
        if path.stat().st_size != shard["bytes"]:
            found = path.stat().st_size
            raise ValueError(f"{path} must have {shard['bytes']} bytes, got {found}; copy it again, or {_again()}")
    try:
        count = records.counted()
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{folder} has a damaged shard ({_first_line(error)}); {_again()}") from None
    if count != len(records):
        raise ValueError(f"the shards in {folder} have {count} samples, but {META} says {len(records)}; {_again()}")
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for array in (lengths, images):
        for begin in range(0, len(array), _HASHED_AT_ONCE):
            digest.update(array[begin : begin + _HASHED_AT_ONCE].tobytes())
    return Prepared(folder, meta["kind"], lengths, images, meta, digest.hexdigest()[:16], records)


def _map(folder: pathlib.Path, meta: dict[str, Any], fingerprint: str = "") -> Prepared:
    shards = _filled(meta)
    try:
        records = Records(folder, [shard["file"] for shard in shards], [shard["samples"] for shard in shards])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / META} is damaged ({_first_line(error)}); {_again()}") from None
    lengths, images = _read_array(folder / LENGTHS), _read_array(folder / IMAGES)
    return Prepared(folder, meta["kind"], lengths, images, meta, fingerprint, records)


def _map_again(folder: pathlib.Path, fingerprint: str, digest: str) -> Prepared:
    """Maps a folder that another process has already opened, and so checked."""
    meta = patiently(lambda: read_meta(folder), folder)
    if meta is None or _digest(meta) != digest:
        raise ValueError(f"{folder} has changed since the run opened it; start the run again")
    return patiently(lambda: _map(folder, meta, fingerprint), folder)


def _filled(meta: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for shard in meta["shards"] if shard["samples"]]


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(folder: pathlib.Path) -> dict[str, Any] | None:
    """prepared.json of `folder`, or None; ValueError if it is damaged or of another version."""
    path = folder / META
    if not path.exists():
        return None
    try:
        meta = read_json_object(path, _MAX_META)
        version = meta["version"]
        if version in _READABLE:
            meta["kind"], meta["finished"], meta["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {_again()}") from None
    if version not in _READABLE:
        known = " or ".join(map(str, _READABLE))
        raise ValueError(f"{path} must have the format version {known}, got {one_line(version, 20)}; {_again()}")
    return meta


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype != np.int32 or array.ndim != 1:
            raise ValueError(f"{array.dtype} {list(array.shape)} instead of int32 in one dimension")
        return array
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; copy it again, or {_again()}") from None
    except (ValueError, OSError, EOFError) as error:
        if machine_error(error):
            raise
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {_again()}") from None


def _again() -> str:
    return "delete the folder and run `python -m train.prepare` again"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
