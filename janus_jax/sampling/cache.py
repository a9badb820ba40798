"""The cache of the sampling loops: its number of slots, when it grows, and the pieces in which a loop then runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from janus_jax.model.janus import Janus
from janus_jax.model.kv_cache import KVCache, cache_bytes, init_cache
from janus_jax.weights.quantize import array_bytes

# A step reads the whole cache, filled or not, so a large cache starts small and grows through this many sizes. Each is
# one more program to compile, which is not worth it if a step mostly reads weights, or reads little.
_CACHE_SIZES = 4


def empty_cache(model: Janus, rows: int, slots: int) -> KVCache:
    """The cache that the sampling loops use for `model`, empty."""
    return init_cache(model.config.language, rows, slots, model.cache_dtype, model.scan_layers, model.cpu)


def _is_large(cache: int, weights: int) -> bool:
    return cache > max(weights // 4, 256 << 20)


def cache_sizes(model: Janus, params: Any, rows: int, length: int, new_tokens: int) -> list[int]:
    """Sizes of the cache in slots, smallest first, for `rows` prompts of `length` tokens and the tokens drawn."""
    most = length + new_tokens - 1
    weights = sum(array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(params["language_model"]))
    sizes = _CACHE_SIZES if _is_large(cache_bytes(model.config.language, rows, most, model.cache_dtype), weights) else 1
    return [most - new_tokens * smaller // sizes for smaller in reversed(range(sizes))]


def pieces(slots: list[int], length: int, piece: int, new_tokens: int) -> Iterator[tuple[int, int, int]]:
    """(slots of the cache, start, stop) of tokens to draw in one call, from the second of `new_tokens` on."""
    done = 1
    for size in slots:
        # The last token drawn is not stored.
        while done < (room := min(size - length + 1, new_tokens)):
            stop = min(done + piece, room)
            yield size, done, stop
            done = stop


def grown_shapes(model: Janus, state: Any, slots: list[int]) -> Iterator[Any]:
    """The shapes of `state`, with its cache in each of its sizes."""
    rows = len(state.cache.positions)
    for size in slots:
        cache = jax.eval_shape(functools.partial(empty_cache, model, rows, size))
        yield dataclasses.replace(state, cache=cache)
