"""Figures of a run: loss curves, benchmarks over its steps, and in a notebook the run as it goes."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from train.config import KINDS
from train.run.callbacks import Callback, Moment, Run
from train.run.metrics import FILE, read_metrics

_COLORS = {"understanding": "#2563eb", "text": "#059669", "generation": "#dc2626"}
LOW, HIGH = "_low", "_high"  # after the name of a benchmark's figure: the ends of its interval


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
    runs = [read_metrics(path) for path in _several(metrics)]
    figure, (axes,) = _new_figure((8, 4.5))
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
        raise ValueError(f"{_listed(metrics)}: no train/loss_{{{','.join(KINDS)}}} to draw")

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
    _plain(axes)
    labeled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [label for held_out in ("", ", held out") for kind in KINDS if (label := kind + held_out) in labeled]
    axes.legend([labeled[label] for label in order], order, frameon=False)
    return _saved(figure, out_png)


def benchmark_curves(
    metrics: str | pathlib.Path | Sequence[str | pathlib.Path],
    out_png: str | pathlib.Path,
    title: str = "",
    titles: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Draws the main figure of each benchmark that runs have asked over the steps, with its 95% interval.

    Args:
      metrics: as for `loss_curves`.
      titles: of the benchmarks, by name; default their figures' names.
    Returns: `out_png`. Raises: FileNotFoundError, or ValueError if no benchmark was asked or matplotlib is missing.
    """
    runs = [read_metrics(path) for path in _several(metrics)]
    starts = [0, *itertools.accumulate(max((line["step"] for line in run), default=0) for run in runs)]
    names = dict.fromkeys(name.removesuffix(LOW) for run in runs for line in run for name in line if name.endswith(LOW))
    if not names:
        raise ValueError(f"{_listed(metrics)}: no benchmarks (evals/...{LOW}) to draw")
    figure, axes = _new_figure((4 * len(names), 3.4), len(names))
    for axis, name in zip(axes, names, strict=True):
        for start, run in zip(starts, runs, strict=False):
            steps, values = _series(run, name)
            steps = [start + step for step in steps]
            ends = [_series(run, name + end)[1] for end in (LOW, HIGH)]
            axis.plot(steps, values, "o-", color=_COLORS["understanding"], markersize=3.5, linewidth=1.6)
            if all(len(each) == len(steps) for each in ends):
                axis.fill_between(steps, *ends, color=_COLORS["understanding"], alpha=0.18, linewidth=0)
        _, task, figure_name = name.split("/", 2)
        axis.set_title((titles or {}).get(task, f"{task}: {figure_name.replace('_', ' ')}"), fontsize=10)
        axis.set_xlim(0, max(starts[-1], 1))
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        _plain(axis)
    if title:
        figure.suptitle(title)
    return _saved(figure, out_png)


def curves_of(
    metrics: str | pathlib.Path, out_png: str | pathlib.Path, names: Sequence[str], title: str = ""
) -> pathlib.Path:
    """Draws metrics of a run, each in a panel of its own over the steps, raw and smoothed.

    Args:
      names: of the metrics, with their prefix; those that a run does not have are left out.
    Returns: `out_png`. Raises: FileNotFoundError, or ValueError if it has none of them or matplotlib is missing.
    """
    run = read_metrics(metrics)
    there = {name: found for name in names if (found := _series(run, name))[0]}
    if not there:
        raise ValueError(f"{_listed(metrics)}: none of {', '.join(names)} to draw")
    figure, axes = _new_figure((3.6 * len(there), 3.2), len(there))
    for axis, (name, (steps, values)) in zip(axes, there.items(), strict=True):
        axis.plot(steps, values, color=_COLORS["understanding"], alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth(values), color=_COLORS["understanding"], linewidth=1.8)
        axis.set_title(name.rpartition("/")[2].replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        _plain(axis)
    if title:
        figure.suptitle(title)
    return _saved(figure, out_png)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of `values`, unbiased at its start."""
    keep = 1 - 1 / max(len(values) / 30, 1)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _several(metrics: str | pathlib.Path | Sequence[str | pathlib.Path]) -> list[str | pathlib.Path]:
    return [metrics] if isinstance(metrics, (str, pathlib.Path)) else list(metrics)


def _listed(metrics: str | pathlib.Path | Sequence[str | pathlib.Path]) -> str:
    return ", ".join(map(str, _several(metrics)))


def _new_figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes. ValueError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing curves needs matplotlib; pip install matplotlib") from None

    # A separate Figure, so that the process keeps its matplotlib backend.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _plain(axes: Any):
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _saved(figure: Any, out_png: str | pathlib.Path) -> pathlib.Path:
    out_png = pathlib.Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=150)
    return out_png


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
