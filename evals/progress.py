"""How far an evaluation is: a bar in a terminal, else a line every now and then, with the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from janus_jax.io.messages import print_line
from janus_jax.io.progress import shown

_EVERY = 30.0  # seconds between two lines


class Progress:
    """A context manager; `add` says that so many more items are done.

    Args:
      done: items that were done before this start; they do not count for the rate.
      enabled: see `progress.shown`; False says nothing at all.
    """

    def __init__(self, name: str, total: int, done: int, enabled: bool | None):
        self._name, self._total, self._done = name, total, done
        self._lines = enabled is not False and not shown(enabled)
        bar = enabled is not False and shown(enabled)
        self._bar = tqdm(desc=name, total=total, initial=done, unit="item", disable=not bar, file=sys.stderr)
        self._began: tuple[float, int] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._began is None:  # the first batch includes compilation
            self._began = (now, self._done)
        if self._lines and (now - self._said >= _EVERY or self._done >= self._total):
            self._said = now
            print_line(self.line(now))

    def line(self, now: float) -> str:
        """Items that are done, and the time left."""
        began, before = self._began or (now, self._done)
        text = f"{self._name}: {self._done:,} of {self._total:,}"
        if self._done > before and now > began:
            rate = (self._done - before) / (now - began)
            text += f", {rate:.3g} items/s, {_duration((self._total - self._done) / rate)} left"
        return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
