"""Figures of a run: loss curves, and in a notebook the run as it goes."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from train.config import KINDS
from train.run.callbacks import Callback, Moment, Run
from train.run.metrics import FILE, read_metrics

_COLORS = {"understanding": "#2563eb", "text": "#059669", "generation": "#dc2626"}


def loss_curves(
    metrics: str | pathlib.Path | Sequence[str | pathlib.Path], out_png: str | pathlib.Path, title: str = ""
) -> pathlib.Path:
    """Draws the training loss of each task over the steps, raw and smoothed, with held-out losses as dots.

    Args:
      metrics: a metrics.jsonl or workdir; or several, drawn as consecutive stages with a line between them.
      out_png: the image file to write.
      title: title of the figure.
    Returns: `out_png`. Raises: FileNotFoundError, or ValueError if there is no loss to draw or matplotlib is missing.
    """
    paths = [metrics] if isinstance(metrics, (str, pathlib.Path)) else list(metrics)
    runs = [read_metrics(path) for path in paths]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing the loss curves needs matplotlib; pip install matplotlib") from None

    # A separate Figure, so that the process keeps its matplotlib backend.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    start, drawn, starts = 0, set(), []
    for run in runs:
        starts.append(start)
        for kind in KINDS:
            steps, losses = _series(run, f"train/loss_{kind}")
            if steps:
                label = kind if kind not in drawn else None
                drawn.add(kind)
                shifted, color = [start + step for step in steps], _COLORS[kind]
                axes.plot(shifted, losses, color=color, alpha=0.22, linewidth=0.8)
                axes.plot(shifted, smooth(losses), color=color, linewidth=1.8, label=label)
            steps, losses = _series(run, f"eval/loss_{kind}")
            if steps:
                label = f"{kind}, held out" if f"{kind}, held out" not in drawn else None
                drawn.add(f"{kind}, held out")
                shifted = [start + step for step in steps]
                axes.plot(
                    shifted, losses, "o", color=_COLORS[kind], markersize=4.5, markeredgecolor="white", label=label
                )
        start += max((line["step"] for line in run), default=0)
    if not drawn:
        raise ValueError(f"{', '.join(map(str, paths))}: no train/loss_{{{','.join(KINDS)}}} to draw")

    if len(runs) > 1:
        for number, (left, right) in enumerate(zip(starts, [*starts[1:], start], strict=True), 1):
            if number > 1:
                axes.axvline(left, color="0.55", linewidth=1, linestyle=(0, (4, 3)))
            axes.text(
                (left + right) / 2, 1.01, f"stage {number}", transform=axes.get_xaxis_transform(), ha="center",
                va="bottom", color="0.35", fontsize=9,
            )  # fmt: skip
    axes.set_xlim(0, max(start, 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy per token (nats)")
    if title:
        axes.set_title(title, pad=22 if len(runs) > 1 else 8)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    labeled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [label for held_out in ("", ", held out") for kind in KINDS if (label := kind + held_out) in labeled]
    axes.legend([labeled[label] for label in order], order, frameon=False)
    out_png = pathlib.Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=150)
    return out_png


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of `values`, unbiased at its start."""
    keep = 1 - 1 / max(len(values) / 30, 1)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _series(run: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in run if line.get(name) is not None and math.isfinite(line[name])]
    return [step for step, _ in points], [value for _, value in points]


# ---------------------------------------------------------------- in a notebook


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
        folder, shared = self._run.workdir.local, self._run.workdir.folder
        if (folder / FILE).exists() and moment.done > 1:
            self._update("curves", loss_curves(folder / FILE, folder / "live.png", self._run.config.name))
        grid = max((shared / "samples").glob("*.png"), default=None)
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
