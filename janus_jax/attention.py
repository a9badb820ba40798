"""Scaled dot-product attention, one function for every block."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attention with grouped key/value heads; scores and softmax in float32.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, S, H], heads before length as in the KV cache; N is a multiple of K.
      mask: boolean [B or 1, T or 1, S], True where a query may look; None looks everywhere.
    Returns: [B, T, N, H] in q's dtype. A query that may look nowhere gets the mean of the values.
    """
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[1], -1, head_dim)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v).reshape(batch, length, heads, head_dim)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Boolean [B, T, T]: each token looks at itself and at earlier ones of its own segment.

    Args:
      segment_ids: [B, T]; padding is a segment of its own (0 by convention), so it never leaks into others.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))
