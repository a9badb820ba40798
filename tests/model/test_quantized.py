"""Products by int4 kernels, and by int8 ones in float16: every platform's form against the dequantized kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model import quantized
from janus_jax.model.linear import Linear

SHAPES = [
    ("BTD,FD->BTF", (256, 96), (96,)),
    ("BTD,NHD->BTNH", (3, 4, 64), (64,)),
    ("BTNH,DNH->BTD", (48, 4, 16), (4, 16)),
    ("BTD,CNHD->BTCNH", (3, 4, 16, 64), (64,)),
]
PLATFORMS = ("cpu", "tpu", "cuda")
GROUP = 16


def random_int4(rng, shape):
    """A kernel, its scales, and what they stand for."""
    kernel = rng.integers(-7, 8, shape)
    scale = rng.uniform(0.5, 2, (*shape[:-1], shape[-1] // GROUP)).astype(np.float32)
    wide = (kernel.reshape(*scale.shape, -1) * scale[..., None]).reshape(shape)
    return {"kernel": jnp.asarray(kernel, jnp.int4), "kernel_scale": jnp.asarray(scale)}, wide


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch) -> str:
    """The form of one platform, computed here."""

    def chosen(*args, default, **forms):
        return forms.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    return request.param


@pytest.mark.parametrize(("spec", "shape", "features"), SHAPES)
def test_int4(platform, spec, shape, features, rng, close):
    params, wide = random_int4(rng, shape)
    for tokens, dtype in ((1, "float32"), (20, "float32"), (2, "float16")):
        x = rng.standard_normal((2, tokens, *features)).astype(dtype)
        module = Linear(spec, shape, dtype=jnp.dtype(dtype), out_dtype=jnp.float32)
        y = module.apply({"params": params}, x)
        assert y.dtype == jnp.float32
        close(y, np.einsum(spec, x.astype(np.float64), wide), spec, 1e-6 if dtype == "float32" else 2e-3)


@pytest.mark.parametrize("form", [quantized._by_groups, quantized._by_blocks, quantized._in_float32])
def test_forms_of_accelerators_are_exact_in_float32(form, rng, close):
    params, wide = random_int4(rng, (48, 256))
    x = rng.standard_normal((2, 256)).astype(np.float32)
    close(form(x, *params.values()), x.astype(np.float64) @ wide.T, form.__name__, 1e-6)


@pytest.mark.parametrize(("dtype", "out_dtype"), [("bfloat16", None), ("float16", None), ("bfloat16", jnp.float32)])
def test_dtypes(platform, dtype, out_dtype, rng):
    params, _ = random_int4(rng, (32, 64))
    for tokens in (1, 20):
        x = jnp.ones((1, tokens, 64), dtype)
        y = Linear("BTD,FD->BTF", (32, 64), dtype=jnp.dtype(dtype), out_dtype=out_dtype).apply({"params": params}, x)
        assert y.dtype == (out_dtype or dtype)


@pytest.mark.parametrize(("spec", "shape", "features"), SHAPES[1:3])
@pytest.mark.parametrize("tokens", [1, 20])
def test_int8_in_float16(platform, spec, shape, features, tokens, rng, close):
    kernel = rng.integers(-127, 128, shape).astype(np.int8)
    contracted = len(features)
    scale = rng.uniform(0.5, 2, shape[:-contracted]).astype(np.float32) / 127
    x = rng.standard_normal((1, tokens, *features)).astype(np.float16)
    module = Linear(spec, shape, dtype=jnp.float16, out_dtype=jnp.float32)
    y = module.apply({"params": {"kernel": jnp.asarray(kernel), "kernel_scale": jnp.asarray(scale)}}, x)
    wide = kernel * scale.reshape(*scale.shape, *(1,) * contracted)
    close(y, np.einsum(spec, x.astype(np.float64), wide), spec, 1e-5)


@pytest.mark.parametrize("tokens", [3, 200])
def test_gradient_of_the_input(platform, tokens, rng, close):
    """As training over a quantized base needs it."""
    params, wide = random_int4(rng, (256, 64))
    module = Linear("BTD,FD->BTF", (256, 64))
    x = rng.standard_normal((1, tokens, 64)).astype(np.float32)
    ours = jax.grad(lambda x: (module.apply({"params": params}, x) ** 2).sum())(x)
    close(ours, 2 * (x @ wide.T) @ wide, "gradient", 1e-5)


def lowered(platform: str, dtype: str, tokens: int) -> str:
    params = {
        "kernel": jax.ShapeDtypeStruct((256, 512), jnp.int4),
        "kernel_scale": jax.ShapeDtypeStruct((256, 4), jnp.dtype(dtype)),
    }
    run = jax.jit(Linear("BTD,FD->BTF", (256, 512), dtype=jnp.dtype(dtype)).apply)
    given = {"params": params}, jax.ShapeDtypeStruct((1, tokens, 512), jnp.dtype(dtype))
    return run.trace(*given).lower(lowering_platforms=(platform,)).as_text()


def test_each_platform_gets_its_own_form():
    """At lowering, whatever devices there are."""
    grouped, whole = "tensor<256x4x128xbf16>", "tensor<256x512xbf16>"
    few, many = (lowered("tpu", "bfloat16", tokens) for tokens in (2, quantized._FEW_TOKENS_IN_BLOCKS + 1))
    # XLA casts inside the product, but writes out what is multiplied by its scales.
    assert grouped not in few and f"(tensor<1x2x4x512xbf16>, {whole})" in few
    assert grouped in many and "batching_dims" not in few + many
    for platform in ("cuda", "rocm"):
        assert "batching_dims" in lowered(platform, "bfloat16", 2)
        assert "batching_dims" not in lowered(platform, "bfloat16", quantized._FEW_TOKENS + 1)
        assert "dot_general" not in lowered(platform, "float16", 2)
        sums = re.findall(r"stablehlo\.reduce\(.*-> tensor<(\w+)>", lowered(platform, "float16", 2))
        assert sums == ["256xf32"] * 2  # none of groups, which XLA:GPU would write to memory and read again
    assert "optimization_barrier" in lowered("cpu", "float32", 2)
    assert "bitcast_convert" not in lowered("tpu", "bfloat16", 2)
