"""Steps that train an adapter: its gradients, what moves, and bases of every form on every mesh."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax import hub
from janus_jax.model.janus import Janus
from janus_jax.processing.chat import Processor
from janus_jax.sharding import cast, flatten, make_mesh, unflatten
from janus_jax.weights import checkpoint
from janus_jax.weights.adapters.trainable import trainable
from janus_jax.weights.conversion import from_torch, to_torch
from janus_jax.weights.quantize import dequantized, is_quantized, quantize
from tests.library.tiny_janus import raises_one_line
from train.config import AdapterConfig, OptimizerConfig, TrainConfig
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.step import step as step_module
from train.step.init import first_state, open_sources
from train.step.leaves import abstract_leaves, first_adapter, joined
from train.step.loss import token_sums, token_values
from train.step.state import abstract_state, batch_sharding, make_optimizer
from train.validate import validate

KINDS = {
    "dora int4": AdapterConfig(rank=2, kind="dora", targets=("o_proj", "lm_head"), save=("gen_embed",), weights="int4"),
    "lora": AdapterConfig(rank=3, alpha=6, targets=("all",), save=("gen_embed", "post_attention_layernorm")),
    "rslora int8": AdapterConfig(rank=4, kind="rslora", targets=("heads", r"layers\.1\.mlp\.up_proj"), weights="int8"),
}
ORDINARY, *SLOW = KINDS
KIND_MARKS = [ORDINARY, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start")))


@pytest.fixture(scope="module")
def job(tmp_path_factory, start):
    """A config with one of KINDS, image settings and a batch; SigLIP is only there where it has an adapter."""
    folders = write_data(tmp_path_factory.mktemp("data"), count=12)
    processor = Processor.from_folder(folders["tokenizer"], MODEL)
    ids = processor.tokenizer

    @functools.cache
    def make(kind: str):
        config = tiny_config(folders, "unused", init_from=start, batch_size=4, adapter=KINDS[kind])
        if "all" not in config.adapter.targets:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, ratio=(0, 1, 2)))
        mixture = Mixture(config.data, config.batch_size, 0)
        batch = Assembler(mixture, processor.settings, ids.pad_id, ids.image_placeholder_id)(0)[0]
        return config, processor.settings, batch

    return make


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


@pytest.mark.parametrize("kind", KIND_MARKS)
def test_gradients(job, start, kind, close):
    """Those of the model with `trainable`'s leaves beside plain kernels; and on eight devices the same."""
    config, settings, batch = job(kind)
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
        total, values = token_values(Janus(MODEL), joined(trained, base), batch, settings, config.loss_chunk)
        return total / token_sums(values, batch["tasks"])["tokens"]

    loss, wanted = jax.value_and_grad(plain)(unflatten(values))
    assert sums["loss"] / sums["tokens"] == pytest.approx(float(loss), rel=1e-5)
    wanted = flatten(wanted)
    assert ours.keys() == wanted.keys()
    for path, x in wanted.items():
        close(ours[path], x, path, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("dora int4", {"fsdp": 2}),
        ("rslora int8", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("lora", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_several_devices_come_to_what_one_does(job, kind, sizes, close):
    config, settings, batch = job(kind)
    alone, *_ = gradients(config, settings, batch, {}, 1)
    apart, *_ = gradients(config, settings, batch, sizes, math.prod(sizes.values()))
    for path, x in alone.items():
        close(apart[path], x, f"{path} on {sizes}", 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KIND_MARKS)
def test_gradients_in_float16(job, kind, close):
    """Those of float32, though losses are scaled; also where that overflows, until no scale helps."""
    config, settings, batch = job(kind)
    narrow = dataclasses.replace(config, compute_dtype="float16", frozen_dtype="float16")
    wide, right, *_ = gradients(config, settings, batch, {}, 1)
    ours, sums, _, frozen = gradients(narrow, settings, batch, {}, 1)
    assert not [x for x in jax.tree.leaves(frozen) if x.dtype == jnp.bfloat16]
    assert sums["loss"] == pytest.approx(right["loss"], rel=2e-3) and sums["tokens"] == right["tokens"]
    for path, x in wide.items():
        assert ours[path].dtype == np.float32
        close(ours[path], x, path, 2e-2)


def test_losses_are_scaled_by_what_leaves_gradients_finite():
    """Down to what no scale makes finite, and only once if the loss itself is not."""
    asked = []

    def of(largest, loss, scale):
        jax.debug.callback(lambda scale: asked.append(float(scale)), scale)
        scaled = (largest * scale).astype(jnp.float16)
        return {"x": scaled, "y": jnp.float32(3) * scale}, {"loss": loss}

    @jax.jit
    def run(largest, loss):
        return step_module._scaled(functools.partial(of, largest, loss))

    for largest, loss, scales, finite in (
        (2.0, 1.0, [256], True), (3e4, 1.0, [256, 1], True), (3e6, 1.0, [256, 1, 2**-8], True),
        (np.nan, 1.0, [256, 1, 2**-8], False), (np.nan, np.inf, [256], False),
    ):  # fmt: skip
        grads, sums = jax.block_until_ready(run(np.float32(largest), np.float32(loss)))
        jax.effects_barrier()
        assert asked == scales and np.isfinite(grads["x"]) == finite and sums["loss"] == loss
        assert grads["y"] == 3 and (not finite or grads["x"] == pytest.approx(largest, rel=1e-3))
        asked.clear()


def test_only_the_adapter_moves_and_decays(job):
    config, *_ = job(ORDINARY)
    state, frozen = abstract_state(config, make_mesh({}, jax.devices()[:1]))
    trained = flatten(state.trained)
    assert {path.rpartition("/")[2] for path in trained} == {"lora_a", "lora_b", "lora_magnitude", "embedding"}
    assert all(x.dtype == np.float32 for x in trained.values())
    kept = {path.rpartition("/")[2] for path in flatten(frozen) if "lora" in path}
    assert kept == {"lora_scale", "lora_norm"}
    kernels = {path: x for path, x in flatten(frozen).items() if is_quantized(path)}
    assert kernels and all(x.dtype == jnp.int4 for x in kernels.values())
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in trained.values())

    own = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), state.trained)
    optimizer = make_optimizer(own)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(np.zeros_like, ones), optimizer.init(ones), ones)
    decays = {path for path, x in flatten(jax.device_get(updates)).items() if x.any()}
    assert decays == {path for path in trained if path.endswith(("lora_a", "lora_b", "embedding"))}


