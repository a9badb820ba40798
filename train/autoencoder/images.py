"""Batches of a folder's images for `train.vq`, read while the device works: only a few batches are in memory."""

from __future__ import annotations

import collections
import hashlib
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from janus_jax.io.messages import one_line
from janus_jax.processing.images import generation_pixels
from train.raw.folders import is_picture
from train.raw.storage import machine_error, patiently

_AHEAD = 3  # batches
_MAX_BAD_SHARE = 0.01


class ImageFiles:
    """The image files under `folder`, by name; `[i]` is float32 [image_size, image_size, 3] in [-1, 1].

    An image that cannot be decoded is named on standard error and replaced by the next one; more than one such image in
    a hundred ends the training. Raises FileNotFoundError if there are no images, ValueError for too many bad ones.
    """

    def __init__(self, folder: pathlib.Path, image_size: int):
        self.folder, self.image_size = folder, image_size
        if not folder.is_dir():
            raise FileNotFoundError(f"{one_line(folder)} is not a folder; --images must be a folder of image files")
        self._names = sorted(_image_names(folder))
        if not self._names:
            raise FileNotFoundError(f"{one_line(folder)} has no image files (.jpg, .png, .webp and the like)")
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> np.ndarray:
        for i in range(index, index + len(self)):
            i %= len(self)
            if i in self._bad:
                continue
            path = self.folder / self._names[i]
            try:
                return patiently(lambda path=path: generation_pixels(path, self.image_size), path)
            except (ValueError, OSError) as error:
                if machine_error(error):
                    raise
                self._note(i, path, error)
        raise ValueError(f"no image in {one_line(self.folder)} can be read")

    def _note(self, index: int, path: pathlib.Path, error: Exception):
        cause = one_line(error, 300)
        if path.name not in cause:
            cause = f"{one_line(path)}: {cause}"
        with self._lock:
            if index in self._bad:
                return
            self._bad.add(index)
            if len(self._bad) > _MAX_BAD_SHARE * len(self):
                raise ValueError(f"{len(self._bad)} of {len(self)} images cannot be read; the last one is {cause}")
            print(f"skipped: {cause}", file=sys.stderr, flush=True)

    def fingerprint(self) -> str:
        """A hash of the names, so that a training resumes only with the images that it began with."""
        return hashlib.sha256("\0".join(self._names).encode(errors="surrogateescape")).hexdigest()[:16]


def _image_names(folder: pathlib.Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if is_picture(name):
                yield os.path.relpath(os.path.join(place, name), folder)


def read_ahead(
    images: np.ndarray | ImageFiles, drawn: Callable[[int], np.ndarray], steps: range
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, float32 [B, size, size, 3]) for each of `steps`, of the images with indices `drawn(step)`, read ahead."""
    if isinstance(images, np.ndarray):
        yield from ((step, images[drawn(step)]) for step in steps)
        return
    waiting: collections.deque = collections.deque()
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        for step in steps:
            waiting.append((step, [pool.submit(images.__getitem__, int(i)) for i in drawn(step)]))
            if len(waiting) >= _AHEAD:
                yield _made(*waiting.popleft())
        while waiting:
            yield _made(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _made(step: int, images: list) -> tuple[int, np.ndarray]:
    return step, np.stack([image.result() for image in images])
