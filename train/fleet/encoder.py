"""The encoder of images to VQ codes, for preparation."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from janus_jax.model.janus import Janus
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.torch_weights import place
from train.data.fingerprints import VQ, params_fingerprint
from train.data.shards import Encode


def vq_encoder(folder: str | os.PathLike) -> tuple[Encode, str]:
    """Compiled `encode_codes` of a checkpoint folder, and a hash of its VQ parameters; nothing else is read."""
    checkpoint = open_checkpoint(folder, quantized=True)  # the VQ model never is
    params = place({path: leaf for path, leaf in checkpoint.leaves.items() if path[0] == VQ}, "float32")
    model = Janus(checkpoint.config, dtype=jnp.float32, param_dtype=jnp.float32)
    encode = jax.jit(lambda params, images: model.apply({"params": params}, images, method="encode_codes"))
    return lambda images: encode(params, images), params_fingerprint(params)
