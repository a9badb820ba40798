"""Judges of drawn digits as rewards, and one of another kind that nothing is rewarded by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from examples.digits.data import SHIFTS, load_split, shifted, to_rgb
from examples.digits.judge import Judge

_SPLITS = ("train", "validation")
_FEATURES, _EPOCHS, _BATCH = (16, 32), 12, 64
_LEARNING_RATE, _WEIGHT_DECAY, _NOISE = 2e-3, 1e-3, 0.05


class Recognized:
    """The reward: 1 for a picture that the judge takes for the digit that its prompt asks for, else 0."""

    def __init__(self):
        self._judge = Judge(_SPLITS)

    def __call__(
        self, pictures: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        return self.right(pictures, [each["digit"] for each in metadata])

    def right(self, pictures: np.ndarray, digits: Sequence[int]) -> np.ndarray:
        """Float64 [N], 1 or 0."""
        if not len(pictures):
            return np.zeros(0)
        return (self._judge.predict(pictures) == np.asarray(digits)).astype(np.float64)


class Network:
    """A judge of another kind: a small convolutional network, trained when it is made, in half a minute on two cores.

    As the other one it sees the training images at every shift, in the 8 x 8 pixels that digits are made of.
    """

    def __init__(self, seed: int = 0):
        import optax

        images, labels = load_split(*_SPLITS)
        x, y = _pooled(to_rgb(shifted(images))), np.tile(labels, len(SHIFTS)).astype(np.int32)
        self._model = _Layers()
        steps = _EPOCHS * len(x) // _BATCH
        optimizer = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, steps), weight_decay=_WEIGHT_DECAY)

        def loss(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
            noisy = x + _NOISE * jax.random.normal(key, x.shape)
            logits = self._model.apply(params, noisy)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        @jax.jit
        def update(params: Any, state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[Any, Any]:
            changes, state = optimizer.update(jax.grad(loss)(params, x, y, key), state, params)
            return optax.apply_updates(params, changes), state

        params = self._model.init(jax.random.key(seed), x[:1])
        state, rng = optimizer.init(params), np.random.default_rng(seed)
        for step in range(steps):
            rows = rng.integers(0, len(x), _BATCH)
            params, state = update(params, state, x[rows], y[rows], jax.random.key(step))
        self._apply = jax.jit(lambda x: self._model.apply(params, x).argmax(-1))

    def right(self, pictures: np.ndarray, digits: Sequence[int]) -> np.ndarray:
        """Float64 [N], 1 or 0."""
        return (np.asarray(self._apply(_pooled(pictures))) == np.asarray(digits)).astype(np.float64)


class _Layers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[..., None]
        for features in _FEATURES:
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(_FEATURES[-1], (3, 3))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def _pooled(pictures: np.ndarray) -> np.ndarray:
    """Float32 [N, 8, 8], from 0 to 1, of pictures [N, 16, 16, 3]."""
    return pictures.astype(np.float32).reshape(len(pictures), 8, 2, 8, 2, 3).mean((2, 4, 5)) / 255
