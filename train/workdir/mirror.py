"""Files that a run appends to, or that libraries write to local folders only, copied to its workdir in a store."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

from janus_jax.io.messages import one_line
from janus_jax.io.stores import StorePath

EVERY = 60  # seconds between copies


class Mirror:
    """A local folder whose changed files are copied to `folder` in the background, and whenever `copy` is called.

    Args:
      may: asked before each copy; nothing is copied any more once it says no.

    Attributes:
      local: the folder; it is removed by `close`, unless something in it could not be copied.
    """

    def __init__(self, folder: StorePath, may: Callable[[], bool]):
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="janus_jax-workdir-"))
        self._folder, self._may = folder, may
        self._copied: dict[str, tuple[int, int]] = {}
        # One copy at a time, so that an older content never replaces a newer one.
        self._copying, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="mirror", daemon=True)
        self._thread.start()

    def fetch(self, names: Sequence[str]):
        """Copies the files `names`, as far as they are there, from the store, to be appended to."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.local / name).write_bytes((self._folder / name).read_bytes())
                self._copied[name] = _state(self.local / name)

    def copy(self):
        """Copies what has changed since the last copy; OSError if the store does not take it."""
        with self._copying:
            for path in sorted(self.local.rglob("*")):
                if path.is_symlink() or not path.is_file():
                    continue
                name = path.relative_to(self.local).as_posix()
                try:
                    # Before its content: what is written meanwhile is copied again.
                    state = _state(path)
                    data = path.read_bytes() if state != self._copied.get(name) else None
                except FileNotFoundError:
                    continue
                if data is not None:
                    if not self._may():
                        return
                    (self._folder / name).write_bytes(data)
                    self._copied[name] = state

    def _repeat(self):
        while not self._over.wait(EVERY):
            # What fails is told when it fails at a checkpoint or at the end.
            with contextlib.suppress(OSError):
                self.copy()

    def close(self):
        """Copies once more, and removes the local folder; says where it is if the store does not take its files."""
        self._over.set()
        try:
            self.copy()
        except OSError as error:
            cause = f"{one_line(error, 300)}; metrics and notes since then are in {self.local}"
            print(f"note: {self._folder} could not be written to at the end: {cause}", file=sys.stderr, flush=True)
            return
        shutil.rmtree(self.local, ignore_errors=True)


def _state(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
