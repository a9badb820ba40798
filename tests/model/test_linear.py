"""The linear layer against numpy: few tokens and many, plain and int8, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model.linear import Linear


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("leading", [(1, 1), (2, 5), (3, 40), (1, 300)], ids=str)
@pytest.mark.parametrize(
    "spec, shape, features",
    [("BTD,FD->BTF", (7, 6), (6,)), ("BTD,NHD->BTNH", (3, 4, 6), (6,)), ("BTNH,DNH->BTD", (6, 2, 5), (2, 5))],
)
def test_linear(spec, shape, features, leading, cpu, rng, close):
    """Few tokens and many go different ways to the same result."""
    x = rng.standard_normal(leading + features).astype(np.float32)
    module = Linear(spec, shape, use_bias=True, cpu=cpu)
    params = module.init(jax.random.key(0), x)["params"]
    bias = rng.standard_normal(params["bias"].shape).astype(np.float32)
    y = module.apply({"params": params | {"bias": bias}}, x)
    close(y, np.einsum(spec, x, np.asarray(params["kernel"], np.float64)) + bias, spec, 1e-6)


def test_gradients_of_a_wide_product_are_narrow(rng, close):
    """A head's: bfloat16 into float32; as exact as bfloat16 is, and no product of float32."""
    module = Linear("BTD,VD->BTV", (96, 64), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, out_dtype=jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 80, 64)), jnp.bfloat16)
    params = module.init(jax.random.key(0), x)["params"]
    weights = rng.standard_normal((2, 80, 96)).astype(np.float32)

    def loss(params, x):
        return (weights * module.apply({"params": params}, x)).sum()

    gradient = jax.grad(loss, (0, 1))
    (of_params, of_x), kernel = gradient(params, x), np.asarray(params["kernel"], np.float32)
    assert of_params["kernel"].dtype == of_x.dtype == jnp.bfloat16
    close(np.asarray(of_x, np.float32), weights @ kernel, "x", 1e-2)
    expected = np.einsum("BTV,BTD->VD", weights, np.asarray(x, np.float32))
    close(np.asarray(of_params["kernel"], np.float32), expected, "kernel", 1e-2)
    text = jax.jit(gradient).lower(params, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 2 and not [line for line in products if "(tensor<2x80x96xf32>" in line], products


def test_linear_gradient(rng, close):
    """Few tokens or many, the gradient of each is its own: training takes both ways, too."""
    module = Linear("BTD,NHD->BTNH", (3, 4, 6), use_bias=True)
    x = rng.standard_normal((1, 200, 6)).astype(np.float32)
    weights = rng.standard_normal((1, 200, 3, 4)).astype(np.float32)
    params = module.init(jax.random.key(0), x)["params"]

    def gradients(start, stop):
        def loss(params, x):
            return jnp.sum(jnp.sin(module.apply({"params": params}, x)) * weights[:, start:stop])

        return jax.grad(loss, argnums=(0, 1))(params, x[:, start:stop])

    many, parts = gradients(0, 200), [gradients(start, start + 50) for start in range(0, 200, 50)]
    for name in ("kernel", "bias"):
        close(sum(part[0][name] for part in parts), many[0][name], f"gradient of the {name}", 1e-5)
    close(np.concatenate([part[1] for part in parts], 1), many[1], "gradient of the input", 1e-5)


@pytest.mark.parametrize("tokens", [3, 200])
def test_linear_dtypes(tokens):
    """Parameters in one dtype, products in another, results in a third."""
    module = Linear("...D,FD->...F", (8, 4), use_bias=True, dtype=jnp.bfloat16, out_dtype=jnp.float32)
    x = jnp.ones((tokens, 4))
    params = module.init(jax.random.key(0), x)["params"]
    assert params["kernel"].dtype == params["bias"].dtype == jnp.float32
    assert module.apply({"params": params}, x).dtype == jnp.float32
    assert module.clone(out_dtype=None).apply({"params": params}, x).dtype == jnp.bfloat16


def test_linear_init_keeps_the_variance(rng):
    """The fan-in is what is contracted, wherever its axes stand."""
    for spec, shape, features in (("BTD,NHD->BTNH", (4, 8, 300), (300,)), ("BTNH,DNH->BTD", (300, 4, 75), (4, 75))):
        x = rng.standard_normal((1, 500, *features)).astype(np.float32)
        y, _ = Linear(spec, shape).init_with_output(jax.random.key(0), x)
        assert 0.9 < np.std(y) < 1.1, spec


@pytest.mark.parametrize(("spec", "shape"), [("BTD,NHD->BTNH", (4, 64, 48)), ("BTD,FD->BTF", (96, 48))])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_int8_kernels_are_widened_and_scaled(spec, shape, tokens, rng, close):
    """Whether in blocks of the kernel or whole."""
    kernel = rng.integers(-127, 128, shape).astype(np.int8)
    scale = rng.uniform(0.5, 2, shape[:-1]).astype(np.float32)
    x = rng.standard_normal((1, tokens, 48)).astype(np.float32)
    params = {"kernel": jnp.asarray(kernel), "kernel_scale": jnp.asarray(scale)}
    y = jax.jit(Linear(spec, shape).apply)({"params": params}, x)
    close(y, np.einsum(spec, x, kernel.astype(np.float32) * scale[..., None]), "product", 1e-6)
