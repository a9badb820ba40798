"""Draws tokens from logits: guidance, temperature, top-k, top-p, and random keys.

To add a setting, add a field to `Options`, a check there, and its effect to `Sampler`, and expose it in the pipeline's
methods.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.io.messages import one_line

_LARGEST, _SMALLEST = (float(x) for x in (jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).tiny))


def check_count(name: str, value: Any) -> int:
    """`value` if it is an integer of at least 1; else ValueError."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {one_line(value)}")
    return int(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits: divide by the temperature, keep the top k, keep the top p, draw.

    Attributes:
      temperature: above 0; ignored when greedy.
      top_k: keep this many of the likeliest tokens, with all that tie with the last of them; 0 keeps all.
      top_p: keep the likeliest tokens up to this much probability; 1 keeps all.
      greedy: take the likeliest token.
      truncated: whether top_k or top_p have an effect. Static, like greedy, since it costs a sort per step.
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
        return jax.vmap(jax.random.categorical)(keys, self.scaled(logits)).astype(jnp.int32)

    def scaled(self, logits: jax.Array) -> jax.Array:
        """Logits [..., V] whose softmax is what tokens are drawn by, -inf for those that are cut off."""
        if self.greedy:
            likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
            return jnp.where(likeliest, 0.0, -jnp.inf)
        logits = logits / self.temperature
        if self.truncated:
            kept = _kept(jax.lax.stop_gradient(logits), self.top_k, self.top_p)
            logits = jnp.where(kept, logits, -jnp.inf)
        return logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSamplers:
    """The Samplers of a batch's rows, each row with its own; the fields are Sampler's, all of them arrays [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    greedy: jax.Array
    truncated: jax.Array

    def __call__(self, keys: jax.Array, logits: jax.Array, wanted: jax.Array) -> jax.Array:
        """Tokens [B] int32, each the one that the row's own Sampler draws.

        `wanted` [B] bool are the rows whose tokens are used; others get any. What none of these needs is not computed.
        """

        def truncate(scaled: jax.Array) -> jax.Array:
            kept = jax.vmap(_kept)(scaled, self.top_k, self.top_p) | ~self.truncated[:, None]
            return jnp.where(kept, scaled, -jnp.inf)

        def draw() -> jax.Array:
            scaled = logits / self.temperature[:, None]
            scaled = jax.lax.cond((self.truncated & wanted).any(), truncate, lambda scaled: scaled, scaled)
            return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = jax.lax.cond((~self.greedy & wanted).any(), draw, lambda: likeliest)
        return jnp.where(self.greedy, likeliest, drawn)


def _setting(default: Any, kind: type, about: str) -> Any:
    """A field of Options that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"type": kind, "help": about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The caller's settings for drawing tokens, validated.

    >>> Options(temperature=0.7, top_p=0.95).cfg_weight
    1.0
    >>> Options(top_p=1.5)
    Traceback (most recent call last):
    ValueError: top_p must be above 0 and at most 1 (all tokens), got 1.5

    The pipeline's methods and the command line take these by name, in this order.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy), 1 draws from the model's distribution.
      top_k: draw among this many of the likeliest tokens, with all that tie with the last; None keeps all.
      top_p: draw among the likeliest tokens up to this much probability; 1 keeps all.
      seed: from 0 to 2**32 - 1; for images also one for each, see `image_keys`.
      cfg_weight: weight of classifier-free guidance, for images; 1 is the conditional model alone.
    Raises: ValueError with the setting's name, what it must be and what it is.
    """

    temperature: float = _setting(1.0, float, "0 is greedy (default %(default)g)")
    top_k: int | None = _setting(None, int, "draw among this many of the likeliest tokens (default: all)")
    top_p: float = _setting(1.0, float, "draw among the likeliest tokens of this much probability (default 1: all)")
    seed: int | Sequence[int] = _setting(0, int, "random seed (default 0)")
    cfg_weight: float = 1.0

    def __post_init__(self):
        x = self.temperature
        if not (_is_number(x) and 0 <= x <= _LARGEST):
            raise ValueError(f"temperature must be 0 (greedy) or above, in float32, got {one_line(x)}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {one_line(self.top_p)}")
        k = self.top_k
        if k is not None and (not isinstance(k, numbers.Integral) or k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None (all tokens), got {one_line(k)}")
        for seed in self.seed if isinstance(self.seed, Iterable) else [self.seed]:
            seed_key(seed)
        check_guidance(self.cfg_weight)

    @property
    def sampler(self) -> Sampler:
        """The settings as arrays for a compiled loop."""
        greedy = self.temperature < 1e-6  # below, float32 logits would overflow, and only the largest has a chance
        return Sampler(
            temperature=jnp.float32(1 if greedy else self.temperature),
            top_k=jnp.int32(min(self.top_k or 0, 2**31 - 1)),
            top_p=jnp.float32(max(self.top_p, _SMALLEST)),  # 0 would keep nothing, not even the likeliest token
            greedy=greedy,
            truncated=not greedy and (self.top_k is not None or self.top_p < 1),
        )


def make_sampler(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Sampler:
    """The Sampler for these settings, see `Options`."""
    return Options(temperature=temperature, top_k=top_k, top_p=top_p).sampler


def guide(logits: jax.Array, guidance: jax.Array | float) -> jax.Array:
    """Classifier-free guidance: [B, 2, ...] (conditional, unconditional) to [B, ...]; [B, 1, ...] passes through."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    conditional, unconditional = logits[:, 0], logits[:, 1]
    return unconditional + guidance * (conditional - unconditional)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """`keys` [B] for one step of a loop."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def image_keys(seed: int | Sequence[int], prompts: int, n: int) -> jax.Array:
    """Random keys [prompts * n]: each image's depends on its seed and its index among the n of its prompt."""
    if not isinstance(seed, Iterable):
        keys = jax.vmap(functools.partial(jax.random.fold_in, seed_key(seed)))(jnp.arange(n))
        return jnp.tile(keys, prompts)
    keys = [seed_key(s) for s in seed]
    if len(keys) != prompts * n:
        raise ValueError(f"{len(keys)} seeds for {prompts * n} images; give one seed, or one for each image")
    return jnp.stack([jax.random.fold_in(key, 0) for key in keys])


def seed_key(seed: Any) -> jax.Array:
    """The random key of a seed; ValueError if it is not a valid seed."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to {2**32 - 1}, got {one_line(seed)}")
    return jax.random.key(int(seed))


def check_guidance(cfg_weight: float) -> None:
    """ValueError if `cfg_weight`, the weight of classifier-free guidance, is out of range."""
    if not (_is_number(cfg_weight) and 0 <= cfg_weight <= _LARGEST):
        raise ValueError(f"cfg_weight must be 0 or above, in float32 (1 is no guidance), got {one_line(cfg_weight)}")


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _kept(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens top-k and top-p leave, of pictures and text alike; those that tie with the last one all stay."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    size = logits.shape[-1]
    kth = jnp.take(ordered, jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1, axis=-1)[..., None]
    # top-p applies to the tokens that top-k keeps. The first token always stays.
    probabilities = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # `before` rounds to 1 where less than 6e-8 is left, which top_p=1 keeps too.
    inside = ((before < top_p) | (top_p >= 1)) & (ordered >= kth)
    last = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    next = jnp.max(jnp.where(ordered < last, ordered, -jnp.inf), axis=-1, keepdims=True)
    # A compiler may compute `logits` once for the sort and again, in another rounding, for the comparison; without the
    # second term it would then lose the last token.
    return (logits >= last) | (logits > (last + next) / 2)
