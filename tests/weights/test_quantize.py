"""Int8 and int4 kernels: how near they come, what they leave alone, and that everything runs on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import MODEL, write_checkpoint
from janus_jax.model.janus import Janus
from janus_jax.sharding import flatten, make_mesh, param_shardings, unflatten
from janus_jax.weights import quantize as quantize_module
from janus_jax.weights.quantize import array_bytes, is_quantized, quantize, quantize_leaf, scale_shape
from tests.conftest import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("start") / "model")


def dequantized(kernel, scale):
    """In float64; `scale` may be for the leading axes, or for groups of the last one."""
    kernel, scale = np.asarray(kernel, np.float64), np.asarray(scale, np.float64)
    if scale.ndim < kernel.ndim:
        return kernel * scale.reshape(*scale.shape, *(1,) * (kernel.ndim - scale.ndim))
    return (kernel.reshape(*scale.shape, -1) * scale[..., None]).reshape(kernel.shape)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_int8_kernel_is_within_half_a_level(folder, scan_layers):
    params = janus_jax.load(folder, scan_layers=scan_layers, progress=False).params
    before, after = flatten(params), flatten(quantize(params))
    changed = {path for path in before if after[path].dtype == jnp.int8}
    ends = ("_proj/kernel", "lm_head/kernel", "vision_head/kernel", "output_mlp_projector/kernel")
    assert changed == {path for path in before if path.endswith(ends) and not path.startswith("vision_model")}
    assert set(after) == set(before) | {f"{path}_scale" for path in changed}
    for path, x in before.items():
        if path not in changed:
            assert after[path] is x
            continue
        scale = np.asarray(after[f"{path}_scale"])
        wide = scale.reshape(*scale.shape, *(1,) * (x.ndim - scale.ndim))
        assert np.abs(np.asarray(after[path], np.float32) * wide - np.asarray(x)).max(initial=0) <= wide.max() * 0.5001
        # The largest of each output channel keeps its value.
        axes = tuple(range(scale.ndim, x.ndim))
        np.testing.assert_array_equal(np.abs(np.asarray(after[path])).max(axes), 127)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_kernels_are_quantized_in_blocks(form, dtype, rng, monkeypatch):
    """The same bit for bit, and without the whole kernel in float32, which XLA:CPU would hold."""
    path, shape = "language_model/lm_head/kernel", (96, 256)
    kernel = jnp.asarray(rng.standard_normal(shape), dtype)
    whole = quantize_leaf(path, kernel, form)
    make = {"int8": quantize_module._to_int8, "int4": quantize_module._to_int4}[form]
    how = (1,) if form == "int8" else (128, jnp.dtype(dtype))
    make.clear_cache()
    monkeypatch.setattr(quantize_module, "_BLOCK", kernel.size // 7)  # the next number that divides the rows is 8
    for name, x in quantize_leaf(path, kernel, form).items():
        assert (x.dtype, x.shape) == (whole[name].dtype, whole[name].shape)
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(whole[name], np.float32))
    temporaries = make.lower(kernel, *how, None).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < kernel.nbytes + 2 * 4 * kernel.size // 7
    make.clear_cache()


def hidden(model, params, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return model.apply({"params": params}, x, positions, jnp.ones(x.shape[:2], jnp.int32), method="hidden")


@pytest.mark.parametrize(
    ("scan_layers", "dtype"),
    [(True, "float32"), *(pytest.param(False, x, marks=pytest.mark.slow) for x in ("bfloat16", "float16"))],
)
def test_every_int4_kernel_is_within_half_a_level_of_its_group(folder, scan_layers, dtype):
    """Beyond that, only what a scale lost when it was rounded to the dtype: 7 levels of it."""
    params = janus_jax.load(folder, dtype=dtype, scan_layers=scan_layers, progress=False).params
    before, after = flatten(params), flatten(quantize(params, "int4"))
    changed = {path for path in before if after[path].dtype == jnp.int4}
    assert changed == {path for path, x in flatten(quantize(params)).items() if x.dtype == jnp.int8}
    assert set(after) == set(before) | {f"{path}_scale" for path in changed}
    for path, x in before.items():
        if path not in changed:
            assert after[path] is x
            continue
        kernel, scale = after[path], after[f"{path}_scale"]
        assert scale.dtype == x.dtype and kernel.shape == x.shape and scale.shape[:-1] == x.shape[:-1]
        assert np.abs(np.asarray(kernel, np.int8)).max() == 7
        groups = np.asarray(x, np.float64).reshape(*scale.shape, -1)
        error = np.abs(dequantized(kernel, scale).reshape(groups.shape) - groups)
        level = np.abs(groups).max(-1, keepdims=True) / 7
        assert (error <= level * (0.5 + 7 * float(jnp.finfo(dtype).eps))).all(), path


@pytest.mark.parametrize(
    ("shape", "group"), [((8, 4096), 128), ((3, 4, 48), 48), ((8, 11008), 128), ((8, 192), 96), ((8, 130), 26)]
)
def test_groups(shape, group, rng):
    """The largest even divisor of the last axis, up to 128."""
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    path = "gen_head/vision_head/kernel"
    made = quantize_leaf(path, x, "int4")
    assert made[f"{path}_scale"].shape == scale_shape(path, shape, "int4") == (*shape[:-1], shape[-1] // group)
    assert array_bytes(shape, jnp.int4) * 2 == x.size
    # Zeros have no largest value to divide by.
    np.testing.assert_array_equal(quantize_leaf(path, x * 0, "int4")[path], np.zeros(shape, np.int8))


@pytest.mark.parametrize("width", [131, 7, 254])
def test_a_kernel_without_groups_is_one_line_before_reading(width, tmp_path, monkeypatch):
    config = dataclasses.replace(MODEL, gen_head_width=width)
    folder = write_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr("janus_jax.loading.place", lambda *args, **kwargs: pytest.fail("weights were read"))
    told = rf"gen_head/vision_head/kernel has {width} inputs .* no group of 8 to 128 .* use weights='int8'$"
    with pytest.raises(ValueError, match=told):
        janus_jax.load(folder, weights="int4", progress=False)


@pytest.mark.parametrize(("form", "least", "most"), [("int8", 1e-4, 0.05), ("int4", 0.01, 0.5)])
def test_products_are_those_of_the_rounded_kernels(folder, close, form, least, most):
    """Wherever a form multiplies by the scales, it is as if the kernels had been rounded."""
    params = janus_jax.load(folder, scan_layers=True, progress=False).params
    small = quantize(params, form)
    rounded = flatten(small)
    for path in [path for path in rounded if path.endswith("kernel_scale")]:
        kernel = path.removesuffix("_scale")
        rounded[kernel] = jnp.asarray(dequantized(rounded[kernel], rounded.pop(path)), jnp.float32)
    model, x = Janus(MODEL), jax.random.normal(jax.random.key(0), (2, 9, MODEL.language.width))
    run = jax.jit(hidden, static_argnums=0)
    ours, exact = run(model, small, x), run(model, params, x)
    close(ours, run(model, unflatten(rounded), x), "hidden states", 1e-5)
    error = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
    assert least < error < most


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_draws_and_answers(folder, tmp_path, form):
    from examples.tiny.tokenizer import write_tokenizer
    from janus_jax.processing.processor_files import TOKENIZER_FILES, copy_files

    write_tokenizer(tmp_path / "t", image_size=MODEL.vision.image_size, num_image_tokens=MODEL.vision.num_patches)
    copy_files(tmp_path / "t", folder, TOKENIZER_FILES)
    janus = janus_jax.load(folder, weights=form, progress=False)
    assert janus.params["gen_head"]["vision_head"]["kernel"].dtype == form
    (image,) = janus.generate_images("a red house", progress=False)
    assert image.size == (MODEL.gen_vision.image_size,) * 2
    assert isinstance(janus.chat("what is this?", max_new_tokens=4), str)


@pytest.mark.parametrize("form", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_on_a_mesh(folder, close, form):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    alone = janus_jax.load(folder, weights=form, scan_layers=True, progress=False).params
    shared = janus_jax.load(folder, weights=form, scan_layers=True, mesh=mesh, progress=False).params
    shardings = flatten(param_shardings(alone, mesh))
    for path, x in flatten(alone).items():
        own = flatten(shared)[path]
        wide = np.float32 if x.dtype == jnp.int4 else x.dtype
        np.testing.assert_allclose(np.asarray(own, wide), np.asarray(x, wide), rtol=1e-6, err_msg=path)
        assert own.sharding.is_equivalent_to(shardings[path], x.ndim), path
    assert shardings["language_model/layers/mlp/up_proj/kernel_scale"].spec[1] == "tensor"
    x = jax.random.normal(jax.random.key(0), (2, 9, MODEL.language.width))
    with jax.set_mesh(mesh):
        ours = jax.jit(hidden, static_argnums=0)(Janus(MODEL), shared, x)
    close(ours, jax.jit(hidden, static_argnums=0)(Janus(MODEL), alone, x), "hidden states", 1e-5)


def test_unknown_weights_are_one_line(folder):
    with pytest.raises(ValueError, match="weights must be 'int8' or 'int4', or None to use dtype, got 'int2'"):
        janus_jax.load(folder, weights="int2")


@pytest.mark.parametrize(("dtype", "form", "fused"), [
    ("bfloat16", None, True), ("bfloat16", "int8", True), ("bfloat16", "int4", True), ("float32", "int4", False),
])  # fmt: skip
def test_the_device_never_holds_more_than_the_model_and_one_tensor(tmp_path, monkeypatch, dtype, form, fused):
    """Of the arrays that are alive whenever one is made, before what it is made of is freed."""
    folder = write_checkpoint(tmp_path / "model", dataclasses.replace(SIZES["tiny"], dtype="bfloat16"))
    before, seen = {id(x) for x in jax.live_arrays()}, []

    def looked(function):
        def call(*args, **kwargs):
            made = function(*args, **kwargs)
            alive = [x for x in jax.live_arrays() if id(x) not in before and not x.is_deleted()]
            seen.append(sum(array_bytes(x.shape, x.dtype) for x in alive))
            return made

        return call

    monkeypatch.setattr(jax, "block_until_ready", looked(jax.block_until_ready))
    monkeypatch.setattr(jax, "device_put", looked(jax.device_put))
    params = janus_jax.load(folder, dtype=dtype, weights=form, fused=fused, progress=False).params
    final = {path: array_bytes(x.shape, x.dtype) for path, x in flatten(params).items()}
    largest = max(final.values())
    if form:  # a kernel is read in its file's dtype, or a narrower one
        largest = max(largest, *(2 * x.size for path, x in flatten(params).items() if is_quantized(path)))
    assert len(seen) >= len(flatten(params)) and max(seen) > 0.9 * sum(final.values())
    assert max(seen) <= sum(final.values()) + largest
