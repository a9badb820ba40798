"""Answering many questions about few pictures: what prompts have in common is prefilled once, and repeated to the rows.

A group of rows begins with the same tokens, its prefix: everything up to the end of the last picture. Rows of a shard
of the mesh belong to groups of the same shard, so that no keys or values move between devices. Answers are greedy, and
those of `text.stream_tokens` to the same prompts, up to the rounding of another order of sums.

Axes: G groups and P tokens of their prefixes; B rows and T tokens of what follows in each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax.model.janus import Janus, place_images, run
from janus_jax.model.kv_cache import KVCache, grow_cache, pick, pick_rows
from janus_jax.sampling import batches
from janus_jax.sampling.cache import empty_cache
from janus_jax.sampling.finite import note_failure, on_host, refuse_failed
from janus_jax.sampling.sampler import Sampler, make_sampler
from janus_jax.sampling.text import Params, TextState, continue_text
from janus_jax.sharding import constrain

FIRST_ROOM, _GROWTH = 32, 4  # tokens that the cache has room for at first, and how it grows: most answers are short


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Questions in groups, on the host, for `answer`.

    Attributes:
      prefix_ids, prefix_mask: [G, P] int32 and bool, padded on the left.
      where: [G, P] bool, the image placeholders.
      features: [G, Q, D], each group's embedded pictures in sequence (see `embed_pictures`); None if there are none.
      ids, mask: [B, T] int32 and bool, what follows the prefix, padded on the left; at least one token.
      picks: [shards, B / shards] int32: for each row the index of its group among the G / shards of its shard.
      real: [B] bool, False for rows that only fill the shape and are not answered.
    """

    prefix_ids: np.ndarray
    prefix_mask: np.ndarray
    where: np.ndarray
    features: np.ndarray | None
    ids: np.ndarray
    mask: np.ndarray
    picks: np.ndarray
    real: np.ndarray


@functools.partial(jax.jit, static_argnames=("model",))
def embed_pictures(model: Janus, params: Params, pixels: jax.Array) -> jax.Array:
    """Embeddings [N, patches, D] of normalized pictures [N, h, w, 3]."""
    return run(model, params, "embed_images", pixels)


@functools.partial(jax.jit, static_argnames=("model",))
def prefill_prefixes(
    model: Janus, params: Params, ids: jax.Array, mask: jax.Array, where: jax.Array, features: jax.Array | None
) -> KVCache:
    """The cache [G rows, P slots] of prefixes; arguments as in `Grouped`."""
    x = run(model, params, "embed_text", ids)
    x = x if features is None else place_images(x, where, features)
    return run(model, params, "prefill", x, mask, empty_cache(model, *ids.shape))[1]


@functools.partial(jax.jit, static_argnames=("model", "room", "slots"))
def start_rows(
    model: Janus,
    params: Params,
    prefixes: KVCache,
    picks: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    real: jax.Array,
    eos_id: jax.Array,
    sampler: Sampler,
    room: int,
    slots: int,
) -> TextState:
    """Prefills what follows the prefixes and takes the first token; `room` is the most tokens of an answer."""
    batch = len(ids)
    cache = pick_rows(prefixes, empty_cache(model, batch, slots), picks)
    hidden, cache = run(model, params, "decode", run(model, params, "embed_text", ids), cache, mask)
    logits = run(model, params, "text_logits", hidden[:, -1:])[:, 0]
    token = sampler(_keys(batch), logits)
    tokens = jnp.full((batch, room), eos_id, jnp.int32).at[:, 0].set(token)
    failed = jnp.where(real, note_failure(jnp.full((batch,), -1, jnp.int32), logits, 0), -1)
    return TextState(cache, tokens, (token == eos_id) | (failed >= 0) | ~real, failed)


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def keep_rows(model: Janus, state: TextState, picks: jax.Array, slots: int) -> TextState:
    """`state` of the rows `picks` only (see `kv_cache.pick_rows`), with a cache of so many slots."""
    cache = pick_rows(state.cache, empty_cache(model, picks.size, slots), picks)
    tokens, done, failed = (constrain(pick(x, picks), "batch", *(None,) * (x.ndim - 1)) for x in _of_rows(state))
    return TextState(cache, tokens, done, failed)


def answer(
    model: Janus, params: Params, asked: Grouped, *, eos_id: int, max_new_tokens: int, mesh: Mesh | None = None
) -> np.ndarray:
    """Greedy answers [B, n] int32 on the host, n at most `max_new_tokens`; rows that are done repeat `eos_id`.

    Rows that are done are dropped when the cache has to grow, so that a single long answer does not hold up the memory
    of all.

    Raises: `finite.NotFinite`, a ValueError, if logits are not finite.
    """
    put = functools.partial(batches.put, mesh=mesh)
    length = asked.prefix_ids.shape[1] + asked.ids.shape[1]
    sampler, eos, room = make_sampler(0), jnp.int32(eos_id), max_new_tokens
    slots = cache_slots(length, room)
    with batches.using(mesh):
        features = None if asked.features is None else put(asked.features)
        given = (asked.prefix_ids, asked.prefix_mask, asked.where)
        prefixes = prefill_prefixes(model, params, *map(put, given), features)
        given = (asked.picks, asked.ids, asked.mask, asked.real)
        state = start_rows(model, params, prefixes, *map(put, given), eos, sampler, room, slots[0])
        del prefixes, features
    rows = np.arange(len(asked.ids)).reshape(asked.picks.shape)  # which row each one of `state` is, by shard
    tokens = np.full((rows.size, room), eos_id, np.int32)
    drawn = 1
    while True:
        refuse_failed(model, params, state.failed, "conversation", "token")
        done = on_host(state.done)
        if drawn >= room or done.all():
            tokens[rows.ravel()] = on_host(state.tokens)
            return tokens[:, :drawn]
        with batches.using(mesh):
            # The last token drawn is not stored.
            if drawn >= state.cache.mask.shape[1] - length + 1:
                size = next(size for size in slots if size > state.cache.mask.shape[1])
                picks = _going_on(done.reshape(rows.shape))
                if picks is None:
                    state = dataclasses.replace(state, cache=grow_cache(state.cache, size))
                else:
                    tokens[rows.ravel()] = on_host(state.tokens)
                    rows = np.take_along_axis(rows, picks, axis=1)
                    state = keep_rows(model, state, put(picks), size)
            stop = min(room, state.cache.mask.shape[1] - length + 1)
            where = jnp.int32(drawn), jnp.int32(stop)
            state = continue_text(model, params, state, put(_keys(rows.size)), eos, sampler, *where)
        drawn = stop


def cache_slots(length: int, room: int) -> list[int]:
    """Sizes of the cache for prompts of `length` tokens and answers of at most `room`, smallest first."""
    rooms = [min(FIRST_ROOM, room)]
    while rooms[-1] < room:
        rooms.append(min(rooms[-1] * _GROWTH, room))
    return [length + room - 1 for room in rooms]


def _going_on(done: np.ndarray) -> np.ndarray | None:
    """For `done` [shards, n], picks of at most half the rows with all that go on; None if more than half do."""
    most = max(1, int((~done).sum(axis=1).max()))
    count = 1 << (most - 1).bit_length()
    if 2 * count > done.shape[1]:
        return None
    return np.argsort(done, axis=1, kind="stable")[:, :count].astype(np.int32)


def _of_rows(state: TextState) -> tuple[jax.Array, ...]:
    return state.tokens, state.done, state.failed


def _keys(rows: int) -> Any:
    """Keys that nothing is drawn with."""
    return jnp.broadcast_to(jax.random.key(0), (rows,))
