"""The compiled programs of the engine: a shared step of all rows, a piece of a prompt, and rows copied or emptied.

Each is compiled once for each size of the cache, whatever is asked: what rows do, and how tokens are drawn for them,
are arrays. Axes: B rows, S slots of the cache, T tokens of a prompt's piece.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.model.janus import Janus, run
from janus_jax.model.kv_cache import RowCache, copy_slots
from janus_jax.sampling.cache import empty_cache
from janus_jax.sampling.images import guide
from janus_jax.sampling.sampler import RowSamplers

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What each row is doing, all of them [B]: on the host as numpy arrays that are changed in place.

    Attributes:
      lengths: int32, slots that are filled; the next token goes behind them.
      drawn: int32, tokens that the row's request has drawn, whose number is also the next one's step.
      first: int32, a prompt's last token, to be fed in the next step; -1 for the token that was drawn last.
      image: bool, whether the row draws codes of an image.
      conditional, unconditional: int32, the rows whose logits guide this one; the row itself without guidance. Both
        rows of a pair draw the same code, by the same arithmetic.
      guidance: float32, the weight of classifier-free guidance.
      seed: uint32; index: int32, the image among those of its seed, -1 for an answer.
      sampler: how its tokens are drawn.
    """

    lengths: Any
    drawn: Any
    first: Any
    image: Any
    conditional: Any
    unconditional: Any
    guidance: Any
    seed: Any
    index: Any
    sampler: RowSamplers

    @classmethod
    def idle(cls, count: int) -> Rows:
        """`count` rows on the host that do nothing."""

        def full(value: Any, dtype: Any) -> np.ndarray:
            return np.full(count, value, dtype)

        own, nobody = np.arange(count, dtype=np.int32), full(False, bool)
        sampler = RowSamplers(full(1, np.float32), full(0, np.int32), full(1, np.float32), full(True, bool), nobody)
        return cls(
            lengths=full(0, np.int32),
            drawn=full(0, np.int32),
            first=full(-1, np.int32),
            image=nobody.copy(),
            conditional=own,
            unconditional=own.copy(),
            guidance=full(1, np.float32),
            seed=full(0, np.uint32),
            index=full(-1, np.int32),
            sampler=sampler,
        )

    def advanced(self, active: Any) -> Rows:
        """The rows after a step of those that are `active`, on the host or on the device."""
        more = active.astype(np.int32)
        first = jnp.where(active, -1, self.first) if isinstance(active, jax.Array) else np.where(active, -1, self.first)
        lengths, drawn = self.lengths + more, self.drawn + more
        return dataclasses.replace(self, lengths=lengths, drawn=drawn, first=first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step drew, [B]: tokens (text tokens or codes), their log probabilities, and whether logits were finite."""

    tokens: jax.Array
    logprobs: jax.Array
    finite: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def new_cache(model: Janus, rows: int, slots: int) -> RowCache:
    """An empty cache."""
    cache = empty_cache(model, rows, slots)
    return RowCache(cache.keys, cache.values)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def step(
    model: Janus, params: Params, cache: RowCache, tokens: jax.Array, rows: Rows, active: jax.Array
) -> tuple[RowCache, jax.Array, Rows, Drawn]:
    """Feeds every row its last token and draws the next one.

    Rows that are not `active` [B] are computed too, and change nothing but the slot behind their length.

    Args:
      tokens: [B] int32, what each row drew last.
    Returns: the cache, the tokens that were drawn last, the rows, and what was drawn.
    """
    from_prompt = rows.first >= 0
    codes = rows.image & ~from_prompt
    x = run(model, params, "embed_text", jnp.where(from_prompt, rows.first, jnp.where(codes, 0, tokens))[:, None])

    def with_codes(x: jax.Array) -> jax.Array:
        of_codes = run(model, params, "embed_codes", jnp.where(codes, tokens, 0)[:, None])
        return jnp.where(codes[:, None, None], of_codes.astype(x.dtype), x)

    x = jax.lax.cond((codes & active).any(), with_codes, lambda x: x, x)
    hidden, cache = run(model, params, "decode_rows", x, cache, rows.lengths, None, active)
    keys = _keys(rows)

    def text(hidden: jax.Array) -> Drawn:
        return _draw(rows, keys, run(model, params, "text_logits", hidden)[:, 0], active & ~rows.image)

    def image(hidden: jax.Array) -> Drawn:
        logits = run(model, params, "image_logits", hidden)[:, 0]
        # Without guidance both are the row's own, and guiding changes nothing.
        both = jnp.stack([logits[rows.conditional], logits[rows.unconditional]], axis=1)
        return _draw(rows, keys, guide(both, rows.guidance[:, None]), active & rows.image)

    def none(hidden: jax.Array) -> Drawn:
        return Drawn(jnp.zeros_like(tokens), jnp.zeros(len(tokens)), jnp.ones(len(tokens), bool))

    of_text = jax.lax.cond((active & ~rows.image).any(), text, none, hidden)
    of_image = jax.lax.cond((active & rows.image).any(), image, none, hidden)
    drawn = jax.tree.map(functools.partial(jnp.where, rows.image), of_image, of_text)
    return cache, jnp.where(active, drawn.tokens, tokens), rows.advanced(active), drawn


def _keys(rows: Rows) -> jax.Array:
    """The random keys [B] of the rows' next tokens: those of `sampler.seed_key`, `image_keys` and `step_keys`."""

    def key(seed: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
        own = jax.random.key(seed)
        of_image = jax.random.fold_in(own, jnp.maximum(index, 0))
        data = jnp.where(index < 0, jax.random.key_data(own), jax.random.key_data(of_image))
        return jax.random.fold_in(jax.random.wrap_key_data(data), step)

    return jax.vmap(key)(rows.seed, rows.index, rows.drawn)


def _draw(rows: Rows, keys: jax.Array, logits: jax.Array, wanted: jax.Array) -> Drawn:
    tokens = rows.sampler(keys, logits, wanted)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return Drawn(tokens, chosen - jax.nn.logsumexp(logits, axis=1), jnp.isfinite(logits).all(axis=1))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def prefill(
    model: Janus, params: Params, cache: RowCache, given: jax.Array, rows: jax.Array, starts: jax.Array
) -> RowCache:
    """Fills slots of `rows` [R] from `starts` [R] on with a piece of each one's prompt; what comes before is there.

    Args:
      given: ids [R, T] int32, or embeddings [R, T, D] of pictures. Tokens behind a piece's own may be anything: their
        slots are behind the row's length.
    """
    x = run(model, params, "embed_text", given) if given.ndim == 2 else given
    return run(model, params, "decode_rows", x, cache, starts, rows)[1]


@functools.partial(jax.jit, donate_argnames=("cache",))
def copy_row(cache: RowCache, source: jax.Array, target: jax.Array, count: jax.Array) -> RowCache:
    """`cache` with the first `count` slots of row `source` in row `target` too, and zeros behind them.

    Zeros, and not what was there: whatever is not finite would spoil the row even where it is not attended to. With a
    count of 0 the row is emptied.
    """
    return copy_slots(cache, source, target, count)
