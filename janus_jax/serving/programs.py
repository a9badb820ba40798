"""The compiled programs of the engine: a shared step of all rows, a piece of a prompt, and rows copied or emptied.

Each is compiled once for each size of the cache, whatever is asked: what rows do, and how tokens are drawn for them,
are arrays. Axes: B rows, S slots of the cache, T tokens of a prompt's piece, L positions of a window.
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
from janus_jax.sampling.acceptance import moved, settle
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

    def advanced(self, counts: Any) -> Rows:
        """The rows after a step that drew so many tokens [B] int32 for each, on the host or on the device."""
        numpy = jnp if isinstance(counts, jax.Array) else np
        first = numpy.where(counts > 0, -1, self.first)
        return dataclasses.replace(self, lengths=self.lengths + counts, drawn=self.drawn + counts, first=first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step drew for each row.

    Attributes:
      tokens: [B, L] int32, text tokens or codes.
      logprobs: [B, L], their log probabilities; finite: [B, L], whether the logits were finite.
      counts: [B] int32, how many of them the row goes on by: one, but 1 to L for images, whose others are guesses.
    """

    tokens: jax.Array
    logprobs: jax.Array
    finite: jax.Array
    counts: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def new_cache(model: Janus, rows: int, slots: int) -> RowCache:
    """An empty cache."""
    cache = empty_cache(model, rows, slots)
    return RowCache(cache.keys, cache.values)


@functools.partial(jax.jit, static_argnames=("model", "window"), donate_argnames=("cache",))
def step(
    model: Janus, params: Params, cache: RowCache, tokens: jax.Array, rows: Rows, active: jax.Array, window: int = 1
) -> tuple[RowCache, jax.Array, Rows, Drawn]:
    """Feeds every row its last token and draws the next one.

    With a `window` L above 1, images are also fed guesses for the L - 1 codes behind their last one, and go on by as
    many codes as turn out right: the codes of the plain step, in fewer steps (see `sampling.acceptance`, rule 'same').
    Rows that are not `active` [B] are computed too, and change nothing but the L slots behind their length.

    Args:
      tokens: [B, L or more] int32, what each row drew last, and an image's guesses for what comes next.
    Returns: the cache, the tokens to be given next, the rows, and what was drawn.
    """
    from_prompt = rows.first >= 0
    given = jnp.where(from_prompt[:, None], 0, tokens[:, :window])  # and not what another image has left there
    codes = rows.image[:, None] & ~(from_prompt[:, None] & (jnp.arange(window) == 0))
    text_ids = jnp.where(from_prompt, rows.first, jnp.where(rows.image, 0, given[:, 0]))
    x = run(model, params, "embed_text", text_ids[:, None])
    x = jnp.broadcast_to(x, (len(x), window, x.shape[-1]))  # answers use the first position alone

    def with_codes(x: jax.Array) -> jax.Array:
        of_codes = run(model, params, "embed_codes", jnp.where(codes, given, 0))
        return jnp.where(codes[..., None], of_codes.astype(x.dtype), x)

    x = jax.lax.cond((codes & active[:, None]).any(), with_codes, lambda x: x, x)
    hidden, cache = run(model, params, "decode_rows", x, cache, rows.lengths, None, active)

    def text(hidden: jax.Array) -> tuple[jax.Array, ...]:
        logits = run(model, params, "text_logits", hidden[:, :1])
        one = _draw(rows, logits, active & ~rows.image)
        return tuple(jnp.broadcast_to(x, given.shape) for x in one)

    def image(hidden: jax.Array) -> tuple[jax.Array, ...]:
        logits = run(model, params, "image_logits", hidden)
        # Without guidance both are the row's own, and guiding changes nothing.
        both = jnp.stack([logits[rows.conditional], logits[rows.unconditional]], axis=1)
        return _draw(rows, guide(both, rows.guidance[:, None, None]), active & rows.image)

    def none(hidden: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.zeros_like(given), jnp.zeros(given.shape), jnp.ones(given.shape, bool)

    of_text = jax.lax.cond((active & ~rows.image).any(), text, none, hidden)
    of_image = jax.lax.cond((active & rows.image).any(), image, none, hidden)
    drawn, logprobs, finite = jax.tree.map(functools.partial(jnp.where, rows.image[:, None]), of_image, of_text)

    settled = jax.vmap(functools.partial(settle, "same"))(drawn, given[:, 1:])
    left = model.config.gen_vision.num_tokens - rows.drawn
    counts = jnp.where(active, jnp.where(rows.image, jnp.minimum(settled.count, left), 1), 0)
    guesses, _ = jax.vmap(moved)(settled, jnp.broadcast_to(drawn[:, -1:], given[:, 1:].shape))
    last = jnp.take_along_axis(drawn, jnp.maximum(counts - 1, 0)[:, None], axis=1)
    new = jnp.concatenate([last, guesses, tokens[:, window:]], axis=1)
    tokens = jnp.where(active[:, None], new, tokens)
    return cache, tokens, rows.advanced(counts), Drawn(drawn, logprobs, finite, counts)


def _keys(rows: Rows, count: int) -> jax.Array:
    """The random keys [B, count] of the rows' next tokens: of `sampler.seed_key`, `image_keys` and `step_keys`."""

    def keys(seed: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
        own = jax.random.key(seed)
        of_image = jax.random.fold_in(own, jnp.maximum(index, 0))
        data = jnp.where(index < 0, jax.random.key_data(own), jax.random.key_data(of_image))
        steps = step + jnp.arange(count)
        return jax.vmap(functools.partial(jax.random.fold_in, jax.random.wrap_key_data(data)))(steps)

    return jax.vmap(keys)(rows.seed, rows.index, rows.drawn)


def _draw(rows: Rows, logits: jax.Array, wanted: jax.Array) -> tuple[jax.Array, ...]:
    """Tokens, log probabilities and whether all was finite, each [B, L], from logits [B, L, V]."""
    batch, length, size = logits.shape
    flat = logits.reshape(-1, size)
    sampler, wanted = jax.tree.map(lambda x: jnp.repeat(x, length), (rows.sampler, wanted))
    tokens = sampler(_keys(rows, length).reshape(-1), flat, wanted)
    chosen = jnp.take_along_axis(flat, tokens[:, None], axis=1)[:, 0]
    made = tokens, chosen - jax.nn.logsumexp(flat, axis=1), jnp.isfinite(flat).all(axis=1)
    return tuple(x.reshape(batch, length) for x in made)


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
