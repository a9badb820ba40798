"""The shared step as TPU's compiler makes it: the cache is updated where it lies."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus
from janus_jax.serving import programs
from janus_jax.weights.torch_weights import abstract_params
from train.plan.programs import devices_of
from train.plan.topologies import topology


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_step_of_16_rows_copies_no_cache():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("TPU's compiler is not installed")
    config = PRESETS["janus_pro_1b"]
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, layers=4))
    model = Janus(config, jnp.bfloat16, jnp.bfloat16, scan_layers=False)
    device = SingleDeviceSharding(devices_of(topology("v5e-1"))[0])

    def on(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)

    cache = on(jax.eval_shape(functools.partial(programs.new_cache, model, 16, 1152)))
    rows = on(programs.Rows.idle(16))
    tokens, active = on((jax.ShapeDtypeStruct((16,), jnp.int32), jax.ShapeDtypeStruct((16,), bool)))
    params = on(abstract_params(config, False, jnp.bfloat16))
    made = programs.step.lower(model, params, cache, tokens, rows, active).compile().memory_analysis()
    assert made.alias_size_in_bytes >= size(cache), "the cache that comes in is not the one that goes out"
    assert made.temp_size_in_bytes < size(cache.keys[0]) / 2, "there is room for a copy of a layer's keys"
