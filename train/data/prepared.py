"""Reads prepared folders: `open_prepared(folder)[i]` is a `Sample`.

A folder contains `data-00000.bag` and so on (one record per sample), `lengths.npy` and `images.npy` (int32, one value
per sample), `ends.npy` (uint64, where each record ends in its file), `dropped.jsonl`, `tokenizer.json` to decode the
samples, and `prepared.json`, which is finished last. In a store, the index is copied to this machine and mapped, and
samples are read by ranges of bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.store_cache import local_copy
from janus_jax.io.stores import as_path
from train.data.samples import Sample
from train.data.shard_files import listed_shards, missing_shards, shard_count
from train.raw.sources import missing_path
from train.raw.storage import machine_error, patiently
from train.records.bags import content_of
from train.records.cache import CacheSettings, name_of
from train.records.local import Records
from train.records.store import Cached, StoreRecords

META, LENGTHS, IMAGES, ENDS, DROPPED = "prepared.json", "lengths.npy", "images.npy", "ends.npy", "dropped.jsonl"
TOKENIZER = "tokenizer.json"
INDEX = "index"  # of prepared.json: what is known of lengths.npy and images.npy without reading them
# Special tokens whose ids prepared.json has under `ids`.
SPECIAL_IDS = ("bos", "eos", "pad", "begin_of_image", "end_of_image", "image_placeholder")
# 2 stores each sample's place in the source and the tokenizer, and hashes VQ parameters as `train.data.fingerprints`
# does; 3 stores records in Bagz's format, those before in ArrayRecord files.
FORMAT_VERSION = 3
_READABLE = (1, 2, 3)
_BY_RANGE = 3  # the first that is read from a store
_MAX_META = 1 << 30  # bytes; 0.2 KB for each shard
_HASHED_BLOCKS, _HASHED_BLOCK = 1024, 4096  # of an index whose hash prepared.json has: so many, of so many values


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
      fingerprint: a hash over meta, and so over the shards and the index, whose hashes it contains, and over the index:
        all of a small one, and values all over a large one.
    """

    folder: pathlib.Path
    kind: str
    lengths: np.ndarray
    images: np.ndarray
    meta: dict[str, Any]
    fingerprint: str
    records: Records | StoreRecords = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError beyond the end, ValueError for a damaged record, OSError if the machine cannot read it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        return self._sample(index, lambda: self.records[index])

    def longest(self) -> int:
        """The most tokens of a sample."""
        return self._figure(LENGTHS, "max")

    def most_images(self) -> int:
        return self._figure(IMAGES, "max")

    def mean_length(self) -> float:
        return self._figure(LENGTHS, "sum") / len(self)

    def mean_images(self) -> float:
        return self._figure(IMAGES, "sum") / len(self)

    def _figure(self, name: str, what: str) -> int:
        known = _known(self.meta).get(name)
        if known is not None:
            return known[what]
        array = self.lengths if name == LENGTHS else self.images
        return int(array.max() if what == "max" else array.sum(dtype=np.int64))

    def stored(self, indices: Sequence[int]) -> list[bytes] | None:
        """What a store has for each of `indices`, all requested at once, for `sample`; None for a local folder."""
        return self.records.stored(indices) if isinstance(self.records, StoreRecords) else None

    def sample(self, index: int, stored: bytes) -> Sample:
        """The sample in what `stored` returned for `index`; ValueError if it is damaged."""
        return self._sample(index, lambda: content_of(stored))

    def _sample(self, index: int, content: Callable[[], bytes]) -> Sample:
        try:
            return Sample.from_bytes(content())
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{self.folder} sample {index} is damaged ({_first_line(error)}); {_again()}") from None

    def __reduce__(self):
        cached = self.records.cached if isinstance(self.records, StoreRecords) else None
        return _map_again, (self.folder, self.fingerprint, _digest(self.meta), cached)


