"""Models in float16, int8 and int4 against the reference's outputs, and where float16 is the default."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import janus_jax
from benchmarks import golden
from janus_jax.loading import default_dtype
from janus_jax.model.layers import RMSNorm
from janus_jax.model.llama import Llama
from tests.library.tiny_janus import GOLDEN


@pytest.mark.slow
def test_float16_against_the_reference():
    """Everything within 2e-2, nothing that is not finite, and every id the same."""
    stored = golden.read_npz(GOLDEN / "golden.npz")
    janus = janus_jax.load(GOLDEN, dtype="float16", progress=False)
    assert {str(x.dtype) for x in jax.tree.leaves(janus.params)} == {"float16"}
    valid = stored["und_mask"].astype(bool)  # padding is undefined
    for name, ours in golden.outputs(janus, stored):
        theirs = stored[name]
        if np.issubdtype(theirs.dtype, np.integer):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            continue
        ours = ours.astype(np.float32)
        assert np.isfinite(ours).all(), name
        if name.startswith("und_"):
            ours, theirs = ours[valid], theirs[valid]
        assert golden.relative_error(ours, theirs) <= 2e-2, name


@pytest.mark.parametrize(("weights", "most", "agree"), [("int8", 0.03, 0.95), ("int4", 0.4, 0.6)])
def test_quantized_logits_against_the_reference(weights, most, agree):
    """In norm, and by the first choice of every position."""
    stored = golden.read_npz(GOLDEN / "golden.npz")
    janus = janus_jax.load(GOLDEN, weights=weights, progress=False)
    mask = stored["und_mask"].astype(bool)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

    @jax.jit
    def logits(params, x):
        hidden = janus.model.apply({"params": params}, x, positions, mask.astype(np.int32), method="hidden")
        return janus.model.apply({"params": params}, hidden, method="text_logits")

    ours, theirs = np.asarray(logits(janus.params, stored["und_embeds"]))[mask], stored["und_logits"][mask]
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert 1e-4 < error < most and same >= agree, (error, same)


def test_the_residual_stream_leaves_float16s_range():
    """What is added up over the layers, and the norm of it."""
    config = janus_jax.load(GOLDEN, progress=False).config.language
    x = jnp.full((1, 3, config.width), 6e4, jnp.float16)
    ids = jnp.zeros((1, 3), jnp.int32)
    model = Llama(config, dtype=jnp.float16)
    params = jax.jit(model.init)(jax.random.key(0), x, ids, ids + 1)
    large = jax.tree.map_with_path(
        lambda path, leaf: leaf * 3e4 if "o_proj" in jax.tree_util.keystr(path) else leaf, params
    )
    hidden = jax.jit(model.apply)(large, x, ids, ids + 1)
    assert hidden.dtype == jnp.float16 and bool(jnp.isfinite(hidden).all())
    norm = RMSNorm(1e-6, dtype=jnp.float16)
    y = norm.apply({"params": {"scale": jnp.full(4, 2.0)}}, jnp.asarray([[3e5, 0, 0, 0]], jnp.float32))
    np.testing.assert_allclose(np.asarray(y, np.float32), [[4, 0, 0, 0]], rtol=1e-3)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        *(("gpu", capability, "float16") for capability in ("7.5", "7.0", "6.1")),
        *(("gpu", capability, "bfloat16") for capability in ("8.0", "8.9", "9.0", "10.0", "12.0", "gfx942")),
        ("gpu", None, "bfloat16"),
        ("tpu", None, "bfloat16"),
        ("cpu", None, "float32"),
    ],
)
def test_default_dtype(platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert default_dtype(device) == dtype
