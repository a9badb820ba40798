"""What is computed otherwise on a CPU stands behind one seam: `janus_jax.model.cpu`, and its switch `Janus.cpu`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import PRESETS
from janus_jax.loading import layout
from janus_jax.model import attention, cpu
from janus_jax.model.janus import Janus, init_params
from janus_jax.model.kv_cache import init_cache
from janus_jax.model.precision import einsum
from janus_jax.sampling.cache import empty_cache
from janus_jax.weights.quantize import quantize
from janus_jax.weights.torch_weights import abstract_params

CONFIG = PRESETS["janus_tiny"]
TOKENS = 140  # more than count as few


def program(on_cpu: bool, weights: str | None) -> str:
    """Everything that reads a kernel or the cache, for one row: image, prompt and a decoding step, lowered."""
    model = Janus(CONFIG, scan_layers=False, cpu=on_cpu)
    params = abstract_params(CONFIG, False, "float32")
    params = jax.eval_shape(quantize, params) if weights else params

    def run(params, ids, pixels):
        def call(method, *args):
            return model.apply({"params": params}, *args, method=method)

        x = jnp.concatenate([call("embed_text", ids), call("embed_images", pixels)], axis=1)
        cache = init_cache(CONFIG.language, 1, TOKENS + 80, jnp.float32, scan_layers=False, on_cpu=model.cpu)
        hidden, cache = call("prefill", x, jnp.ones(x.shape[:2], bool), cache)
        hidden, cache = call("decode", hidden[:, -1:], cache)
        return call("text_logits", hidden), call("image_logits", hidden), cache

    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    size = CONFIG.vision.image_size
    return jax.jit(run).lower(params, ids, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)).as_text()


@pytest.mark.parametrize("weights", [None, "int8"])
def test_without_the_seam_the_model_is_the_plain_one(weights, monkeypatch):
    """With each function of the module replaced by what it stands in for, its switch changes nothing."""
    ours = program(True, weights)
    monkeypatch.setattr(cpu, "product", lambda plain, spec, x, kernel, out_dtype, as_matrix: plain(x, kernel))
    monkeypatch.setattr(cpu, "attend", attention.attend)
    monkeypatch.setattr(cpu, "cache_dtype", lambda dtype: dtype)
    monkeypatch.setattr(cpu, "cache_rows", lambda batch: batch)
    monkeypatch.setattr(cpu, "as_cached", lambda x, rows: x)
    plain = program(False, weights)
    assert program(True, weights) == plain
    assert "optimization_barrier" in ours and "optimization_barrier" not in plain
    two_rows = f"tensor<2x{CONFIG.language.kv_heads}x{TOKENS + 80}x"
    assert two_rows in ours and two_rows not in plain


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 128, 300])
def test_narrow_products(dtype, tokens):
    """They are asked for in float32, and rounded once; XLA:CPU would widen the kernel of one that is to be narrow."""
    rng = np.random.default_rng(tokens)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((1, tokens, 96), (4, 24, 96)))
    exact = np.einsum("BTD,NHD->BTNH", *(np.asarray(given, np.float64) for given in (x, kernel)))
    for out in (None, jnp.float32):

        def product(x, kernel, out=out):
            spec = "BTD,NHD->BTNH"
            return cpu.product(lambda x, kernel: einsum(spec, x, kernel, out), spec, x, kernel, out, as_matrix=True)

        dots = [line for line in jax.jit(product).lower(x, kernel).as_text().splitlines() if "dot_general" in line]
        assert dots and all(line.split(" loc(")[0].rstrip().endswith("xf32>") for line in dots)
        made = jax.jit(product)(x, kernel)
        assert made.dtype == (out or x.dtype) and made.shape == exact.shape
        rounding = jnp.finfo(made.dtype).eps / 2
        np.testing.assert_allclose(np.asarray(made, np.float64), exact, rtol=1.01 * rounding, atol=2e-5)


def test_a_narrow_model_keeps_a_wide_cache():
    """And computes what it computes elsewhere, up to the rounding of its dtype."""
    model = Janus(CONFIG, dtype=jnp.bfloat16, scan_layers=False)
    ids = jnp.arange(60).reshape(2, 30)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))

    def run(model):
        def call(method, *args):
            return model.apply({"params": params}, *args, method=method)

        cache = empty_cache(model, 2, 40)
        hidden, cache = call("prefill", call("embed_text", ids), jnp.ones(ids.shape, bool), cache)
        after, cache = call("decode", call("embed_codes", ids[:, :1]), cache)
        return cache.keys[0].dtype, call("text_logits", hidden), call("image_logits", after)

    (dtype, *ours), (elsewhere, *others) = (run(dataclasses.replace(model, cpu=on_cpu)) for on_cpu in (True, False))
    assert (dtype, elsewhere) == (jnp.float32, jnp.bfloat16)
    for made, other in zip(ours, others, strict=True):
        np.testing.assert_allclose(made, other, atol=0.03 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    ("platform", "on_mesh", "chosen"),
    [("cpu", False, True), ("cpu", True, False), ("gpu", False, False), ("tpu", False, False)],
)
def test_one_cpu_device_chooses_it(platform, on_mesh, chosen):
    assert layout(CONFIG, platform, on_mesh)["cpu"] == chosen
