"""The decoder's key/value cache: its arrays, how they are written, and attention to them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.config import LlamaConfig
from janus_jax.model import cpu
from janus_jax.model.attention import attend
from janus_jax.model.precision import einsum
from janus_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, with a static number of slots S.

    Attributes:
      keys, values: tuples of arrays: one [layers, B, K, S, H] if layers are scanned, else one [B, K, S, H] per layer.
        Heads come before length, so that a query reads each head's keys from contiguous memory.
      mask: [B, S] bool, the slots that may be attended to.
      length: int32 scalar, the number of slots filled so far (the same in every row: prompts are padded on the left).
      positions: [B] int32, the position of each row's next token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array
    positions: jax.Array


def init_cache(
    config: LlamaConfig, batch: int, slots: int, dtype: Any, scan_layers: bool = True, on_cpu: bool = False
) -> KVCache:
    """An empty cache for `batch` rows of `slots` tokens; `on_cpu`: see `cpu.cache_rows`."""
    shape = (config.kv_heads, slots, config.head_dim)
    if scan_layers:
        shapes = [(config.layers, batch, *shape)]
    else:
        shapes = [(cpu.cache_rows(batch) if on_cpu else batch, *shape)] * config.layers

    def empty() -> tuple[jax.Array, ...]:
        return tuple(_constrain_kv(jnp.zeros(shape, dtype)) for shape in shapes)

    return KVCache(
        keys=empty(),
        values=empty(),
        mask=constrain(jnp.zeros((batch, slots), bool), "batch", "length"),
        length=jnp.zeros((), jnp.int32),
        positions=constrain(jnp.zeros((batch,), jnp.int32), "batch"),
    )


def tile_cache(cache: KVCache, times: int) -> KVCache:
    """`cache` with its rows repeated `times` times, as in `jnp.tile`."""
    rows = len(cache.positions)

    def tile(x: jax.Array) -> jax.Array:
        return _constrain_kv(jnp.tile(x[..., :rows, :, :, :], (times, 1, 1, 1)))

    return dataclasses.replace(
        cache,
        keys=tuple(map(tile, cache.keys)),
        values=tuple(map(tile, cache.values)),
        mask=constrain(jnp.tile(cache.mask, (times, 1)), "batch", "length"),
        positions=constrain(jnp.tile(cache.positions, times), "batch"),
    )


def pick_rows(cache: KVCache, empty: KVCache, picks: jax.Array) -> KVCache:
    """The rows `picks` of `cache`, in the slots at the beginning of `empty`, a cache of as many rows and more slots.

    Args:
      picks: int32 [shards, n]: for each shard of the mesh's batch axes, which of its own rows of `cache` each of its n
        rows in the result is. No keys or values move between shards.
    """
    rows = len(cache.positions)

    def kv(x: jax.Array, into: jax.Array) -> jax.Array:
        picked = pick(x[..., :rows, :, :, :], picks, x.ndim - 4)
        picked = cpu.as_cached(picked, into.shape[-4]) if x.ndim == 4 else picked
        return _constrain_kv(jax.lax.dynamic_update_slice(into, picked, (0,) * x.ndim))

    return KVCache(
        keys=tuple(map(kv, cache.keys, empty.keys)),
        values=tuple(map(kv, cache.values, empty.values)),
        mask=constrain(jax.lax.dynamic_update_slice(empty.mask, pick(cache.mask, picks), (0, 0)), "batch", "length"),
        length=cache.length,
        positions=constrain(pick(cache.positions, picks), "batch"),
    )


def pick(x: jax.Array, picks: jax.Array, axis: int = 0) -> jax.Array:
    """Rows of `x` along `axis`; `picks` as for `pick_rows`."""
    shards, count = picks.shape
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = x.reshape(*before, shards, -1, *after)
    picked = jax.vmap(lambda x, rows: jnp.take(x, rows, axis=axis), (axis, 0), axis)(split, picks)
    return picked.reshape(*before, shards * count, *after)


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """`cache` grown to `slots` slots; old arrays are deleted one by one, so that no two whole caches are held."""
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
    return constrain(grown, "batch", "length") if x.ndim == 2 else _constrain_kv(grown)


# ---------------------------------------------------------------- rows that begin and end on their own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCache:
    """Keys and values of rows of different lengths, as in `KVCache`: each row fills its slots from 0.

    The lengths [B] are kept by whoever knows which rows are in use. A slot behind a row's length may hold anything
    finite: it is not attended to, and the next token overwrites it.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        return self.keys[0].shape[-2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSlots:
    """Where new tokens [R, T] of rows belong in a RowCache, and what they attend to.

    Attributes:
      rows: [R] int32, the rows of the cache; None for all of them, in order.
      starts: [R] int32, the slot of each row's first new token.
      seen: [R] int32, the filled slots that the row's new tokens attend to, beside those among themselves that are not
        later: as `starts`, but for rows of which nothing is wanted.
      begins: [R] int32, each row's first slot that is not padding; None without padding.
    """

    rows: jax.Array | None
    starts: jax.Array
    seen: jax.Array
    begins: jax.Array | None = None

    def of_one_token(self, tokens: int) -> bool:
        """Whether this is the next token of every row, with nothing but filled slots before it; see `attend_rows`."""
        return self.rows is None and self.begins is None and tokens == 1

    def mask(self, tokens: int, slots: int) -> jax.Array:
        """[R, T, S] bool, what each new token attends to."""
        last = self.seen[:, None] + jnp.arange(tokens)
        return jnp.arange(slots) <= last[:, :, None]


def copy_slots(cache: RowCache, source: jax.Array, target: jax.Array, count: jax.Array) -> RowCache:
    """`cache` with the first `count` slots of the row `source` in the row `target` too, and zeros behind them."""
    kept = (jnp.arange(cache.slots) < count)[:, None]

    def copy(x: jax.Array) -> jax.Array:
        axis = x.ndim - 4
        one = jnp.where(kept, jax.lax.dynamic_slice_in_dim(x, source, 1, axis=axis), 0)
        return _constrain_kv(jax.lax.dynamic_update_slice_in_dim(x, _constrain_kv(one), target, axis=axis))

    return RowCache(tuple(map(copy, cache.keys)), tuple(map(copy, cache.values)))


def grow_rows(cache: RowCache, slots: int) -> RowCache:
    """`cache` grown to `slots` slots, as `grow_cache` does."""

    def grow(x: jax.Array) -> jax.Array:
        grown = _grow(x, slots, -2)
        x.delete()
        return grown

    return RowCache(tuple(map(grow, cache.keys)), tuple(map(grow, cache.values)))


def cache_bytes(config: LlamaConfig, rows: int, slots: int, dtype: Any) -> int:
    """Bytes of the keys and values of a cache."""
    per_slot = 2 * config.layers * config.kv_heads * config.head_dim
    return per_slot * rows * slots * jnp.dtype(dtype).itemsize


def _constrain_kv(x: jax.Array) -> jax.Array:
    return constrain(x, *(None,) * (x.ndim - 4), "batch", "kv_heads", "length", None)


def store(
    kv: tuple[jax.Array, jax.Array],
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | None,
    slot: RowSlots | jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """`kv` with the new keys and values [B, K, T, H] of one layer written from `slot` on.

    Args:
      kv: cached keys and values, of all layers [layers, B, K, S, H] or of this one [B, K, S, H].
      layer: index of the layer in them; None if they are of this one layer.
    """
    return _store(kv[0], k, layer, slot), _store(kv[1], v, layer, slot)


def _store(cached: jax.Array, new: jax.Array, layer: jax.Array | None, slot: RowSlots | jax.Array | int) -> jax.Array:
    if isinstance(slot, RowSlots):
        return _constrain_kv(_store_rows(cached, new.astype(cached.dtype), layer, slot))
    start, new = (0, 0, slot, 0), cpu.as_cached(new, cached.shape[-4]).astype(cached.dtype)
    if layer is not None:
        start, new = (layer, *start), new[None]
    return _constrain_kv(jax.lax.dynamic_update_slice(cached, new, start))


def _store_rows(cached: jax.Array, new: jax.Array, layer: jax.Array | None, slots: RowSlots) -> jax.Array:
    """`cached` with the new keys or values [R, K, T, H] of rows at their own slots.

    A loop over rows: a scatter makes TPUs read and write the whole cache. On GPUs a scatter writes in place, while
    each turn of a loop would be a kernel.
    """
    own = () if layer is None else (layer,)

    def in_turn(cached: jax.Array, new: jax.Array, slots: RowSlots) -> jax.Array:
        def body(i: jax.Array, cached: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_slice_in_dim(new, i, 1)
            row = i if slots.rows is None else slots.rows[i]
            return jax.lax.dynamic_update_slice(cached, one[None] if own else one, (*own, row, 0, slots.starts[i], 0))

        return jax.lax.fori_loop(0, len(new), body, cached)

    def at_once(cached: jax.Array, new: jax.Array, slots: RowSlots) -> jax.Array:
        def one(cached: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(cached, new[None] if own else new, (*own, 0, start, 0))

        return jax.vmap(one, (len(own), 0, 0), len(own))(cached, new, slots.starts)

    if slots.rows is not None or len(new) != cached.shape[len(own)]:  # a prompt's piece, or see `cpu.cache_rows`
        return in_turn(cached, new, slots)
    return jax.lax.platform_dependent(cached, new, slots, cuda=at_once, rocm=at_once, default=in_turn)


def attend_cached(
    q: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    layer: jax.Array | None,
    mask: jax.Array,
    slot: RowSlots | jax.Array | int,
    on_cpu: bool,
) -> jax.Array:
    """Attention [B, T, N, H] of queries q [B, T, N, H] to one layer's cached keys and values; see `store`.

    `mask` [B or 1, T or 1, S]: see `attention.attend`. `on_cpu`: see `cpu.attend_rows`. It is computed in the cache's
    dtype and returned in q's.
    """
    k, v = kv if layer is None else (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv)
    dtype, q = q.dtype, q.astype(k.dtype)  # which differ on CPUs alone
    if not isinstance(slot, RowSlots):
        y = attend(cpu.as_cached(q, len(k)), k, v, mask)[: len(q)]
    elif on_cpu:
        y = cpu.attend_rows(q, k, v, slot.rows, slot.seen, slot.begins)
    else:
        if slot.rows is not None:
            k, v = (_constrain_kv(jnp.take(x, slot.rows, axis=0)) for x in (k, v))
        y = attend(q, k, v, mask)
    return y.astype(dtype)


def attend_rows(
    q: jax.Array, kv: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array, layer: jax.Array | None, slots: RowSlots
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`attend_cached` for one new token of every row, and `kv` with its keys and values k, v [B, K, 1, H] stored.

    They are stored after what is cached was read: TPU's compiler would otherwise carry caches that fit there through
    the chip's fast memory, and write all of them back.
    """
    batch, head_dim = len(q), q.shape[-1]
    old_k, old_v = kv if layer is None else (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv)
    k, v = k.astype(old_k.dtype), v.astype(old_v.dtype)
    grouped = q.reshape(batch, 1, k.shape[1], -1, head_dim)
    old = einsum("BTKGH,BKSH->BKGTS", grouped, old_k, jnp.float32) * head_dim**-0.5
    own = einsum("BTKGH,BKSH->BKGTS", grouped, k, jnp.float32) * head_dim**-0.5
    filled = jnp.arange(old_k.shape[2]) < slots.seen[:, None]
    old = jnp.where(filled[:, None, None, None], old, jnp.finfo(jnp.float32).min)
    most = jnp.maximum(old.max(axis=-1, keepdims=True), own)
    old, own = jnp.exp(old - most), jnp.exp(own - most)
    total = old.sum(axis=-1, keepdims=True) + own
    y = einsum("BKGTS,BKSH->BTKGH", (old / total).astype(v.dtype), old_v, jnp.float32)
    y = y + einsum("BKGTS,BKSH->BTKGH", (own / total).astype(v.dtype), v, jnp.float32)
    y, k, v = jax.lax.optimization_barrier((y.astype(v.dtype).reshape(q.shape), k, v))
    return y, store(kv, k, v, layer, slots)
