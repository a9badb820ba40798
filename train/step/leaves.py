"""Which parameters a run has, and which of them it trains: whole parts by its stage, or the leaves of an adapter."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.io.fields import shown
from janus_jax.sharding import flatten, is_stacked, unflatten
from janus_jax.weights.adapters import trainable
from janus_jax.weights.adapters.adapter import Adapter, chosen, saved_slots
from janus_jax.weights.adapters.trainable import abstract_trainable, check_dora, new_adapter, trained_adapter
from janus_jax.weights.quantize import quantized_shapes
from janus_jax.weights.torch_names import Slot
from janus_jax.weights.torch_weights import abstract_params
from train.config import TRAINED, TrainConfig

Params = dict[str, Any]


def split(params: Mapping[str, Any], stage: int) -> tuple[Params, Params]:
    """Splits `params` (a tree of anything) into the trained and the frozen parts of `stage`."""
    trained = {part: params[part] for part in TRAINED[stage]}
    return trained, {part: tree for part, tree in params.items() if part not in trained}


def split_leaves(params: Mapping[str, Any], config: TrainConfig) -> tuple[Params, Params]:
    """Splits `params` (a tree of anything) into the trained and the frozen leaves of `config`."""
    if config.adapter is None:
        return split(params, config.stage)
    flat, whole = flatten(params), saved_paths(config)
    trained = {path: x for path, x in flat.items() if path in whole or path.rpartition("/")[2] in trainable.TRAINED}
    return unflatten(trained), unflatten({path: x for path, x in flat.items() if path not in trained})


def joined(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """All parameters of a run; leaves of both may lie in one module."""
    return unflatten(flatten(frozen) | flatten(trained))


def abstract_leaves(config: TrainConfig) -> tuple[Params, Params]:
    """The trained and the frozen leaves of `config` as `jax.ShapeDtypeStruct`s, in the dtypes in which a run has them.

    Raises: ValueError in one line for an adapter that does not fit the model.
    """
    if config.adapter is None:
        trained, frozen = split(abstract_params(config.model, dtype="float32"), config.stage)
        return trained, jax.tree.map(lambda x: _in(x, config.frozen_dtype), frozen)
    own, fixed = _of_adapter(config)
    whole = saved_paths(config)
    base = flatten(abstract_params(config.model, dtype=config.frozen_dtype))
    trained = {path: _in(x, "float32") for path, x in base.items() if path in whole}
    frozen = quantized_shapes(unflatten({p: x for p, x in base.items() if p not in whole}), config.adapter.weights)
    return joined(own, unflatten(trained)), joined(fixed, frozen)


def _in(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))


def _of_adapter(config: TrainConfig) -> tuple[Params, Params]:
    modules = dict.fromkeys("/".join(slot.path[:-1]) for slot in changed_slots(config))
    dora = config.adapter.kind == "dora"
    return abstract_trainable(abstract_params(config.model), modules, config.adapter.rank, dora)


@functools.lru_cache(maxsize=8)
def changed_slots(config: TrainConfig) -> tuple[Slot, ...]:
    """The linear layers that the adapter of `config` changes: its targets, except in the modules that it saves.

    Raises: ValueError in one line, naming the key of the config.
    """
    adapter, whole = config.adapter, saved_paths(config)
    if not adapter.targets:
        raise ValueError("adapter.targets is empty; name linear layers, such as decoder")
    found = [
        slot for slot in chosen(config.model, adapter.targets, "adapter.targets") if "/".join(slot.path) not in whole
    ]
    if not found:
        raise ValueError("adapter.targets: adapter.save names all of these layers already; leave them out of one")
    if adapter.kind == "dora":
        for path, count in collections.Counter("/".join(slot.path) for slot in found).items():
            check_dora(path.removesuffix("/kernel"), count, _layers(config, path), "adapter.targets: ")
    return tuple(found)


@functools.lru_cache(maxsize=8)
def saved_paths(config: TrainConfig) -> frozenset[str]:
    """The parameters that the adapter of `config` trains whole.

    Raises: ValueError in one line, naming the key of the config.
    """
    found = collections.Counter(
        "/".join(slot.path) for slot in saved_slots(config.model, config.adapter.save, key="adapter.save")
    )
    for path, count in found.items():
        if path.startswith("gen_vision_model/"):
            raise ValueError("adapter.save: gen_vision_model is not trained with the model; train it with train.vq")
        if count < _layers(config, path):
            raise ValueError(
                f"adapter.save: {path} is of {count} of its {_layers(config, path)} layers; name it in all, "
                f"as {shown(path.split('/')[-2])}"
            )
    return frozenset(found)


def _layers(config: TrainConfig, path: str) -> int:
    """How many layers the parameter at `path` has."""
    if not is_stacked(path):
        return 1
    return config.model.vision.layers if path.startswith("vision_model/") else config.model.language.layers


def first_adapter(config: TrainConfig) -> Adapter:
    """The adapter of `config` before the first step."""
    adapter = config.adapter
    return new_adapter(changed_slots(config), adapter.rank, adapter.alpha, adapter.kind, config.seed)


def adapter_of(config: TrainConfig, trained: Mapping[str, Any]) -> Adapter:
    """The adapter that `trained` is, as host arrays."""
    flat, saved = flatten(trained), {}
    for slot in saved_slots(config.model, config.adapter.save):
        whole = np.asarray(flat["/".join(slot.path)], np.float32)
        saved[slot.path, slot.layer] = whole if slot.layer is None else whole[slot.layer]
    like = dataclasses.replace(first_adapter(config), saved=saved, base=config.init_from)
    return trained_adapter(like, trained)
