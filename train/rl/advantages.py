"""From rewards to advantages: each picture compared with the others of its prompt."""

from __future__ import annotations

import dataclasses

import numpy as np

_LEAST = 1e-4  # added to a group's standard deviation, as everywhere (trl, T2I-R1)


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Of the pictures of a step, in order.

    Attributes:
      values: float32 [N], 0 for pictures that do not count.
      live: float32 [N], 1 for pictures that count.
      failed: groups in which a picture has no reward, which are left out.
      equal: groups whose rewards are all equal, from which nothing can be learned, and which are skipped.
      spread: the mean of the groups' standard deviations; NaN if all of them failed.
    """

    values: np.ndarray
    live: np.ndarray
    failed: int
    equal: int
    spread: float


def advantages(rewards: np.ndarray, group: int, scale: bool = True) -> Advantages:
    """Of `rewards` [N] float64, NaN where there is none; pictures of a group follow one another.

    Args:
      scale: whether the differences from a group's mean are divided by its standard deviation.
    """
    groups = np.asarray(rewards, np.float64).reshape(-1, group)
    whole = np.isfinite(groups).all(1)
    known = np.where(whole[:, None], groups, 0)
    equal = whole & (known == known[:, :1]).all(1)
    away = known - known.mean(1, keepdims=True)
    spread = known.std(1, ddof=1, keepdims=True)
    values = away / (spread + _LEAST) if scale else away
    live = np.repeat(whole & ~equal, group)
    return Advantages(
        values=np.where(live, values.ravel(), 0).astype(np.float32),
        live=live.astype(np.float32),
        failed=int((~whole).sum()),
        equal=int(equal.sum()),
        spread=float(spread[whole].mean()) if whole.any() else float("nan"),
    )
