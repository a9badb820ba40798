"""Adapters with random numbers, made without PEFT, and their files."""

from __future__ import annotations

import pathlib

import numpy as np

from janus_jax.config import JanusConfig
from janus_jax.weights.adapters.adapter import Adapter, Delta, axes_of, chosen
from janus_jax.weights.adapters.peft_writing import write_adapter


def random_adapter(
    config: JanusConfig, targets=("decoder",), rank: int = 3, seed: int = 0, dora: bool = False
) -> Adapter:
    rng, deltas = np.random.default_rng(seed), {}
    for slot in chosen(config, targets):
        outputs, inputs = axes_of(slot)
        a = rng.standard_normal((rank, *inputs)).astype(np.float32) * np.prod(inputs) ** -0.5
        b = rng.standard_normal((*outputs, rank)).astype(np.float32)
        magnitude = rng.uniform(0.7, 1.4, outputs).astype(np.float32) if dora else None
        deltas[slot.path[:-1], slot.layer] = Delta(a, b, 0.5, magnitude)
    return Adapter(deltas, {}, dora=dora, base="somewhere/janus")


def written(folder: pathlib.Path, config: JanusConfig, **settings) -> pathlib.Path:
    folder.mkdir()
    write_adapter(folder, random_adapter(config, **settings), config)
    return folder
