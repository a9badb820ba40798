"""The compiled programs lower for platforms that are not at hand."""

import jax
import jax.numpy as jnp
import pytest

from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus
from janus_jax.sampling.images import continue_image, start_image
from janus_jax.sampling.sampler import make_sampler
from janus_jax.weights.torch_weights import abstract_params


@pytest.mark.parametrize(
    ("platform", "scan_layers"),
    [
        ("cuda", False),
        ("tpu", False),
        *(pytest.param(platform, True, marks=pytest.mark.slow) for platform in ("cpu", "cuda", "tpu")),
    ],
)
def test_image_loop_lowers(platform, scan_layers):
    config = PRESETS["janus_pro_7b"]
    model = Janus(config, dtype=jnp.bfloat16, scan_layers=scan_layers)
    params = abstract_params(config, scan_layers, "bfloat16")
    ids = jax.ShapeDtypeStruct((1, 2, 32), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    guidance, sampler = jnp.float32(5), make_sampler()

    def start(params, ids, mask, keys):
        return start_image(model, params, ids, mask, keys, guidance, sampler, 576)

    state = jax.eval_shape(start, params, ids, mask, keys)
    traced = continue_image.trace(model, params, state, keys, guidance, sampler, jnp.int32(1), jnp.int32(576))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # The rewriting of small products is for XLA:CPU alone; elsewhere it would keep them from fusing.
    assert ("optimization_barrier" in text) == (platform == "cpu")
    assert "576" in text
