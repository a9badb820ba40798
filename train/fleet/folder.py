"""A prepared folder in the making: its settings, which whoever begins it writes and all others compare with theirs."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from janus_jax.io.messages import one_line, print_line
from janus_jax.io.store_access import is_store
from janus_jax.io.whole.files import PARTIAL, create_file, remove_partial, write_file
from janus_jax.processing.tokenizer import Tokenizer
from train.data.prepared import FORMAT_VERSION, META, SPECIAL_IDS, TOKENIZER, read_meta
from train.raw.sources import BadSample, RawSample
from train.raw.storage import patiently


def probe(source: Sequence[RawSample]) -> str:
    """A hash of some samples' contents, which tells sources of equal size apart, whatever their paths."""
    digest = hashlib.sha256()
    # `allow_outside` determines what is dropped, not what the data are: it may be set later.
    read = getattr(source, "anywhere", source.__getitem__)
    for item in np.unique(np.linspace(0, len(source) - 1, 16).astype(int)):
        try:
            raw = patiently(lambda item=int(item): read(item))
            images = [hashlib.sha256(image).hexdigest() for image in raw.images if isinstance(image, bytes)]
            content = (raw.messages, raw.text, raw.caption, images, *([raw.untrained] if raw.untrained else []))
            content += () if raw.prompt is None else (raw.prompt,)
            digest.update(repr(content).encode(errors="replace"))
        except BadSample as error:
            digest.update(error.reason.encode())
    return digest.hexdigest()[:16]


def mark_of(settings: dict[str, Any]) -> str:
    """A hash of the settings that determine the bytes, which the index of each shard holds."""
    return hashlib.sha256(json.dumps(_compared(settings), sort_keys=True).encode()).hexdigest()[:16]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_IDS}


def begin(out: pathlib.Path, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The meta of `out`, created if missing: of several processes, by one.

    Raises: ValueError if it is another folder or was begun with other settings.
    """
    if not is_store(out) and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a new folder, or one begun before")
    out.mkdir(parents=True, exist_ok=True)
    meta = read_meta(out)
    if meta is None:
        there = out.iterdir() if not is_store(out) or out.exists() else ()
        strange = any(not child.name.endswith(PARTIAL) for child in there)
        # Another process may have begun it just now.
        if strange and read_meta(out) is None:
            raise ValueError(f"{out} has other files in it; choose a new folder, or one begun before")
        meta = {"version": FORMAT_VERSION, "kind": settings["kind"], "finished": False, "shards": []}
        meta["settings"] = settings
        # Not among the settings, which determine the samples: this is for decoding them.
        meta["ids"] = special_ids(tokenizer)
        create_file(out / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        meta = read_meta(out) or meta
    _compare(out, settings, meta)
    if not meta["finished"]:
        remove_partial(out)
        if not (out / TOKENIZER).exists():
            write_file(out / TOKENIZER, tokenizer.state())
    return meta


def _compare(out: pathlib.Path, settings: dict[str, Any], meta: dict[str, Any]):
    ours, theirs = _compared(settings), _compared(meta.get("settings", {}))
    other = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if other:
        told = ", ".join(f"{key} {theirs.get(key)!r:.60}, now {ours.get(key)!r:.60}" for key in other)
        raise ValueError(f"{out} was begun with other settings ({told}); choose another folder, or delete this one")
    here, there = settings.get("encoded_on"), meta.get("settings", {}).get("encoded_on")
    if here and there and here.get("precision") != there.get("precision"):
        raise ValueError(
            f"{out} was begun with codes computed in {one_line(there.get('precision'), 60)}, now {here['precision']}; "
            "codes of one folder must be computed alike: choose another folder, or delete this one"
        )
    if here != there and not meta["finished"]:
        print_line(f"note: {out} was begun on {_platform(there)}; the remaining codes are made on {_platform(here)}")


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that must agree, flat."""
    source = settings.get("source", {})
    found = {k: v for k, v in settings.items() if k not in ("source", "encoded_on")}
    # The same data may have another path, format or schema; the probe compares their content.
    free = ("path", "format", "schema")
    return found | {f"source.{k}": v for k, v in source.items() if k not in free}


def _platform(encoded_on: Any) -> str:
    return str(encoded_on.get("platform")) if isinstance(encoded_on, dict) else "an unrecorded platform"
