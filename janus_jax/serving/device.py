"""What the engine has on the device: the cache and its sizes, the parameters of each adapter, and calls of programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.model.kv_cache import RowCache, cache_bytes, grow_rows
from janus_jax.pipeline import JanusPipeline
from janus_jax.sampling import batches
from janus_jax.sampling.images import decode_images
from janus_jax.sampling.memory import least_available_bytes
from janus_jax.serving import programs
from janus_jax.serving.features import Features
from janus_jax.serving.jobs import PIECES, Picture
from janus_jax.serving.slots import Slots

CONTEXT = 4096  # tokens of a row by default, if the model has as many positions
_SMALLEST_CACHE = 1024


class Device:
    """The cache of `rows` rows for `context` tokens, and everything that is done to it.

    Attributes:
      window: codes of an image that a step of images is given, see `programs.step`.
      params: the model's parameters with each adapter, and under None those without any.
      sizes: the cache's numbers of slots, smallest first: a step reads all of it, so it starts small.
      features: of the pictures in prompts.
    Raises: ValueError if the largest cache does not fit in memory.
    """

    def __init__(self, janus: JanusPipeline, rows: int, context: int, window: int = 1):
        self.janus, self.model, self.window = janus, janus.model, window
        self.sizes = cache_slots(context, window)
        taken = cache_bytes(janus.config.language, rows, self.sizes[-1], janus.model.cache_dtype)
        free = least_available_bytes(janus.mesh)
        if free is not None and taken > free * (1 if janus.mesh is None else janus.mesh.size):
            raise ValueError(
                f"{rows} slots of {context} tokens take {taken / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
                "use fewer slots or a smaller context"
            )
        self.params = _with_adapters(janus)
        self.features = Features(self.model)
        self._count = rows
        self._cache: RowCache | None = None
        self.renew()

    @property
    def slots(self) -> int:
        """How many the cache has now."""
        return 0 if self._cache is None else self._cache.slots

    @property
    def is_lost(self) -> bool:
        """Whether a program that failed has taken the cache with it."""
        return self._cache is None or any(x.is_deleted() for x in jax.tree.leaves(self._cache))

    def renew(self, size: int | None = None):
        """An empty cache of `size` slots, by default of the smallest size."""
        self._cache = None  # before the new one is made, for which its memory may be needed
        with batches.using(self.janus.mesh):
            self._cache = programs.new_cache(self.model, self._count, size or self.sizes[0])
            self._tokens = batches.put(np.zeros((self._count, self.window), np.int32), None)

    def make_room(self, slots: int):
        """Grows the cache to the next of its sizes if it has fewer than `slots`."""
        if slots > self.slots:
            self._cache = grow_rows(self._cache, next(size for size in self.sizes if size >= slots))

    def prefill(self, adapter: str | None, piece: np.ndarray | Picture, row: int, slot: int):
        """Fills slots of `row` from `slot` on with a piece of a prompt: ids [1, T], or a picture."""
        params = self.params[adapter]
        picture = isinstance(piece, Picture)
        given = self.features.of(params, adapter, piece) if picture else batches.put(piece, None)
        self._cache = programs.prefill(self.model, params, self._cache, given, np.int32([row]), np.int32([slot]))

    def copy(self, source: int, row: int, count: int):
        """Begins `row` anew, with the first `count` slots of the row `source`."""
        self._cache = programs.copy_row(self._cache, np.int32(source), np.int32(row), np.int32(count))

    def step(self, adapter: str | None, slots: Slots, active: np.ndarray, window: int = 1) -> programs.Drawn:
        """Gives the device a step of the `active` rows [B]; returns what it will have drawn."""
        if slots.changed:
            # Copied, since the host's are changed in place.
            self._rows = jax.device_put(jax.tree.map(np.copy, slots.rows))
            slots.changed = False
        given = self._tokens, self._rows, active.copy()
        made = programs.step(self.model, self.params[adapter], self._cache, *given, window=window)
        self._cache, self._tokens, self._rows, drawn = made
        return drawn

    def warm_up(self) -> Any:
        """Compiles every program, by running it; the cache is empty afterwards."""
        c, slots = self.janus.config, Slots(self._count)
        picture = Picture(0, np.zeros((c.vision.image_size, c.vision.image_size, 3), np.float32))
        for size in reversed(self.sizes):
            self.renew(size)
            for adapter in self.params:
                fitting = [tokens for tokens in PIECES if tokens <= self.slots]
                for piece in (*(np.zeros((1, tokens), np.int32) for tokens in fitting), picture):
                    self.prefill(adapter, piece, 0, 0)
                for window in dict.fromkeys((1, self.window)):
                    self.step(adapter, slots, np.zeros(self._count, bool), window)
            self.copy(0, 1, 0)
        for size, larger in zip(self.sizes, self.sizes[1:], strict=False):
            self.renew(size)
            self.make_room(larger)
        self.renew()
        return decode_images(self.model, self.params[None], jnp.zeros((1, c.gen_vision.num_tokens), jnp.int32))


def cache_slots(context: int, window: int = 1) -> list[int]:
    """The cache's numbers of slots for rows of `context` tokens, smallest first."""
    sizes = [min(_SMALLEST_CACHE, context)]
    while sizes[-1] < context:
        sizes.append(min(2 * sizes[-1], context))
    # A prompt's last piece is padded, a window reaches beyond an image's end; multiples of 128 suit TPUs.
    return [-(-(size + max(PIECES[0], window)) // 128) * 128 for size in sizes]


def _with_adapters(janus: JanusPipeline) -> dict[str | None, Any]:
    active, params = janus.adapters.active, {}
    for name in (None, *janus.adapters.names):
        janus.use_adapter(name)
        params[name] = janus.params
    janus.use_adapter(active)
    return params
