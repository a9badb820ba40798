"""How one token is drawn from logits: temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.io.messages import one_line

_LARGEST, _SMALLEST = (float(x) for x in (jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).tiny))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits: divide by the temperature, keep the top k, keep the top p, draw.

    Attributes:
      temperature: above 0; ignored when greedy.
      top_k: keep this many of the likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens up to this much probability; 1 keeps all.
      greedy: take the likeliest token.
      truncated: whether top_k or top_p do anything. Static, like greedy, since it costs a sort a step.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    greedy: bool = dataclasses.field(default=False, metadata={"static": True})
    truncated: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, keys: jax.Array, logits: jax.Array) -> jax.Array:
        """Tokens [B] int32 from float32 logits [B, V], each drawn with its own key of keys [B]."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.truncated:
            logits = jnp.where(_kept(logits, self.top_k, self.top_p), logits, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def make_sampler(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Sampler:
    """A checked Sampler; temperature 0 is greedy. ValueError names the setting out of range and the range."""
    if not (_is_number(temperature) and 0 <= temperature <= _LARGEST):
        raise ValueError(f"temperature {one_line(temperature)} is out of range: 0 (greedy) or above, in float32")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p {one_line(top_p)} is out of range: above 0, up to 1 (all tokens)")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or top_k < 1):
        raise ValueError(f"top_k {one_line(top_k)} is out of range: a whole number from 1, or None (all tokens)")
    greedy = temperature < 1e-6  # where float32 logits would overflow, only the largest has a chance
    return Sampler(
        temperature=jnp.float32(1 if greedy else temperature),
        top_k=jnp.int32(min(top_k or 0, 2**31 - 1)),
        top_p=jnp.float32(max(top_p, _SMALLEST)),  # 0 would keep nothing, not even the likeliest token
        greedy=greedy,
        truncated=not greedy and (top_k is not None or top_p < 1),
    )


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """`keys` [B] of one step of a loop."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def check_guidance(cfg_weight: float) -> None:
    """ValueError where `cfg_weight`, the weight of classifier-free guidance, is out of range."""
    if not (_is_number(cfg_weight) and 0 <= cfg_weight <= _LARGEST):
        raise ValueError(f"cfg_weight {one_line(cfg_weight)} is out of range: 0 or above in float32, 1 for no guidance")


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _kept(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    size = logits.shape[-1]
    kth = jnp.take(ordered, jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1, axis=-1)[..., None]
    # The nucleus is measured on what top-k left over. The first token always stays.
    probabilities = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < top_p) & (ordered >= kth)
    return logits >= jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
