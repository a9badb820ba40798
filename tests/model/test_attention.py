"""Causal attention within segments: what TPU's and GPU's kernels are given, done on a CPU, against the plain one."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model import attention, cpu
from janus_jax.model.attention import attend, attend_all, attend_segments, takes
from janus_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def packed():
    """Queries, keys, values and the segments of two packed rows, with padding at the end of one."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 256, 4, 128), *((2, 2, 256, 128),) * 2)
    )
    segment_ids = np.zeros((2, 256), np.int32)
    for segment, (begin, stop) in enumerate(((0, 100), (100, 130), (130, 250)), 1):
        segment_ids[0, begin:stop] = segment
    segment_ids[1] = 1
    return q, k, v, jnp.asarray(segment_ids)


@pytest.mark.parametrize(("most", "kernels"), [(8, 1), (1, 2)])
def test_splash_in_several_blocks(most, kernels, close, kernels_elsewhere, monkeypatch):
    """The gradients of queries are summed over blocks of keys, or computed by a kernel of their own."""
    monkeypatch.setattr(attention, "_LARGEST_BLOCK", 128)
    monkeypatch.setattr(attention, "_MOST_PARTS", most)
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 384, 2, 128), *((1, 1, 384, 128),) * 2))
    args = q, k, v, jnp.asarray(1 + np.arange(384) // 200)[None]
    traced = jax.jit(lambda *args: value_and_grads("splash", *args)).trace(*args)
    assert str(traced.jaxpr).count("pallas_call") == 1 + kernels
    got, expected = traced.lower().compile()(*args), value_and_grads("xla", *args)
    for name, ours, theirs in zip("yqkv", got, expected, strict=True):
        close(ours, theirs, name, 2e-5)


def value_and_grads(implementation, q, k, v, segment_ids):
    def loss(q, k, v):
        y = attend_segments(q, k, v, segment_ids, implementation)
        return (jnp.sin(y) * (segment_ids > 0)[..., None, None]).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, *grads


@pytest.fixture
def kernels_elsewhere(monkeypatch):
    """Splash interpreted; for cuDNN, XLA's computation of what `jax.nn.dot_product_attention` is given."""
    monkeypatch.setattr(attention, "_INTERPRET", True)
    monkeypatch.setattr(attention, "_CUDNN", "xla")


@pytest.mark.parametrize("shape", [None, {"data": 2}, {"tensor": 2}])
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_are_attention_within_segments(packed, kernel, shape, close, kernels_elsewhere):
    expected = jax.jit(value_and_grads, static_argnums=0)("xla", *packed)
    mesh = contextlib.nullcontext()
    if shape is not None:
        mesh = jax.set_mesh(make_mesh(shape, jax.devices()[:2]))
    with mesh:
        got = jax.jit(value_and_grads, static_argnums=0)(kernel, *packed)
    real = np.asarray(packed[3] > 0)
    close(np.asarray(got[0])[real], np.asarray(expected[0])[real], "attention", 2e-5)
    for name, ours, theirs in zip("qkv", got[1:], expected[1:], strict=True):
        close(ours, theirs, f"gradient of {name}", 2e-5)


@pytest.mark.parametrize("shape", [None, {"data": 2}, {"tensor": 2}])
def test_cudnn_is_attention_of_all_to_all(shape, close, kernels_elsewhere, monkeypatch):
    monkeypatch.setattr(attention, "takes", lambda *_: True)  # float32, which cuDNN itself would refuse
    asked = []
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **how: asked.append(how) or plain(*x, **how))
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 192, 2, 64), *((2, 2, 192, 64),) * 2))

    def value_and_grads(how, *given):
        def loss(*given):
            y = attend_all(*given, how)
            return jnp.sin(y).sum(), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*given)
        return y, *grads

    expected = jax.jit(value_and_grads, static_argnums=0)("xla", q, k, v)
    assert not asked
    with contextlib.nullcontext() if shape is None else jax.set_mesh(make_mesh(shape, jax.devices()[:2])):
        got = jax.jit(value_and_grads, static_argnums=0)("cudnn", q, k, v)
    assert asked == [{"mask": None, "is_causal": False, "implementation": "xla"}]
    for name, ours, theirs in zip("yqkv", got, expected, strict=True):
        close(ours, theirs, name, 2e-5)


def test_shapes_that_no_kernel_takes_are_attended_to_all_the_same(close):
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 9, 2, 64), *((2, 2, 9, 64),) * 2))
    close(attend_all(q, k, v, "cudnn"), attend(q, k, v), "attention", 0)


@pytest.mark.parametrize("masked", ["row by row", "all rows alike", "not at all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_by_head_is_attention(dtype, masked, close):
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=shape) for shape in ((3, 5, 4, 16), (3, 2, 7, 16), (3, 2, 7, 16)))
    mask = rng.random((3, 5, 7)) < 0.6
    mask[1, 2] = False  # a query that may look nowhere
    mask = {"row by row": jnp.asarray(mask), "all rows alike": jnp.asarray(mask[1:2]), "not at all": None}[masked]
    given = [jnp.asarray(x, dtype) for x in (q, k, v)]
    got, expected = (np.asarray(how(*given, mask), np.float32) for how in (cpu.attend, attend))
    close(got, expected, "attention", 1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.slow
def test_head_by_head_has_the_gradients_of_attention(packed, close):
    for name, ours, theirs in zip(
        "yqkv", value_and_grads("cpu", *packed), value_and_grads("xla", *packed), strict=True
    ):
        close(ours, theirs, name, 2e-5)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "dtype", "taken"),
    [
        (4096, 32, 32, 128, "bfloat16", {"xla", "splash", "cudnn"}),
        (4096, 32, 8, 128, "float16", {"xla", "splash", "cudnn"}),
        (4096, 32, 32, 128, "float32", {"xla", "splash"}),
        (640, 8, 8, 64, "bfloat16", {"xla", "cudnn"}),
        (576, 32, 32, 256, "bfloat16", {"xla"}),
        (577, 32, 32, 60, "bfloat16", {"xla"}),
    ],
)
def test_shapes_that_kernels_take(length, heads, kv_heads, head_dim, dtype, taken):
    how = (length, heads, kv_heads, head_dim, dtype)
    assert {one for one in ("xla", "splash", "cudnn") if takes(one, *how)} == taken


def test_splash_lowers_for_tpu(packed):
    q, k, v, segment_ids = packed
    traced = jax.jit(value_and_grads, static_argnums=0).trace(
        "splash", *(x.astype(jnp.bfloat16) for x in (q, k, v)), segment_ids
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2
