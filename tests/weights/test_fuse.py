"""Fused kernels: the same numbers, whatever else is done to the parameters."""

import functools

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import MODEL, write_checkpoint
from janus_jax.model.janus import Janus, init_params
from janus_jax.sharding import flatten, make_mesh, param_shardings
from janus_jax.weights.fuse import fuse, fusible
from janus_jax.weights.quantize import quantize
from janus_jax.weights.torch_weights import abstract_params
from tests.conftest import SIZES

CONFIG = SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("start") / "model", CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, x):
    positions = jax.numpy.broadcast_to(jax.numpy.arange(x.shape[1]), x.shape[:2])
    return model.apply({"params": params}, x, positions, jax.numpy.ones(x.shape[:2], "int32"), method="hidden")


def both(folder, **settings):
    """The pipeline with fused kernels, and with kernels apart."""
    return [janus_jax.load(folder, fused=fused, progress=False, **settings) for fused in (True, False)]


@pytest.mark.parametrize(
    ("scan_layers", "weights"),
    [
        (False, "int8"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((True, None), (True, "int8"), (True, "int4"), (False, None), (False, "int4"))
        ),
    ],
)
def test_hidden_states(folder, close, scan_layers, weights):
    fused, apart = both(folder, scan_layers=scan_layers, weights=weights)
    assert fused.model.fused and not apart.model.fused
    x = jax.random.normal(jax.random.key(0), (2, 7, CONFIG.language.width))
    ours, theirs = (hidden(janus.model, janus.params, x) for janus in (fused, apart))
    close(ours, theirs, "hidden states", 1e-6)
    assert sum(x.nbytes for x in jax.tree.leaves(fused.params)) == sum(x.nbytes for x in jax.tree.leaves(apart.params))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_parameters_are_those_that_the_model_makes(scan_layers):
    params = abstract_params(CONFIG, scan_layers)
    ours = jax.eval_shape(fuse, params)
    model = Janus(CONFIG, scan_layers=scan_layers, fused=True)
    made = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(lambda x: x.shape, made)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_fusing_and_quantizing_in_either_order(folder, form):
    params = janus_jax.load(folder, fused=False, progress=False).params
    one, other = flatten(fuse(quantize(params, form))), flatten(quantize(fuse(params), form))
    assert set(one) == set(other)
    for path, x in one.items():
        np.testing.assert_array_equal(x, other[path], err_msg=path)


def test_on_a_mesh(folder, close):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    shared = janus_jax.load(folder, fused=True, scan_layers=True, mesh=mesh, progress=False)
    wanted = flatten(param_shardings(shared.params, mesh))
    for path, x in flatten(shared.params).items():
        assert x.sharding.is_equivalent_to(wanted[path], x.ndim), path
    assert wanted["language_model/layers/mlp/gate_up_proj/kernel"].spec[2] == "tensor"
    alone = janus_jax.load(folder, fused=False, scan_layers=True, progress=False)
    x = jax.random.normal(jax.random.key(0), (2, 7, CONFIG.language.width))
    with jax.set_mesh(mesh):
        ours = hidden(shared.model, shared.params, x)
    close(ours, hidden(alone.model, alone.params, x), "hidden states", 1e-5)


def test_heads_that_share_keys_stay_apart(tmp_path):
    assert not fusible(MODEL.language)
    folder = write_checkpoint(tmp_path / "model")
    with pytest.raises(
        ValueError, match="fused=True: 4 heads and 2 key/value heads cannot be one kernel; leave it out"
    ):
        janus_jax.load(folder, fused=True)
