"""The decoder's key/value cache: its arrays, and how they are written and attended to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.config import LlamaConfig
from janus_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, with static length S slots.

    Attributes:
      keys, values: tuples of arrays: one [layers, B, K, S, H] when layers are scanned, else one [B, K, S, H] a layer.
        Heads come before length, so that one query reads each head's keys in one piece. One row may be kept twice, see
        `init_cache`.
      mask: [B, S] bool, the slots that may be attended to.
      length: int32 scalar, the slots filled so far (the same in every row: prompts are padded on the left).
      positions: [B] int32, the position of each row's next token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array
    positions: jax.Array


def init_cache(
    config: LlamaConfig, batch: int, slots: int, dtype: Any, scan_layers: bool = True, pad_row: bool = False
) -> KVCache:
    """An empty cache for `batch` rows of `slots` tokens.

    `pad_row` keeps one row twice where layers are apart: XLA:CPU would copy a single one several times a step.
    """
    shape, rows = (config.kv_heads, slots, config.head_dim), max(batch, 2) if pad_row else batch
    shapes = [(config.layers, batch, *shape)] if scan_layers else [(rows, *shape)] * config.layers

    def empty() -> tuple[jax.Array, ...]:
        return tuple(_constrain_kv(jnp.zeros(shape, dtype)) for shape in shapes)

    return KVCache(
        keys=empty(),
        values=empty(),
        mask=constrain(jnp.zeros((batch, slots), bool), "batch", None),
        length=jnp.zeros((), jnp.int32),
        positions=constrain(jnp.zeros((batch,), jnp.int32), "batch"),
    )


def tile_cache(cache: KVCache, times: int) -> KVCache:
    """`cache` with all its rows `times` times over, one round after the other."""

    rows = len(cache.positions)

    def tile(x: jax.Array) -> jax.Array:
        return _constrain_kv(jnp.tile(x[..., :rows, :, :, :], (times, 1, 1, 1)))

    return dataclasses.replace(
        cache,
        keys=tuple(map(tile, cache.keys)),
        values=tuple(map(tile, cache.values)),
        mask=constrain(jnp.tile(cache.mask, (times, 1)), "batch", None),
        positions=constrain(jnp.tile(cache.positions, times), "batch"),
    )


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """`cache` with `slots` slots. Its arrays are deleted one after the other, so that no two whole caches are held."""
    if cache.mask.shape[1] == slots:
        return cache

    def grow(x: jax.Array, axis: int) -> jax.Array:
        grown = _grow(x, slots, axis)
        x.delete()
        return grown

    return dataclasses.replace(
        cache,
        keys=tuple(grow(x, -2) for x in cache.keys),
        values=tuple(grow(x, -2) for x in cache.values),
        mask=grow(cache.mask, 1),
    )


@functools.partial(jax.jit, static_argnames=("slots", "axis"))
def _grow(x: jax.Array, slots: int, axis: int) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, slots - x.shape[axis])
    grown = jnp.pad(x, padding)
    return constrain(grown, "batch", None) if x.ndim == 2 else _constrain_kv(grown)


def cache_bytes(config: LlamaConfig, rows: int, slots: int, dtype: Any) -> int:
    """Bytes of the keys and values of a cache."""
    per_slot = 2 * config.layers * config.kv_heads * config.head_dim
    return per_slot * rows * slots * jnp.dtype(dtype).itemsize


def _constrain_kv(x: jax.Array) -> jax.Array:
    return constrain(x, *(None,) * (x.ndim - 4), "batch", "kv_heads", None, None)


def _store(cached: jax.Array, new: jax.Array, layer: jax.Array | None, slot: jax.Array | int) -> jax.Array:
    """`cached` with new keys or values [B, K, T, H] from `slot` on, in place of what the layer had there."""
    start, new = (0, 0, slot, 0), _rows(new, cached.shape[-4]).astype(cached.dtype)
    if layer is not None:
        start, new = (layer, *start), new[None]
    return _constrain_kv(jax.lax.dynamic_update_slice(cached, new, start))


def _rows(x: jax.Array, rows: int) -> jax.Array:
    """`x`, or its one row as often as the cache has it."""
    return x if len(x) == rows else jnp.broadcast_to(x, (rows, *x.shape[1:]))
