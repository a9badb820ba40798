"""Pictures in a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot


def pictures(
    images: Sequence[Any],
    titles: Sequence[Any] = (),
    columns: int = 10,
    size: float = 1.0,
    labels: Sequence[Any] = (),
    wrong: Sequence[int] = (),
) -> None:
    """Shows images (PIL or arrays) in rows, their pixels as they are.

    Args:
      titles: above images; those of the indices `wrong` are red.
      size: width of an image in inches.
      labels: in front of rows.
    """
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(columns * size, rows * (size + 0.25 * (len(titles) > 0))), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, label in zip(axes[:, 0], labels, strict=False):
        axis.text(-0.1, 0.5, str(label), transform=axis.transAxes, ha="right", va="center", fontsize=9)
    for index, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(np.asarray(image), interpolation="nearest", cmap="magma")
        if index < len(titles):
            title = textwrap.fill(str(titles[index]), max(8, int(12 * size)))
            axis.set_title(title, fontsize=9, color="firebrick" if index in wrong else "black")
    figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02)
    pyplot.show()


def heat(values: np.ndarray, title: str, axis: Any, low: float | None = None, high: float | None = None) -> None:
    """A grid of numbers on one axis of a figure, each number written into its cell where there are few."""
    drawn = axis.imshow(values, cmap="magma", vmin=low, vmax=high)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    if values.size <= 64:
        middle = sum(drawn.get_clim()) / 2
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=color)
    axis.figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.03)
