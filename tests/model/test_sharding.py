"""The sharding table and its rules, and the model on meshes of eight CPU devices against one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax import sharding
from janus_jax.config import PRESETS, JanusConfig
from janus_jax.model.janus import Janus, init_params
from janus_jax.model.kv_cache import grow_cache, init_cache
from janus_jax.sampling.images import generate_codes
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.text import embed_prompt, generate_tokens
from janus_jax.sharding import (
    MESH_AXES,
    PARAMETER_AXES,
    RULES,
    activation_spec,
    axes_by_hand,
    batch_shards,
    constrain,
    flatten,
    logical_axes,
    make_mesh,
    param_shardings,
    unflatten,
)
from janus_jax.weights.fuse import fuse
from janus_jax.weights.torch_weights import read_params
from train.config import MeshConfig

MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
MESHES = [{"data": 8}, {"fsdp": 8}, MIXED, {"tensor": 4, "data": 2}]
FEW = [MIXED]  # the others are slow


@pytest.fixture(scope="module")
def abstract():
    """Shapes of the parameters of a preset, layers stacked or apart, made without memory."""

    @functools.cache
    def make(config: JanusConfig, scan_layers: bool):
        model = Janus(config, scan_layers=scan_layers)
        return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))

    return lambda name, scan_layers=True: make(PRESETS[name], scan_layers)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_matches_one_row(abstract, name, scan_layers):
    for path, leaf in flatten(abstract(name, scan_layers)).items():
        axes = logical_axes(path, leaf.ndim)  # raises unless exactly one row matches
        assert len(axes) == leaf.ndim


def test_every_row_is_used(abstract):
    stacked, apart = abstract("janus_tiny"), abstract("janus_tiny", scan_layers=False)
    paths = [path for tree in (stacked, apart, jax.eval_shape(fuse, stacked)) for path in flatten(tree)]
    for pattern, _ in PARAMETER_AXES:
        assert any(re.fullmatch(pattern, path) for path in paths), f"no parameter matches {pattern}"


@pytest.mark.parametrize(
    "path", ["language_model/layers/self_attn/z_proj/kernel", "head/kernel", "aligner/layers_0/kernel/extra", ""]
)
def test_unknown_path(path):
    with pytest.raises(ValueError, match="must match exactly one row of the sharding table, got 0"):
        logical_axes(path, 2)


def test_wrong_number_of_axes():
    with pytest.raises(ValueError, match="has 3 axes, but 2 in the sharding table"):
        logical_axes("language_model/lm_head/kernel", 3)


def test_flatten_round_trip(abstract):
    tree = abstract("janus_tiny")
    flat = flatten(tree)
    assert len(flat) == len(jax.tree.leaves(tree))
    assert jax.tree.structure(unflatten(flat)) == jax.tree.structure(tree)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_presets_divide_the_meshes(abstract, name, shape):
    """On every mesh each device holds its share: all that is large is split over fsdp and tensor."""
    mesh = make_mesh(shape)
    tree = abstract(name)
    shardings = param_shardings(tree, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(tree)
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    whole = split = 0
    for path, leaf in flatten(tree).items():
        sharding = flatten(shardings)[path]
        shard = np.prod(sharding.shard_shape(leaf.shape))
        language = path.startswith("language_model/") and leaf.ndim > 2
        if language:
            assert shard * ways == leaf.size, f"{path} {leaf.shape} is held as {sharding.shard_shape(leaf.shape)}"
        whole, split = whole + leaf.size, split + shard
    if name == "janus_pro_7b":
        assert split < 1.1 * whole / ways


def test_mesh_that_does_not_divide(abstract):
    with pytest.raises(
        ValueError, match=r"does not divide the model.*self_attn/k_proj/kernel.*kv_heads 4 over tensor=8"
    ):
        param_shardings({"language_model": abstract("janus_tiny")["language_model"]}, make_mesh({"tensor": 8}))
    with pytest.raises(ValueError, match=r"and \d+ more"):
        param_shardings(abstract("janus_tiny"), make_mesh({"tensor": 8}))


# ---------------------------------------------------------------- meshes


def test_make_mesh():
    assert dict(make_mesh().shape) == {"slices": 1, "data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh({"tensor": 2, "fsdp": -1}).shape) == {"slices": 1, "data": 1, "fsdp": 4, "tensor": 2}
    assert dict(make_mesh({"data": -1}).shape) == {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh({}, jax.devices()[:1]).shape) == {"slices": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert make_mesh().axis_names == MESH_AXES


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"fsdp": 3}, "fsdp=3.*8 devices"),
        ({"data": 2}, "8 devices"),
        ({"data": 16}, "8 devices"),
        ({"data": 0, "fsdp": -1}, "data=0"),
        ({"data": -1, "fsdp": -1}, "fsdp=-1"),
        ({"data": 3, "fsdp": -1}, "data=3"),
        ({"data": -2, "fsdp": -4}, "fsdp=-4"),
        ({"model": 8}, "'model' is unknown; known: slices, data, fsdp, tensor"),
    ],
)
def test_make_mesh_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_the_contract_is_one():
    """What a new axis has to be named in agrees, and what the tables name exists."""
    assert [field.name for field in dataclasses.fields(MeshConfig)] == list(MESH_AXES)
    assert {name for _, axes in PARAMETER_AXES for name in axes} - {None} <= RULES.keys()
    named = [(rule,) if isinstance(rule, str) else rule for rule in RULES.values()]
    assert {axis for axes in named for axis in axes} == set(MESH_AXES)
    for name in (*MESH_AXES, *RULES):
        assert f"`{name}`" in sharding.__doc__ or f'"{name}"' in sharding.__doc__, name


def test_axes_by_hand():
    assert axes_by_hand(make_mesh({"data": 2, "fsdp": -1})) == set(MESH_AXES)
    assert axes_by_hand(make_mesh({"tensor": 2, "fsdp": -1})) == {"slices", "data", "fsdp"}


def test_batch_shards():
    assert batch_shards(None) == 1
    assert [batch_shards(make_mesh(shape)) for shape in MESHES] == [8, 8, 4, 2]


def test_activation_spec():
    """A dimension is split where its mesh axes divide it, and stays whole where they do not."""
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    spec = activation_spec((8, 5, 6), ("batch", None, "heads"), shape)
    assert spec == PartitionSpec(("data", "fsdp"), None, ("tensor",))
    assert activation_spec((2, 5, 3), ("batch", None, "heads"), shape) == PartitionSpec(None, None, None)
    assert activation_spec((4, 3), ("batch", "heads"), {"data": 4}) == PartitionSpec(("data",), None)


def test_constrain():
    x = jnp.zeros((8, 4))
    assert constrain(x, "batch", "heads") is x
    mesh = make_mesh({"data": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", "heads"))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", "tensor")), 2)


# ---------------------------------------------------------------- the model on a mesh


@pytest.fixture(
    scope="module",
    params=[shape if shape in FEW else pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES],
    ids=str,
)
def mesh(request):
    return make_mesh(request.param)


@pytest.fixture(scope="module")
def placed(tiny, mesh):
    return jax.device_put(tiny.params, param_shardings(tiny.params, mesh))


@pytest.fixture(scope="module")
def prompts(tiny):
    rng = np.random.default_rng(5)
    ids = rng.integers(5, 500, (8, 2, 7)).astype(np.int32)
    mask = np.ones_like(ids, bool)
    mask[3, :, :2] = False
    return ids, mask, jax.random.split(jax.random.key(1), 8)


def on(mesh, *arrays):
    """Batches laid on the mesh as the loops take them; whole where the mesh does not divide them."""
    specs = [activation_spec(a.shape, ("batch",) + (None,) * (a.ndim - 1), mesh.shape) for a in arrays]
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]


@pytest.fixture(scope="module")
def codes_of(tiny, prompts):
    """Codes and logits drawn for the first `count` prompts, on a mesh or on one device."""

    def draw(count: int, mesh=None, params=tiny.params):
        arrays = [a[:count] for a in prompts]
        settings = {"sampler": make_sampler(1.0), "keep_logits": True}
        if mesh is None:
            return generate_codes(tiny.model, params, *arrays, **settings)
        with jax.set_mesh(mesh):
            return generate_codes(tiny.model, params, *on(mesh, *arrays), **settings)

    one_device = functools.cache(draw)
    return lambda count, *place: draw(count, *place) if place else one_device(count)


def test_codes_on_a_mesh(mesh, placed, codes_of, close):
    """Token for token those of one device."""
    codes, logits = codes_of(8)
    sharded, sharded_logits = codes_of(8, mesh, placed)
    assert len({tuple(row) for row in np.asarray(codes)}) == 8
    close(sharded_logits, logits, "sharded logits", 1e-5)
    np.testing.assert_array_equal(sharded, codes)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MIXED], ids=str, indirect=True)
def test_codes_of_a_batch_that_the_mesh_does_not_divide(mesh, placed, codes_of):
    np.testing.assert_array_equal(codes_of(3, mesh, placed)[0], codes_of(3)[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MIXED], ids=str, indirect=True)
def test_encoders_on_a_mesh(tiny, mesh, placed, rng, close):
    """SigLIP with its adapter, and VQ decode."""
    v, g = tiny.config.vision.image_size, tiny.config.gen_vision
    pixels = rng.uniform(-1, 1, (8, v, v, 3)).astype(np.float32)
    codes = rng.integers(0, g.codebook_size, (8, g.num_tokens))

    @jax.jit
    def run(params, pixels, codes):
        decoded = tiny.model.apply({"params": params}, codes, method="decode_codes")
        return tiny.model.apply({"params": params}, pixels, method="embed_images"), decoded

    features, decoded = run(tiny.params, pixels, codes)
    with jax.set_mesh(mesh):
        sharded_features, sharded_decoded = run(placed, *on(mesh, pixels, codes))
    assert not sharded_decoded.sharding.is_fully_replicated
    close(sharded_features, features, "aligned features", 1e-5)
    close(sharded_decoded, decoded, "decoded images", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MIXED], ids=str, indirect=True)
def test_text_on_a_mesh(tiny, mesh, placed, prompts, rng):
    """One chat, which no mesh axis divides, with an image in it."""
    v, placeholder = tiny.config.vision, tiny.config.language.vocab_size - 1
    ids = np.array([[1, 2, *[placeholder] * v.num_patches, 7, 8]])
    pixels = rng.uniform(-1, 1, (1, 1, v.image_size, v.image_size, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 1)

    def answer(params, *arrays):
        x = embed_prompt(tiny.model, params, arrays[0], arrays[0] == placeholder, arrays[1])
        mask = jnp.ones(ids.shape, bool)
        return np.asarray(generate_tokens(tiny.model, params, x, mask, keys, eos_id=-1, max_new_tokens=8))

    expected = answer(tiny.params, jnp.asarray(ids), jnp.asarray(pixels))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(answer(placed, *on(mesh, ids, pixels)), expected)


@pytest.mark.parametrize("mesh", [MIXED], ids=str, indirect=True)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_cache_grows_where_it_lies(mesh, scan_layers):
    def cache(slots: int, value: int):
        empty = init_cache(PRESETS["janus_tiny"].language, 8, slots, jnp.float32, scan_layers)
        return jax.tree.map(lambda x: x + value, empty)

    with jax.set_mesh(mesh):
        small, large = (jax.jit(cache, static_argnums=(0, 1))(*given) for given in ((6, 1), (10, 0)))
        grown = grow_cache(small, 10)
    assert all(x.is_deleted() for x in (*small.keys, *small.values, small.mask))
    for name in ("keys", "values", "mask"):
        for new, like in zip(jax.tree.leaves(getattr(grown, name)), jax.tree.leaves(getattr(large, name)), strict=True):
            assert new.shape == like.shape and new.sharding.is_equivalent_to(like.sharding, new.ndim)
            assert not new.sharding.is_fully_replicated
            axis = 1 if name == "mask" else -2
            np.testing.assert_array_equal(np.take(new, range(6), axis), 1)
            np.testing.assert_array_equal(np.take(new, range(6, 10), axis), 0)


def test_read_params_onto_a_mesh(tiny, mesh, placed):
    """A checkpoint read with shardings is the one that was read and then placed."""
    params, _ = read_params(tiny.folder, tiny.config, dtype="float32", shardings=param_shardings(tiny.params, mesh))
    for path, leaf in flatten(params).items():
        expected = flatten(placed)[path]
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim), path
        np.testing.assert_array_equal(leaf, expected)
