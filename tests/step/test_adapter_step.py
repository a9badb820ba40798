"""Steps that train an adapter: its gradients, what moves, and bases of every form on every mesh."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.model.janus import Janus
from janus_jax.processing.chat import Processor
from janus_jax.sharding import flatten, make_mesh, unflatten
from janus_jax.weights import checkpoint
from janus_jax.weights.adapters.trainable import trainable
from janus_jax.weights.quantize import dequantized, is_quantized, quantize
from train.config import AdapterConfig, TrainConfig
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.step import step as step_module
from train.step.init import first_state
from train.step.leaves import abstract_leaves, first_adapter, joined
from train.step.loss import loss_sums, token_losses
from train.step.state import batch_sharding

KINDS = {
    "lora": AdapterConfig(rank=3, alpha=6, targets=("all",), save=("gen_embed", "post_attention_layernorm")),
    "dora int8": AdapterConfig(rank=2, kind="dora", targets=("decoder",), weights="int8"),
    "rslora int4": AdapterConfig(rank=4, kind="rslora", targets=("heads", r"layers\.1\.mlp\.up_proj"), weights="int4"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start")))


@pytest.fixture(scope="module")
def job(tmp_path_factory, start):
    folders = write_data(tmp_path_factory.mktemp("data"), count=12)
    config = tiny_config(folders, "unused", init_from=start)
    processor = Processor.from_folder(folders["tokenizer"], MODEL)
    ids = processor.tokenizer
    mixture = Mixture(config.data, config.batch_size, 0)
    batch = Assembler(mixture, processor.settings, ids.pad_id, ids.image_placeholder_id)(0)[0]
    return config, processor.settings, batch


def with_adapter(config: TrainConfig, kind: str, **changes) -> TrainConfig:
    return dataclasses.replace(config, adapter=KINDS[kind], **changes)


def moved(trained):
    """Trained leaves away from their start, at which `b` is zero and so are the gradients of `a`."""
    rng = np.random.default_rng(1)
    return {
        path: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
        for path, x in sorted(flatten(jax.device_get(trained)).items())
    }


@functools.cache
def _gradients(config: TrainConfig, mesh, settings):
    return jax.jit(functools.partial(step_module.gradients, config, mesh, settings))


def gradients(config, settings, batch, sizes, count):
    mesh = make_mesh(sizes, jax.devices()[:count])
    state, frozen = first_state(config, mesh)
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), unflatten(moved(state.trained)), state.trained
    )
    rows = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
    with jax.set_mesh(mesh):
        grads, sums = _gradients(config, mesh, settings)(placed, frozen, rows)
    return flatten(jax.device_get(grads)), jax.device_get(sums), state, frozen


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(job, start, kind, close):
    """Those of the model with `trainable`'s leaves beside plain kernels; and on eight devices the same."""
    config, settings, batch = job
    config = with_adapter(config, kind)
    ours, sums, state, frozen = gradients(config, settings, batch, {}, 1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (state.trained, frozen)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_leaves(config)
    )

    params = checkpoint.load_params(start)
    if config.adapter.weights:
        flat = flatten(quantize(params, config.adapter.weights))
        params = unflatten(
            {path: dequantized(path, flat) if is_quantized(path) else x for path, x in flatten(params).items()}
        )
    own, fixed = trainable(params, first_adapter(config))
    values = moved(state.trained)
    assert flatten(own).keys() <= values.keys()
    base = joined(fixed, params)

    @jax.jit
    def plain(trained):
        losses = token_losses(Janus(MODEL), joined(trained, base), batch, settings, config.loss_chunk)
        sums = loss_sums(losses, batch["tasks"])
        return sums["loss"] / sums["tokens"]

    loss, wanted = jax.value_and_grad(plain)(unflatten(values))
    assert sums["loss"] / sums["tokens"] == pytest.approx(float(loss), rel=1e-5)
    wanted = flatten(wanted)
    assert ours.keys() == wanted.keys()
    for path, x in wanted.items():
        close(ours[path], x, path, 1e-5)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("rslora int4", {"fsdp": 2}),
        pytest.param("dora int8", {"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param("lora", {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_several_devices_come_to_what_one_does(job, kind, sizes, close):
    config, settings, batch = job
    config = with_adapter(config, kind)
    alone, *_ = gradients(config, settings, batch, {}, 1)
    apart, *_ = gradients(config, settings, batch, sizes, math.prod(sizes.values()))
    for path, x in alone.items():
        close(apart[path], x, f"{path} on {sizes}", 2e-5)
