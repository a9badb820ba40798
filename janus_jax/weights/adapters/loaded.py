"""The adapters that a loaded model holds: several by name, of which one at a time is in its parameters."""

from __future__ import annotations

import math
import os
from typing import Any

from jax.sharding import Mesh

from janus_jax.config import JanusConfig
from janus_jax.io.fields import shown
from janus_jax.io.messages import did_you_mean, one_line, print_note
from janus_jax.io.stores import as_path
from janus_jax.weights.adapters.attach import attach, merge
from janus_jax.weights.adapters.peft_files import read_adapter

Params = dict[str, Any]


class Adapters:
    """Each adapter is kept as the parameters with it, which share all other arrays with the model's own.

    Attributes:
      active: the name of the adapter in use, or None.
    """

    def __init__(self, config: JanusConfig, dtype: Any, mesh: Mesh | None, source: str):
        self._config, self._dtype, self._mesh, self._source = config, dtype, mesh, source
        self._with: dict[str, Params] = {}
        self._base: Params = {}
        self.active: str | None = None

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self.names) or 'none'}; in use: {self.active or 'none'})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._with)

    def load(self, params: Params, path: str | os.PathLike, scale: float, name: str | None) -> str:
        """Reads the adapter at `path`, to be used with `params`, the model's; returns its name."""
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {shown(scale)}")
        name = as_path(path).resolve().name if name is None else name
        if name in self._with:
            raise ValueError(f"an adapter named {shown(name)} is loaded; unload it, or give this one another name=")
        adapter = read_adapter(path, self._config)
        if _last(adapter.base) != _last(self._source) and adapter.base and self._source:
            print_note(
                f"{one_line(path)} was trained over {one_line(adapter.base)}, and the model here is "
                f"{one_line(self._source)}; if that is another one, expect other results"
            )
        base = params if self.active is None else self._base
        self._with[name] = attach(base, adapter, scale, self._dtype, self._mesh)
        self._base = base
        return name

    def use(self, params: Params, name: str | None) -> Params:
        """The parameters with the adapter `name`, or with none."""
        if name is not None:
            self._need(name)
        if self.active is None:
            self._base = params
        self.active = name
        return self._base if name is None else self._with[name]

    def unload(self, params: Params, name: str | None) -> Params:
        """Forgets the adapter `name`, or all; returns the parameters without it."""
        for each in self.names if name is None else (self._need(name),):
            if each == self.active:
                params = self.use(params, None)
            del self._with[each]
        return params

    def merge(self, params: Params) -> Params:
        """The parameters with the active adapter merged into their kernels; forgets all adapters."""
        if self.active is None:
            raise ValueError("there is no adapter in use to merge; load one with load_adapter")
        merged = merge(params)
        self._with, self._base, self.active = {}, {}, None
        return merged

    def _need(self, name: str) -> str:
        if name not in self._with:
            told = f"; loaded: {', '.join(map(one_line, self.names))}" if self.names else "; none is loaded"
            raise ValueError(f"there is no adapter named {shown(name)}{did_you_mean(str(name), self.names) or told}")
        return name


def _last(source: str) -> str:
    """The part of a folder or hub id by which a model is known."""
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
