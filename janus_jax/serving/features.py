"""Pictures as the decoder sees them, kept by their content: a conversation asks about the same ones in every turn."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model.janus import Janus
from janus_jax.sampling.shared import embed_pictures
from janus_jax.serving.jobs import Picture


class Features:
    """The embeddings [1, patches, D] of the `most` pictures that were used last."""

    def __init__(self, model: Janus, most: int = 32):
        self._model, self._most = model, most
        self._kept: collections.OrderedDict[tuple[str | None, bytes], jax.Array] = collections.OrderedDict()

    def of(self, params: Any, adapter: str | None, picture: Picture) -> jax.Array:
        """The picture's embeddings with these parameters, which are those with `adapter`."""
        key = (adapter, picture.digest)
        if key not in self._kept:
            self._kept[key] = embed_pictures(self._model, params, jnp.asarray(picture.pixels[None]))
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self, adapter: str | None, picture: Picture):
        """Forgets the picture, whose embeddings may be spoiled."""
        self._kept.pop((adapter, picture.digest), None)
