"""Who made a folder, which decides whether it may be erased: a mark in it lists what was made here."""

from __future__ import annotations

import json
import pathlib

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line

MARK = "janus_jax.json"
MADE_BY = "janus_jax"
LAST = "config.json"  # without which nothing reads a folder as a checkpoint


def mark(folder: pathlib.Path):
    """Marks `folder` as made here, with a list of its present content, which `--overwrite` may erase."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MARK)
    text = json.dumps({"made_by": MADE_BY, "holds": names}, indent=2, ensure_ascii=False)
    (folder / MARK).write_text(text + "\n", encoding="utf-8")


def erasable(folder: pathlib.Path, known: frozenset[str] = frozenset()) -> str:
    """Why `folder` must not be erased, or '' if it may: if it was made here, with everything in it.

    Args:
      known: names that a folder made here before marks existed may contain, if the caller knows it to be one.
    """
    names = {path.name for path in folder.iterdir()}
    if MARK in names:
        try:
            made = read_json_object(folder / MARK)
        except (OSError, ValueError) as error:
            return f"its mark cannot be read ({error})"
        if made.get("made_by") != MADE_BY or not isinstance(made.get("holds"), list):
            return f"{MARK} in it is not the mark of a folder made by janus_jax"
        foreign = names - {name for name in made["holds"] if isinstance(name, str)} - {MARK}
    elif known:
        foreign = names - known
    else:
        return f"it has no {MARK}, which marks folders made by janus_jax"
    # Nothing is lost with empty files and folders.
    lost = sorted(name for name in foreign if not _is_empty(folder / name))
    return f"it also has {one_line(', '.join(lost))}, not made by janus_jax" if lost else ""


def _is_empty(path: pathlib.Path) -> bool:
    if path.is_symlink():
        return False
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def refuse_unless_erasable(folder: pathlib.Path, shown: str, overwrite: bool, known: frozenset[str]):
    """ValueError in one line, which names the folder as `shown`, unless it is to be overwritten and may be."""
    if not overwrite:
        raise ValueError(f"{shown} already exists; choose another folder or overwrite it with --overwrite")
    if not (folder / LAST).is_file():
        raise ValueError(f"{shown} is not a checkpoint folder, so it is not overwritten; choose another one")
    if reason := erasable(folder, known):
        raise ValueError(f"{shown} is not overwritten: {reason}; remove it yourself or choose another folder")
