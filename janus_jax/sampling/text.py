"""Answering: prefill of prompts with images, and a compiled loop over text tokens.

Everything here is a pure function of arrays with static shapes. Prompts are left-padded; caches are donated. The loop
runs from a traced `start` to a traced `stop`, so that a caller can stream by running the same compiled program in
several pieces.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model.janus import Janus, place_images, run
from janus_jax.model.kv_cache import KVCache, grow_cache
from janus_jax.sampling.cache import cache_sizes, empty_cache, grown_shapes, pieces
from janus_jax.sampling.finite import note_failure, refuse_failed
from janus_jax.sampling.sampler import Sampler, make_sampler, step_keys

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Conversations as this module takes them: ids, image placeholders, pixels, mask and keys, on the host."""

    arrays: tuple[Any, ...]
    max_new_tokens: int
    sampler: Sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextState:
    """The state of the text loop: the cache, tokens [B, max_new_tokens] so far, and which rows are done [B].

    `failed` [B]: see `finite.note_failure`. A row that fails is done; a row that is done can no longer fail.
    """

    cache: KVCache
    tokens: jax.Array
    done: jax.Array
    failed: jax.Array


@functools.partial(jax.jit, static_argnames=("model",))
def embed_prompt(model: Janus, params: Params, ids: jax.Array, where: jax.Array, pixels: jax.Array | None) -> jax.Array:
    """Embeddings [B, T, D] of prompts with images.

    Args:
      ids: [B, T] int32.
      where: [B, T] bool, the image placeholders.
      pixels: [B, M, h, w, 3] normalized, each row's images in order (extra ones are ignored), or None.
    """
    x = run(model, params, "embed_text", ids)
    if pixels is None:
        return x
    batch, images = pixels.shape[:2]
    features = run(model, params, "embed_images", pixels.reshape(-1, *pixels.shape[2:]))
    return place_images(x, where, features.reshape(batch, images * features.shape[1], -1))


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "slots"))
def start_text(
    model: Janus,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    eos_id: jax.Array,
    sampler: Sampler,
    max_new_tokens: int,
    slots: int | None = None,
) -> TextState:
    """Prefills embedded prompts x [B, T, D] and draws the first token.

    By default the cache has as many `slots` as `max_new_tokens` need.
    """
    batch, length, _ = x.shape
    slots = slots or length + max_new_tokens - 1
    cache = empty_cache(model, batch, slots)
    hidden, cache = run(model, params, "prefill", x, mask, cache)
    logits = run(model, params, "text_logits", hidden[:, -1:])[:, 0]
    token = sampler(step_keys(keys, 0), logits)
    tokens = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(token)
    failed = note_failure(jnp.full((batch,), -1, jnp.int32), logits, 0)
    return TextState(cache, tokens, (token == eos_id) | (failed >= 0), failed)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def continue_text(
    model: Janus,
    params: Params,
    state: TextState,
    keys: jax.Array,
    eos_id: jax.Array,
    sampler: Sampler,
    start: jax.Array,
    stop: jax.Array,
) -> TextState:
    """Draws the tokens `start` to `stop - 1`, or fewer if every row is done before."""

    def more(carry) -> jax.Array:
        i, state = carry
        return (i < stop) & ~jnp.all(state.done)

    def step(carry):
        i, state = carry
        last = jax.lax.dynamic_slice_in_dim(state.tokens, i - 1, 1, axis=1)
        x = run(model, params, "embed_text", last)
        hidden, cache = run(model, params, "decode", x, state.cache)
        logits = run(model, params, "text_logits", hidden)[:, 0]
        token = jnp.where(state.done, eos_id, sampler(step_keys(keys, i), logits))
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, i))
        failed = jnp.where(state.done, state.failed, note_failure(state.failed, logits, i))
        return i + 1, TextState(cache, tokens, state.done | (token == eos_id) | (failed >= 0), failed)

    return jax.lax.while_loop(more, step, (start, state))[1]


def stream_tokens(
    model: Janus,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    eos_id: int,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    piece: int = 8,
    room: int | None = None,
) -> Iterator[jax.Array]:
    """Draws text tokens, `piece` at a time.

    Args:
      x: embedded, left-padded prompts [B, T, D], from `embed_prompt`.
      mask: [B, T] bool, False on padding.
      keys: [B] random keys, one per row.
      eos_id: token that ends a row; -1 for none.
      max_new_tokens: the most tokens to draw.
      sampler: see `make_sampler`; default greedy.
      piece: the most tokens per yield.
      room: space for new tokens in the compiled program, at least max_new_tokens (the default); calls with the same
        room share the program.
    Yields: int32 tokens [B, n]; rows that are done repeat eos_id.
    Raises: `finite.NotFinite`, a ValueError, if logits are not finite, before that piece is yielded.
    """
    sampler = make_sampler(0) if sampler is None else sampler
    eos = jnp.int32(eos_id)
    (batch, length, _), room = x.shape, room or max_new_tokens
    slots = cache_sizes(model, params, batch, length, room)
    state = start_text(model, params, x, mask, keys, eos, sampler, room, slots[0])
    refuse_failed(model, params, state.failed, "conversation", "token")
    yield state.tokens[:, :1]
    for size, start, stop in pieces(slots, length, piece, max_new_tokens):
        if bool(state.done.all()):
            return
        state = dataclasses.replace(state, cache=grow_cache(state.cache, size))
        state = continue_text(model, params, state, keys, eos, sampler, jnp.int32(start), jnp.int32(stop))
        refuse_failed(model, params, state.failed, "conversation", "token")
        yield state.tokens[:, start:stop]


def compile_tokens(
    model: Janus,
    params: Any,
    ids: jax.Array,
    where: jax.Array,
    pixels: jax.Array | None,
    mask: jax.Array,
    keys: jax.Array,
    *,
    sampler: Sampler,
    room: int,
):
    """Compiles `embed_prompt` and the programs of `stream_tokens` for such arguments; `params` may be shapes."""
    one = jnp.int32(1)
    embed_prompt.lower(model, params, ids, where, pixels).compile()
    x = embed_prompt.eval_shape(model, params, ids, where, pixels)
    slots = cache_sizes(model, params, *ids.shape, room)
    start_text.lower(model, params, x, mask, keys, one, sampler, room, slots[0]).compile()
    first = start_text.eval_shape(model, params, x, mask, keys, one, sampler, room, slots[0])
    for state in grown_shapes(model, first, slots):
        continue_text.lower(model, params, state, keys, one, sampler, one, one).compile()


def generate_tokens(*args, max_new_tokens: int, **kwargs) -> jax.Array:
    """All tokens [B, n] of `stream_tokens` in one array; n is at most max_new_tokens."""
    drawn = list(stream_tokens(*args, max_new_tokens=max_new_tokens, piece=max_new_tokens, **kwargs))
    return jnp.concatenate(drawn, axis=1)
