"""Writes folders atomically.

A folder is written next to its destination, under a hidden name, and renamed when it is complete: until then nothing at
the destination is touched, and a failure leaves nothing behind. Meanwhile a lock file next to it shows that its writer
is alive; leftovers of a killed writer are found and removed by the next one.

    .NAME.MARK.partial    the folder being written
    .NAME.MARK.old        the folder that it replaces, between two renames
    .NAME.MARK.lock       held by the writer as long as it is alive
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import StorePath, as_path, local_only
from janus_jax.io.whole.files import NO_ROOM, no_room
from janus_jax.io.whole.in_store import staged_in_store, try_to_write
from janus_jax.io.whole.leftovers import new_lock, remove, remove_left, undisturbed
from janus_jax.io.whole.ownership import mark, refuse_unless_erasable

_PROBE_BYTES = 64 << 20


def destination(out: str | os.PathLike) -> pathlib.Path:
    """The absolute path of `out`, with links followed; in a store, its path there.

    Raises ValueError if no folder can be created there: for a circle of links, a file, a mount point.
    """
    if is_store(out):
        return as_path(out)
    given = local_only(out)
    try:
        place = pathlib.Path(os.path.realpath(given))
    except ValueError as error:  # a null character
        raise ValueError(f"{one_line(given)}: {error}") from None
    if place.is_symlink():
        raise ValueError(f"{one_line(given)} is a link that leads nowhere; remove it or choose another folder")
    if place.exists() and not place.is_dir():
        raise ValueError(f"{one_line(given)} already exists and is not a folder; choose another name")
    if os.path.ismount(place):
        raise ValueError(f"{one_line(given)} is a mount point, which cannot be replaced; choose a folder inside it")
    return place


# ---------------------------------------------------------------- staging


class Staging:
    """A temporary `folder` that is moved to `place` by `finish`, or removed by `discard`.

    Args:
      out: the destination; links are followed.
      overwrite: erase what is there, if `erasable` allows it. Otherwise the destination must be free, or an empty
        folder.
      known: see `erasable`.
      num_bytes: bytes that will be written; refused at once if the disk has less space.
      note: called with a sentence for each leftover that was found and removed.

    Raises ValueError if the destination is not free, OSError if nothing can be written there.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        overwrite: bool = False,
        known: frozenset[str] = frozenset(),
        num_bytes: int = 0,
        note: Callable[[str], Any] = print,
    ):
        self.place, self._overwrite, self._known = destination(out), overwrite, known
        self._shown = one_line(out)
        for sentence in remove_left(self.place):
            note(sentence)
        self._check_free()
        self._parents = _make_parents(self.place)
        try:
            self._check_free_bytes(num_bytes)
            self._lock, lock = new_lock(self.place)
            self.folder, self._aside = lock.with_suffix(".partial"), lock.with_suffix(".old")
        except BaseException:
            self._remove_parents()
            raise
        try:
            self.folder.mkdir()
            self._probe(num_bytes)
        except BaseException:
            self.discard()
            raise

    def _check_free(self):
        if self._taken():
            refuse_unless_erasable(self.place, self._shown, self._overwrite, self._known)

    def _taken(self) -> bool:
        if self.place.is_dir() and not self.place.is_symlink():
            return any(self.place.iterdir())
        return os.path.lexists(self.place)

    def _check_free_bytes(self, num_bytes: int):
        usage = shutil.disk_usage(self.place.parent)
        if usage.total and usage.free < num_bytes:
            needed, free = (f"{size / 1e9:.3g} GB" for size in (num_bytes, usage.free))
            raise OSError(errno.ENOSPC, f"needs {needed}, but its disk has {free} free; make room there", self._shown)

    def _probe(self, num_bytes: int):
        """Writes some bytes to detect a quota, which `disk_usage` does not report."""
        probe = self.folder / "probe"
        with open(probe, "wb") as file:
            for _ in range(0, min(num_bytes, _PROBE_BYTES), 1 << 20):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()

    def finish(self):
        """Marks the folder and moves it to its destination; ValueError if that was taken meanwhile."""
        mark(self.folder)
        if self._overwrite and self._taken():
            self._check_free()
            self.place.rename(self._aside)
        try:
            # A folder can only be renamed to a free name or onto an empty folder.
            self.folder.rename(self.place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            kept = f"; the folder to be replaced is in {one_line(self._aside)}" if self._aside.exists() else ""
            raise ValueError(f"{self._shown} was created by another process and is left as it is{kept}") from None
        self._parents = []
        remove(self._aside)
        self._unlock()

    def discard(self):
        """Removes what was written, and restores what was to be replaced."""
        with undisturbed():
            if self._aside.exists() and not self.place.exists():
                self._aside.rename(self.place)
            remove(self.folder)
            self._unlock()
            self._remove_parents()

    def _unlock(self):
        lock = self.folder.with_suffix(".lock")
        # Removed while it is held, so that no other process can take it for a leftover.
        lock.unlink(missing_ok=True)
        os.close(self._lock)

    def _remove_parents(self):
        with contextlib.suppress(OSError):
            for parent in self._parents:
                parent.rmdir()


@contextlib.contextmanager
def staged(
    out: str | os.PathLike, overwrite: bool = False, known: frozenset[str] = frozenset(), **options: Any
) -> Iterator[pathlib.Path]:
    """The folder of a `Staging` that is moved to `out` if the block succeeds, and removed if it fails.

    In a store it is `out` itself: the block must write `ownership.LAST` last, without which nobody reads the folder.
    """
    if is_store(out):
        with staged_in_store(StorePath(os.fspath(out)), overwrite, known):
            yield as_path(out)
        return
    with _named_when_full(out):
        staging = Staging(out, overwrite, known, **options)
        try:
            yield staging.folder
            staging.finish()
        except BaseException:
            staging.discard()
            raise


@contextlib.contextmanager
def _named_when_full(out: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        told = no_room(error)
        if not told or (isinstance(error, OSError) and error.filename == one_line(out)):
            raise
        raise OSError(told, f"{NO_ROOM[told]}; the partial output was removed", one_line(out)) from error


def _make_parents(place: pathlib.Path) -> list[pathlib.Path]:
    """Creates the parent folders of `place`; returns the new ones, innermost first."""
    absent = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    return absent


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[None]:
    """Creates `folder` if it is missing, and removes it again if the block fails without having written into it.

    Raises OSError if it is not writable.
    """
    if isinstance(folder, StorePath):
        try_to_write(folder)
        yield
        return
    local_only(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        probe = folder / f".{secrets.token_hex(4)}.partial"
        probe.touch(exist_ok=False)
        probe.unlink()
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise
