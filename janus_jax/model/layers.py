"""Layers shared by the encoders and the decoder.

Axis legend, here and in every einsum: B batch, T query length, S key length, N heads, K key/value heads, G heads
per key/value head, H head dim, D width, F MLP width, V vocabulary, C channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.model.attention import KEPT
from janus_jax.model.linear import Linear
from janus_jax.model.precision import residual_dtype
from janus_jax.sharding import constrain


class Embed(nn.Module):
    """Embedding table [num, features]: ids [...] give [..., features]. `rows` is the logical axis of num."""

    num: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    rows: str | None = None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.num, self.features), self.param_dtype)
        # Gathered over fsdp like any other weight: split there, its width would compete with the batch for the axis.
        table = constrain(table, self.rows, None)
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32 (reference: transformers LlamaRMSNorm)."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        wide = residual_dtype(self.dtype)
        return (y.astype(wide) * scale.astype(wide)).astype(self.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its exact erf form, as everywhere in Janus."""
    return jax.nn.gelu(x, approximate=False)


class MlpProjector(nn.Module):
    """Adapter: Linear, then (GELU, Linear) depth - 1 times (reference: janus/models/projector.py).

    Layers have the indices of the reference's nn.Sequential: layers_0, layers_2, ...
    """

    in_width: int
    width: int
    depth: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        in_width, types = self.in_width, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i in range(self.depth):
            x = x if i == 0 else gelu(x)
            shape = (self.width, in_width)
            x = Linear("...D,FD->...F", shape, use_bias=True, **types, name=f"layers_{2 * i}")(x)
            in_width = self.width
        return x


def rope(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] in float32 of the rotary embedding at `positions` [B, T]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, T, N, H] in float32; halves are paired as in transformers' rotate_half."""
    cos, sin = (table[:, :, None, :] for table in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


_OF_ATTENTION = jax.checkpoint_policies.save_only_these_names(KEPT)
# What is saved for a block's backward pass instead of being recomputed.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _OF_ATTENTION
    ),
    "attention": _OF_ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """`block` with a backward pass that recomputes activations.

    Args:
      remat: 'none' saves all activations; 'dots' the matrix products and what splash attention's backward pass reads;
        'attention' only those of the attention, so that the MLP is computed twice; 'full' only the block's input.
    """
    if remat == "none":
        return block
    # Inside a scan, XLA's common-subexpression elimination cannot undo the recomputation, and barriers would cost time.
    return nn.remat(block, policy=_REMAT_POLICIES[remat], prevent_cse=False)
