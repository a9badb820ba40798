"""What tells one model from another, so that replies of two are never mixed."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from evals.items import Loaded
from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path, size_of

_WHOLE = 64 << 20  # bytes up to which a file is hashed whole
_PIECE, _EVERY = 4096, 1 << 20  # bytes that are hashed of each megabyte of others: every large kernel is met


def model_identity(model: str, folder: str | os.PathLike, **how: Any) -> dict[str, Any]:
    """The model's name, a fingerprint of its files, and `how` it computes.

    Args:
      model: as the user gave it.
      folder: where its files are.
      how: dtype, form of weights, adapter.
    """
    adapter = how.pop("adapter", None)
    named = {name: value for name, value in how.items() if value is not None}
    if adapter is not None:
        named |= {"adapter": str(adapter), "adapter_files": fingerprint(adapter)}
    return {"model": model, "files": fingerprint(folder), **named}


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of the names, sizes and pieces of the files in `folder`: other weights give another one."""
    root = as_path(folder)
    found = hashlib.sha256()
    # Hidden files are lock files and the cache of a download.
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path, root))
    for path in paths:
        with open_regular(path) as file:
            size = size_of(file)
            found.update(f"{path.relative_to(root)}\0{size}\0".encode("utf-8", "surrogateescape"))
            if size <= _WHOLE:
                found.update(file.read())
                continue
            for start in (*range(0, size, _EVERY), size - _PIECE):
                file.seek(start)
                found.update(file.read(_PIECE))
    return found.hexdigest()[:16]


def _hidden(path: pathlib.Path, root: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def prompts_identity(loaded: Loaded) -> str:
    """A hash of what is asked: ids, exact prompts, pictures by file name or content, and lengths of answers.

    It is the same once a picture that was missing is there.
    """
    found = hashlib.sha256()
    items = [*loaded.items, *(problem.item for problem in loaded.problems if problem.item is not None)]
    for item in sorted(items, key=lambda item: item.id):
        pictures = [image.key.rpartition("/")[2] for image in item.images]
        found.update(repr((item.id, item.prompt, pictures, item.max_new_tokens)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs, in words; "" if nothing does. A model is known by its files, not by its name."""
    names = [name for name in {**theirs, **ours} if name not in ("model", "adapter")]
    differing = [name for name in names if theirs.get(name) != ours.get(name)]
    if not differing:
        return ""
    shown = {"files": "model", "adapter_files": "adapter"}
    said = []
    for name in differing:
        name = shown.get(name, name)
        them, us = (one_line(side.get(name, "none")) for side in (theirs, ours))
        said.append(f"{name} {them} (files of which have changed)" if them == us else f"{name} {them}, not {us}")
    return "; ".join(said)
