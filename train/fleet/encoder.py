"""Images to VQ codes, on all devices of this process, each with images of its own; and back, to look at them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.model.janus import Janus
from janus_jax.sampling.images import decode_images
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.torch_weights import place
from train.data.fingerprints import VQ, params_fingerprint
from train.data.shards import Encode

_AXIS = "images"


def vq_decoder(folder: str | os.PathLike) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """From codes [num_tokens] to their image, uint8 [h, w, 3], and the fingerprint of `vq_encoder`."""
    model, params = _vq(folder)

    def decode(codes: np.ndarray) -> np.ndarray:
        return np.asarray(decode_images(model, params, jnp.asarray(codes)[None])[0])[0]

    return decode, params_fingerprint(params)


def _vq(folder: str | os.PathLike) -> tuple[Janus, Any]:
    """The model of a checkpoint folder with its VQ parameters alone; nothing else is read."""
    checkpoint = open_checkpoint(folder, quantized=True)  # the VQ model never is
    params = place({path: leaf for path, leaf in checkpoint.leaves.items() if path[0] == VQ}, "float32")
    return Janus(checkpoint.config, dtype=jnp.float32, param_dtype=jnp.float32), params


def vq_encoder(folder: str | os.PathLike, devices: Sequence[jax.Device] | None = None) -> tuple[Encode, str]:
    """Compiled `encode_codes` of a checkpoint folder, and a hash of its VQ parameters; nothing else is read.

    The images are divided among `devices`, by default all of this process, which all run the same program: for as many
    images each, codes do not depend on the number of devices. They are returned while they are being computed.
    """
    model, params = _vq(folder)
    # Of a pod's devices, those of this host alone: hosts do not wait for one another.
    mesh = Mesh(np.array(devices or jax.local_devices()), (_AXIS,))
    own, all_of_it = PartitionSpec(_AXIS), PartitionSpec()
    params = jax.device_put(params, NamedSharding(mesh, all_of_it))

    def codes(params: Any, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, images, method="encode_codes")

    encode = jax.jit(jax.shard_map(codes, mesh=mesh, in_specs=(all_of_it, own), out_specs=own))

    def start(images: np.ndarray) -> jax.Array:
        # As many for each device.
        count, more = len(images), -len(images) % mesh.size
        if more:
            images = np.concatenate([images, np.zeros((more, *images.shape[1:]), images.dtype)])
        found = encode(params, jax.device_put(images, NamedSharding(mesh, own)))
        return found[:count] if more else found

    return start, params_fingerprint(params)
