"""The model of the moment: what a run trains, as a pipeline that draws and answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.model.janus import Janus
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.sharding import RULES, cast, flatten, param_shardings, unflatten
from train.config import TrainConfig
from train.step.leaves import abstract_leaves, joined
from train.step.state import Params, TrainState, make_model

_LAYERS = "language_model/layers/"


def pipeline_of(
    config: TrainConfig, processor: Processor, mesh: Mesh, state: TrainState, frozen: Params, fast: bool = False
) -> JanusPipeline:
    """The model with the parameters of `state` in the compute dtype, split as they are; an adapter's are not merged.

    Args:
      fast: for drawing much: with the decoder's layers apart, which takes longer to compile, and whole on every shard
        of the batch, where each code would otherwise gather them again.
    """
    params = joined(state.trained, frozen)
    if not fast:
        model = make_model(config)
        return JanusPipeline(config.model, _cast(params, model.dtype), model, processor, mesh)
    made = params_for_drawing(config, mesh)(params)
    return JanusPipeline(config.model, made, model_for_drawing(config), processor, mesh)


_cast = jax.jit(cast, static_argnums=1)


def model_for_drawing(config: TrainConfig) -> Janus:
    """The model of a fast `pipeline_of`."""
    return dataclasses.replace(make_model(config), scan_layers=False, remat="none")


@functools.lru_cache(maxsize=4)
def params_for_drawing(config: TrainConfig, mesh: Mesh) -> Any:
    """The compiled function from all parameters of a run to those of a fast `pipeline_of`."""
    made = functools.partial(_apart, jnp.dtype(config.compute_dtype))
    shapes = jax.eval_shape(made, joined(*abstract_leaves(config)))
    rows = set(RULES["batch"])

    def whole(sharding: NamedSharding) -> NamedSharding:
        spec = (axes if axes not in rows else None for axes in sharding.spec)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.jit(made, out_shardings=jax.tree.map(whole, param_shardings(shapes, mesh)))


def _apart(dtype: Any, params: Params) -> Params:
    """`params` in `dtype`, with each layer of the decoder in a subtree of its own."""
    made = {}
    for path, x in flatten(cast(params, dtype)).items():
        if path.startswith(_LAYERS):
            made |= {f"{_LAYERS[:-1]}_{i}/{path.removeprefix(_LAYERS)}": x[i] for i in range(x.shape[0])}
        else:
            made[path] = x
    return unflatten(made)
