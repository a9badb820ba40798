"""Weight-only int8: the decoder's and the heads' kernels in one byte, with a float32 scale for each output channel.

A decoding step reads every weight once and is bound by that; half the bytes take up to half the time and half the
memory.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.sharding import flatten, is_stacked, output_axes, unflatten

_KERNELS = re.compile(
    r"(language_model/layers(_\d+)?/(self_attn|mlp)/\w+_proj|language_model/lm_head|gen_head/\w+)/kernel"
)
_LEVELS = 127


def quantize(params: Mapping[str, Any], delete: bool = False) -> dict[str, Any]:
    """`params` with int8 kernels, each with a `kernel_scale` by which `linear.Linear` multiplies.

    Embeddings, adapters, encoders, norms and biases stay as they are: they are read little, or once an image.

    Args:
      params: of `Janus`, with layers stacked or separate.
      delete: free the memory of each kernel once its int8 form is computed.
    """
    made: dict[str, Any] = {}
    for path, x in flatten(params).items():
        made |= quantize_leaf(path, x, delete)
    return unflatten(made)


def quantize_leaf(path: str, x: jax.Array, delete: bool = False) -> dict[str, jax.Array]:
    """The arrays that `quantize` turns one parameter into, by path: itself, or its int8 form and the scales."""
    if not is_quantized(path):
        return {path: x}
    kept = output_axes(path) + is_stacked(path)
    made = jax.block_until_ready(_to_int8(x, kept))
    if delete:
        x.delete()
    return dict(zip((path, f"{path}_scale"), made, strict=True))


def is_quantized(path: str) -> bool:
    """Whether `quantize` turns the parameter at `path` into int8."""
    return _KERNELS.fullmatch(path) is not None


@functools.partial(jax.jit, static_argnums=1)
def _to_int8(kernel: jax.Array, kept: int) -> tuple[jax.Array, jax.Array]:
    """`kernel` as int8, and its scales, whose axes are its first `kept`."""
    contracted = tuple(range(kept, kernel.ndim))
    x = kernel.astype(jnp.float32)
    scale = jnp.abs(x).max(contracted, keepdims=True) / _LEVELS
    rounded = jnp.round(x / jnp.where(scale > 0, scale, 1))
    return rounded.astype(jnp.int8), scale.reshape(scale.shape[:kept])
