"""Int8 kernels: how near they come, what they leave alone, and that everything runs on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import MODEL, write_checkpoint
from janus_jax.model.janus import Janus
from janus_jax.sharding import flatten, make_mesh, param_shardings, unflatten
from janus_jax.weights.quantize import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("start") / "model")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_kernel_is_within_half_a_level(folder, scan_layers):
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


def hidden(model, params, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return model.apply({"params": params}, x, positions, jnp.ones(x.shape[:2], jnp.int32), method="hidden")


def test_products_are_those_of_the_rounded_kernels(folder, close):
    """The scales multiply after the product what would multiply the kernels before it."""
    params = janus_jax.load(folder, scan_layers=True, progress=False).params
    small = quantize(params)
    rounded = flatten(small)
    for path in [path for path in rounded if path.endswith("kernel_scale")]:
        scale = rounded.pop(path)
        kernel = rounded[path.removesuffix("_scale")]
        wide = scale.reshape(*scale.shape, *(1,) * (kernel.ndim - scale.ndim))
        rounded[path.removesuffix("_scale")] = kernel.astype(jnp.float32) * wide
    model, x = Janus(MODEL), jax.random.normal(jax.random.key(0), (2, 9, MODEL.language.width))
    run = jax.jit(hidden, static_argnums=0)
    ours, exact = run(model, small, x), run(model, params, x)
    close(ours, run(model, unflatten(rounded), x), "hidden states", 1e-5)
    error = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.05


def test_draws_and_answers(folder, tmp_path):
    from examples.tiny.tokenizer import write_tokenizer
    from janus_jax.processing.processor_files import TOKENIZER_FILES, copy_files

    write_tokenizer(tmp_path / "t", image_size=MODEL.vision.image_size, num_image_tokens=MODEL.vision.num_patches)
    copy_files(tmp_path / "t", folder, TOKENIZER_FILES)
    janus = janus_jax.load(folder, weights="int8", progress=False)
    assert janus.params["gen_head"]["vision_head"]["kernel"].dtype == jnp.int8
    (image,) = janus.generate_images("a red house", progress=False)
    assert image.size == (MODEL.gen_vision.image_size,) * 2
    assert isinstance(janus.chat("what is this?", max_new_tokens=4), str)


def test_on_a_mesh(folder, close):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    alone = janus_jax.load(folder, weights="int8", scan_layers=True, progress=False).params
    shared = janus_jax.load(folder, weights="int8", scan_layers=True, mesh=mesh, progress=False).params
    for path, x in flatten(alone).items():
        np.testing.assert_allclose(np.asarray(flatten(shared)[path]), np.asarray(x), rtol=1e-6, err_msg=path)
    shardings = flatten(param_shardings(alone, mesh))
    assert shardings["language_model/layers/mlp/up_proj/kernel_scale"].spec[1] == "tensor"
    x = jax.random.normal(jax.random.key(0), (2, 9, MODEL.language.width))
    with jax.set_mesh(mesh):
        ours = jax.jit(hidden, static_argnums=0)(Janus(MODEL), shared, x)
    close(ours, jax.jit(hidden, static_argnums=0)(Janus(MODEL), alone, x), "hidden states", 1e-5)


def test_unknown_weights_are_one_line(folder):
    with pytest.raises(ValueError, match="weights must be 'int8', or None to use dtype, got 'int4'"):
        janus_jax.load(folder, weights="int4")
