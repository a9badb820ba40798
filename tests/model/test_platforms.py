"""The compiled programs lower for platforms that are not at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus
from janus_jax.model.kv_cache import RowSlots, store
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


@pytest.mark.parametrize("layer", [None, 1])
def test_new_keys_of_rows(monkeypatch, layer, rng):
    """The form of GPUs and that of other platforms, up to the cache's last slot."""
    shape = (4, 2, 16, 8) if layer is None else (3, 4, 2, 16, 8)
    kv = tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    new = [jnp.asarray(rng.standard_normal((4, 2, 3, 8)), jnp.float32) for _ in range(2)]
    starts = np.array([0, 5, 13, 2])
    stored = {}
    for platform in ("cuda", "tpu"):
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *x, default, _own=platform, **forms: forms.get(_own, default)(*x)
        )
        slots = RowSlots(None, jnp.asarray(starts, jnp.int32), jnp.asarray(starts, jnp.int32))
        stored[platform] = store(kv, *new, None if layer is None else jnp.int32(layer), slots)
    for which in range(2):
        expected = np.array(kv[which])
        own = expected if layer is None else expected[layer]
        for row, start in enumerate(starts):
            own[row, :, start : start + 3] = new[which][row]
        for platform in stored:
            np.testing.assert_array_equal(stored[platform][which], expected, err_msg=platform)
