"""A run as it goes, in a notebook: its losses, and the newest sample grid, in the output of the cell that trains."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from train.run.callbacks import Callback, Moment, Run
from train.run.figures import loss_curves
from train.run.metrics import FILE


def in_notebook() -> bool:
    return "ipykernel" in sys.modules


class Live(Callback):
    """Shows the curves and the newest sample grid of a run whenever there is something new."""

    def __init__(self, run: Run):
        self._run, self._shown = run, None
        self._handles: dict[str, Any] = {}

    def after(self, moment: Moment):
        config = self._run.config
        if moment.done % config.log_every == 0 or moment.last:
            with self._run.failures.alone("the live figure"):
                self._show(moment)

    def _show(self, moment: Moment):
        folder = self._run.workdir.folder
        if (folder / FILE).exists() and moment.done > 1:
            self._update("curves", loss_curves(folder / FILE, folder / "live.png", self._run.config.name))
        grid = max((folder / "samples").glob("*.png"), default=None)
        if grid is not None and grid != self._shown:
            self._update("samples", grid)
            self._shown = grid

    def _update(self, name: str, path: pathlib.Path):
        from IPython.display import Image, display

        image = Image(data=path.read_bytes(), format="png")
        if name in self._handles:
            self._handles[name].update(image)
        else:
            self._handles[name] = display(image, display_id=True)
