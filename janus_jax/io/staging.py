"""Writing folders and files whole or not at all.

A folder is made beside its place, under a hidden name, and renamed onto it when everything is there: nothing that
lies in the place is touched before, and what fails leaves nothing behind. While it is being made, a lock beside it
says that its maker is alive; what a killed maker left is found by the next one and removed.

    .NAME.MARK.partial    the folder in the making
    .NAME.MARK.old        the one that it replaces, for the moment between two renames
    .NAME.MARK.lock       held by the maker for as long as it lives
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from janus_jax.io.files import read_json_object
from janus_jax.io.leftovers import new_lock, remove, remove_left
from janus_jax.io.messages import one_line

MARK = "janus_jax.json"
_MADE_BY = "janus_jax"
NO_ROOM = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
}
_PROBE_BYTES = 64 << 20


# ---------------------------------------------------------------- whose folder it is


def mark(folder: pathlib.Path):
    """Marks `folder` as made here, with what it holds now: that much `--overwrite` may erase."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MARK)
    text = json.dumps({"made_by": _MADE_BY, "holds": names}, indent=2, ensure_ascii=False)
    (folder / MARK).write_text(text + "\n", encoding="utf-8")


def erasable(folder: pathlib.Path, known: frozenset[str] = frozenset()) -> str:
    """Why `folder` must not be erased, '' where it may: it was made here, and all in it with it.

    Args:
      known: what a folder made here before there were marks may hold, where the caller knows this one for such a one.
    """
    names = {path.name for path in folder.iterdir()}
    if MARK in names:
        try:
            made = read_json_object(folder / MARK)
        except (OSError, ValueError) as error:
            return f"its mark cannot be read ({error})"
        if made.get("made_by") != _MADE_BY or not isinstance(made.get("holds"), list):
            return f"{MARK} in it is not the mark of a folder that was made here"
        foreign = names - {name for name in made["holds"] if isinstance(name, str)} - {MARK}
    elif known:
        foreign = names - known
    else:
        return f"it holds no {MARK}, by which a folder that was made here is known"
    # What is empty cannot be lost.
    lost = sorted(name for name in foreign if not _is_empty(folder / name))
    return f"it also holds {one_line(', '.join(lost))}, not made here" if lost else ""


def _is_empty(path: pathlib.Path) -> bool:
    if path.is_symlink():
        return False
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def destination(out: str | os.PathLike) -> pathlib.Path:
    """Where `out` leads, as an absolute path: behind a link, the place that it points to.

    Raises ValueError where no folder can come to be there: a circle of links, a file, a mount point.
    """
    given = pathlib.Path(out)
    try:
        place = pathlib.Path(os.path.realpath(given))
    except ValueError as error:  # a null character
        raise ValueError(f"{one_line(given)}: {error}") from None
    if place.is_symlink():
        raise ValueError(f"{one_line(given)} is a link that leads nowhere; remove it or choose another folder")
    if place.exists() and not place.is_dir():
        raise ValueError(f"{one_line(given)} exists already and is no folder; choose another name")
    if os.path.ismount(place):
        raise ValueError(f"{one_line(given)} is a mount point, which no folder can replace; name a folder inside it")
    return place


# ---------------------------------------------------------------- a folder in the making


class Staging:
    """A folder in the making, `folder`, that becomes `place` with `finish` or vanishes with `discard`.

    Args:
      out: where it shall be; a link stands for the place that it points to.
      overwrite: erase what is there, where `erasable` allows it. Else the place has to be free, or an empty folder.
      known: see `erasable`.
      num_bytes: what will be written; refused at once where the disk has less room.
      note: hears, a sentence each, what was found beside the place and removed.

    Raises ValueError where the place is not free, OSError where nothing can be written there.
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
        if not self._taken():
            return
        if not self._overwrite:
            raise ValueError(f"{self._shown} exists already; choose another folder or overwrite it with --overwrite")
        if not (self.place / "config.json").is_file():
            raise ValueError(f"{self._shown} is no checkpoint folder, so it is not overwritten; choose another one")
        if reason := erasable(self.place, self._known):
            raise ValueError(f"{self._shown} is not overwritten: {reason}; remove it yourself or choose another folder")

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
        """Writes a little of what is to come: of a quota, `disk_usage` knows nothing."""
        probe = self.folder / "probe"
        with open(probe, "wb") as file:
            for _ in range(0, min(num_bytes, _PROBE_BYTES), 1 << 20):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()

    def finish(self):
        """Marks the folder and puts it in its place; ValueError where that was taken meanwhile."""
        mark(self.folder)
        if self._overwrite and self._taken():
            self._check_free()
            self.place.rename(self._aside)
        try:
            # A folder can be renamed onto nothing and onto an empty folder, and never onto anything else.
            self.folder.rename(self.place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            kept = f"; what it was to replace lies in {one_line(self._aside)}" if self._aside.exists() else ""
            raise ValueError(f"{self._shown} was made by somebody else meanwhile and is left as it is{kept}") from None
        self._parents = []
        remove(self._aside)
        self._unlock()

    def discard(self):
        """Removes what was written, and puts back what was to be replaced."""
        with _undisturbed():
            if self._aside.exists() and not self.place.exists():
                self._aside.rename(self.place)
            remove(self.folder)
            self._unlock()
            self._remove_parents()

    def _unlock(self):
        lock = self.folder.with_suffix(".lock")
        # Removed while it is held: nobody can take it for a dead one's in between.
        lock.unlink(missing_ok=True)
        os.close(self._lock)

    def _remove_parents(self):
        with contextlib.suppress(OSError):
            for parent in self._parents:
                parent.rmdir()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds off the signals that end a process: an impatient second one would leave half of it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    named = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    handlers = {number: signal.getsignal(number) for number in named if number is not None}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    for number in handlers:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def staged(out: str | os.PathLike, **options: Any) -> Iterator[pathlib.Path]:
    """The folder of a `Staging` that becomes `out` when the block ends well, and vanishes when it does not."""
    with _named_when_full(out):
        staging = Staging(out, **options)
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
        raise OSError(told, f"{NO_ROOM[told]}: what was written is removed again", one_line(out)) from error


def no_room(error: BaseException) -> int:
    """The errno by which `error` says that a disk is full, 0 where it says something else."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else 0
    # Tensorstore says it in words.
    return next(
        (number for number, words in NO_ROOM.items() if isinstance(error, ValueError) and words in str(error)), 0
    )


def _make_parents(place: pathlib.Path) -> list[pathlib.Path]:
    """Makes the folders above `place`; returns the new ones, the innermost first."""
    absent = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    return absent


# ---------------------------------------------------------------- files


def write_file(path: pathlib.Path, data: bytes):
    """Writes `data` as the file `path`, which is whole or as it was before; OSError where the disk is full."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # where a full disk would show only later
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if told := no_room(error):
            raise OSError(told, NO_ROOM[told], str(path)) from None
        raise


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[None]:
    """Makes `folder` where it is absent; takes it away again if the block fails and has written nothing into it.

    Raises OSError where it cannot be written to.
    """
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