def test_kept_in_their_own_dtype():
    """In a step in bfloat16: scales and norms, and kernels in their quantized form."""
    wide = {name: jnp.ones(2) for name in ("kernel", "lora_a", "lora_b", "bias")}
    kept = {name: jnp.ones(2) for name in ("kernel_scale", "lora_scale", "lora_norm", "lora_magnitude")}
    found = cast({"x": wide | kept, "y": {"kernel": jnp.ones(2, jnp.int4)}}, "bfloat16")
    assert {name for name, x in found["x"].items() if x.dtype == jnp.bfloat16} == wide.keys()
    assert all(x.dtype == jnp.float32 for name, x in found["x"].items() if name in kept)
    assert found["y"]["kernel"].dtype == jnp.int4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 0}, "adapter.rank must be from 1 to 65536, got 0"),
        ({"alpha": 0.0}, "adapter.alpha must be above 0"),
        (
            {"targets": ("atention",)},
            "adapter.targets: 'atention' names no linear layer .*; did you mean attention",
        ),
        ({"targets": ()}, "adapter.targets is empty"),
        ({"targets": ("heads",), "save": ("gen_head", "lm_head")}, "adapter.save names all of these layers already"),
        ({"save": ("gen_heat",)}, "adapter.save: 'gen_heat' names no module of the model; did you mean gen_head"),
        ({"save": ("gen_vision_model",)}, "adapter.save: gen_vision_model is not trained with the model"),
        ({"save": ("layers.0.input_layernorm",)}, "is of 1 of its 2 layers; name it in all, as 'input_layernorm'"),
        ({"kind": "dora", "targets": (r"layers\.0\.mlp\.up_proj",)}, "a DoRA of .*up_proj must change all 2 layers"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused(job, changes, told):
    config, *_ = job(ORDINARY)
    own = dataclasses.replace(config, adapter=dataclasses.replace(AdapterConfig(), **changes))
    with raises_one_line(told):
        validate(own)


def test_what_excludes_an_adapter_is_refused(job, tmp_path):
    config, *_ = job(ORDINARY)
    with raises_one_line("stage=1 and an adapter exclude each other"):
        validate(dataclasses.replace(config, stage=1))
    with raises_one_line("init_from is empty, but an adapter changes a trained model"):
        validate(dataclasses.replace(config, init_from=""))
    language = dataclasses.replace(MODEL.language, mlp_dim=67)
    odd = dataclasses.replace(config, model=dataclasses.replace(MODEL, language=language))
    with raises_one_line("adapter.weights='int4': .*down_proj/kernel has 67 inputs .* use adapter.weights='int8'"):
        validate(odd)


def test_a_base_that_is_quantized_already(job, start, tmp_path):
    """Is read as it is if the config wants that form, and refused otherwise."""
    config, *_ = job(ORDINARY)
    to_torch(start, tmp_path / "torch", "original")
    from_torch(tmp_path / "torch", tmp_path / "int4", weights="int4")
    mesh = make_mesh({}, jax.devices()[:1])
    ready = dataclasses.replace(config, init_from=str(tmp_path / "int4"))
    (_, ours), (_, wanted) = first_state(ready, mesh), first_state(config, mesh)
    found = flatten(ours)
    assert found.keys() == flatten(wanted).keys()
    for path, x in flatten(wanted).items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    for weights in (None, "int8"):
        other = dataclasses.replace(ready, adapter=dataclasses.replace(config.adapter, weights=weights))
        with raises_one_line("init_from: .* has int4 weights; set adapter.weights=int4"):
            first_state(other, mesh)


def test_a_base_from_the_hub(job, start, monkeypatch):
    config, *_ = job(ORDINARY)
    asked = []
    monkeypatch.setattr(hub, "_download", lambda name, revision: asked.append(name) or pathlib.Path(start))
    sources = open_sources(dataclasses.replace(config, init_from="somebody/janus"))
    assert asked == ["somebody/janus"] and "language_model" in sources
    with raises_one_line("init_from: nowhere", FileNotFoundError):
        open_sources(dataclasses.replace(config, init_from="nowhere"))
