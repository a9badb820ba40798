"""Folders in a store, where nothing can be renamed or locked: whole with their last object.

The first object is the folder's mark, which names its writer; the last is what makes readers take it for whole, and the
first to be removed. What a killed writer leaves is told by the mark, and only replaced if that is asked for: the writer
may be alive.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator

from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.stores import StorePath, check_bucket
from janus_jax.io.whole.files import PARTIAL
from janus_jax.io.whole.leftovers import undisturbed
from janus_jax.io.whole.ownership import LAST, MADE_BY, MARK, mark, refuse_unless_erasable

_WRITER = "writer"  # of a mark: who writes the folder, until it is whole


@contextlib.contextmanager
def staged_in_store(place: StorePath, overwrite: bool = False, known: frozenset[str] = frozenset()) -> Iterator[None]:
    """Empties `place`, to be written in the block, `LAST` as its last object; removes it again if the block fails.

    Args:
      overwrite, known: as for `folders.Staging`; an unfinished folder may be overwritten.

    Raises ValueError if something is there that may not be overwritten, or another process begins to write there;
    OSError if nothing can be written there.
    """
    check_bucket(place)
    _check_free(place, overwrite, known)
    (place / LAST).unlink(missing_ok=True)
    writer = secrets.token_hex(8)
    (place / MARK).write_text(json.dumps({"made_by": MADE_BY, _WRITER: writer}))
    try:
        place.rmtree(kept=[place / MARK])
        yield
        if _writer_of(place) != writer:
            raise ValueError(f"{one_line(place)} was begun by another process meanwhile, and is left to it")
        mark(place)  # type: ignore[arg-type]
    except BaseException:
        with undisturbed(), contextlib.suppress(OSError, ValueError):
            if _writer_of(place) == writer:
                (place / LAST).unlink(missing_ok=True)
                place.rmtree()
        raise


def try_to_write(folder: StorePath) -> None:
    """OSError in one line if this process may not write to `folder` and remove there, which is known by trying."""
    probe = folder / f".{secrets.token_hex(8)}{PARTIAL}"
    probe.write_bytes(b"")
    probe.unlink()


def _check_free(place: StorePath, overwrite: bool, known: frozenset[str]):
    if place.is_file():
        raise ValueError(f"{one_line(place)} already exists and is not a folder; choose another name")
    if not place.is_dir():
        return
    if not (place / LAST).exists() and _writer_of(place):
        if overwrite:
            return
        raise ValueError(
            f"{one_line(place)} is unfinished, by a process that was killed or still writes; choose another folder, or "
            "if none does, overwrite it with --overwrite"
        )
    refuse_unless_erasable(place, one_line(place), overwrite, known)  # type: ignore[arg-type]


def _writer_of(place: StorePath) -> str:
    """Who writes the folder; '' if nobody says so."""
    try:
        return str(read_json_object(place / MARK, missing_ok=True).get(_WRITER, ""))
    except ValueError:
        return ""
