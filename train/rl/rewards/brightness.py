"""How bright a picture is: a reward that is easily hacked, to see what that looks like in a run's metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.rl.rewards.functions import Metadata


def brightness(pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
    """The mean of each picture, from 0 for black to 1 for white; float64 [N]."""
    return pictures.reshape(len(pictures), -1).mean(axis=1) / 255