def open_prepared(folder: str | os.PathLike, cache: CacheSettings | None = None) -> Prepared:
    """Opens a folder written by `train.prepare`; samples from a store are kept in `cache`.

    Raises FileNotFoundError if there is none, ValueError if it is unfinished, empty, damaged or of another version; all
    messages say what to do.
    """
    folder = as_path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{missing_path(folder)}; make it with `python -m train.prepare --out {folder} ...`")
    meta = read_meta(folder)
    if meta is None:
        raise FileNotFoundError(
            f"{folder} is not a prepared folder (it has no {META}); make one with `python -m train.prepare --out ...`"
        )
    if not meta["finished"]:
        raise ValueError(_unfinished(folder, meta))
    if is_store(folder) and meta["version"] < _BY_RANGE:
        raise ValueError(
            f"{folder} was prepared by an earlier version, whose files are read from a local disk only; copy it to "
            "one, or prepare it again"
        )
    found = _map(folder, meta)
    lengths, images, records = found.lengths, found.images, found.records
    if not len(records):
        raise ValueError(f"{folder} is empty: no sample was kept, see {DROPPED} in it; {_again()}")
    for name, array in ((LENGTHS, lengths), (IMAGES, images)):
        if array.shape != (len(records),):
            raise ValueError(f"{folder / name} is for {len(array)} samples, {META} for {len(records)}; {_again()}")
    listed = {path.name: path for path in folder.iterdir()} if is_store(folder) else {}
    paths = [folder / shard["file"] for shard in _filled(meta)]
    paths = [listed.get(path.name, path) for path in paths]
    for shard, path in zip(_filled(meta), paths, strict=True):
        if path.name not in listed if is_store(folder) else not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy it again, or {_again()}")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise ValueError(f"{path} must have {shard['bytes']} bytes, got {size}; copy it again, or {_again()}")
    if isinstance(records, StoreRecords):
        names = (name_of(str(path), path.version()) for path in paths)  # type: ignore[attr-defined]
        records.keep_in(Cached(cache, tuple(names)) if cache else None)
    else:
        try:
            count = records.counted()
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{folder} has a damaged shard ({_first_line(error)}); {_again()}") from None
        if count != len(records):
            raise ValueError(f"the shards in {folder} have {count} samples, but {META} says {len(records)}; {_again()}")
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for array in (lengths, images):
        for begin in _hashed(len(array), whole=not _known(meta)):
            digest.update(array[begin : begin + _HASHED_BLOCK].tobytes())
    return Prepared(folder, meta["kind"], lengths, images, meta, digest.hexdigest()[:16], records)


def _hashed(count: int, whole: bool) -> Sequence[int]:
    """Where the blocks begin of which a hash is taken, of so many values."""
    begins = range(0, count, _HASHED_BLOCK)
    if whole or len(begins) <= _HASHED_BLOCKS:
        return begins
    return [begins[i * len(begins) // _HASHED_BLOCKS] for i in range(_HASHED_BLOCKS)]


def _known(meta: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What prepared.json says of the index, by file; nothing if it was written by an earlier version."""
    found = meta.get(INDEX)
    return found if isinstance(found, dict) else {}


def _map(folder: pathlib.Path, meta: dict[str, Any], fingerprint: str = "") -> Prepared:
    shards = _filled(meta)
    try:
        files, counts = [shard["file"] for shard in shards], [shard["samples"] for shard in shards]
        if is_store(folder):
            records = StoreRecords(folder, files, counts, _read_array(folder / ENDS, np.uint64))
            if len(records) != len(records.ends):
                raise ValueError(f"{ENDS} is for {len(records.ends)} samples, {META} for {len(records)}")
        else:
            records = Records(folder, files, counts)
    except FileNotFoundError:
        raise
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / META} is damaged ({_first_line(error)}); {_again()}") from None
    lengths, images = _read_array(folder / LENGTHS), _read_array(folder / IMAGES)
    return Prepared(folder, meta["kind"], lengths, images, meta, fingerprint, records)


def _map_again(folder: pathlib.Path, fingerprint: str, digest: str, cached: Cached | None) -> Prepared:
    """Maps a folder that another process has already opened, and so checked."""
    meta = patiently(lambda: read_meta(folder), folder)
    if meta is None or _digest(meta) != digest:
        raise ValueError(f"{folder} has changed since the run opened it; start the run again")
    found = patiently(lambda: _map(folder, meta, fingerprint), folder)
    if isinstance(found.records, StoreRecords):
        found.records.keep_in(cached)
    return found


def _unfinished(folder: pathlib.Path, meta: dict[str, Any]) -> str:
    told = f"the preparation of {folder} is unfinished; run the same `python -m train.prepare` again"
    count = shard_count(meta)
    if not count:
        return told
    if missing := missing_shards(folder, count):
        return (
            f"{told}, or in the parts that have not ended: {len(missing)} of {count} shards are missing "
            f"({listed_shards(missing)})"
        )
    return f"{told}, or with --merge: its {count} shards are complete, but not merged"


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
            for known in meta.get(INDEX, {}).values():
                if not (isinstance(known["sum"], int) and isinstance(known["max"], int)):
                    raise TypeError(f"{INDEX} must have numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {_again()}") from None
    if version not in _READABLE:
        known = " or ".join(map(str, _READABLE))
        raise ValueError(f"{path} must have the format version {known}, got {one_line(version, 20)}; {_again()}")
    return meta


def _read_array(path: pathlib.Path, dtype: type = np.int32) -> np.ndarray:
    try:
        array = np.load(local_copy(path) if is_store(path) else path, mmap_mode="r", allow_pickle=False)
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"{array.dtype} {list(array.shape)} instead of {np.dtype(dtype)} in one dimension")
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
