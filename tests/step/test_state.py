"""What each stage trains, what a run starts from, and what one step does to it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights import checkpoint
from janus_jax.weights.parts import write_part
from janus_jax.weights.torch_weights import abstract_params, read_now
from train.config import TRAINED, OptimizerConfig, TrainConfig
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.run.checkpoints import Workdir
from train.step import step as step_module
from train.step.init import first_state, open_sources
from train.step.leaves import split
from train.step.state import (
    TrainState,
    abstract_state,
    learning_rate,
    make_optimizer,
    state_shardings,
)  # fmt: skip
from train.step.step import make_train_step

PARTS = {
    "vision_model", "aligner", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head", "language_model"
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"), count=8)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start")))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def config(folders, start) -> TrainConfig:
    return tiny_config(folders, "unused", init_from=start, batch_size=4)


@pytest.fixture(scope="module")
def processor(folders) -> Processor:
    return Processor.from_folder(folders["tokenizer"], MODEL)


@pytest.fixture(scope="module")
def batch(config, processor) -> dict[str, np.ndarray]:
    t = processor.tokenizer
    mixture = Mixture(config.data, config.batch_size, 0)
    return Assembler(mixture, processor.settings, t.pad_id, t.image_placeholder_id)(0)[0]


def numpy_of(tree) -> dict[str, np.ndarray]:
    """Copies: the state is donated."""
    return {"/".join(path): x for path, x in _paths(jax.tree.map(np.array, tree))}


def _paths(tree):
    return [([str(getattr(k, "key", k)) for k in path], x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


# ---------------------------------------------------------------- what each stage trains


def test_trained_sets():
    adapters = {"aligner", "gen_aligner", "gen_embed", "gen_head"}
    assert {stage: set(parts) for stage, parts in TRAINED.items()} == {
        1: adapters,
        2: adapters | {"language_model"},
        3: adapters | {"language_model", "vision_model"},
    }
    params = abstract_params(MODEL)
    assert set(params) == PARTS
    for stage in (1, 2, 3):
        trained, frozen = split(params, stage)
        assert set(trained) == set(TRAINED[stage]) and set(trained) | set(frozen) == PARTS
        assert not set(trained) & set(frozen)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parts_own_no_optimizer_state(config, stage, mesh):
    state, frozen = abstract_state(dataclasses.replace(config, stage=stage, frozen_dtype="bfloat16"), mesh)
    trained = len(jax.tree.leaves(state.trained))
    arrays = [(path, x) for path, x in _paths(state.opt_state) if x.shape]
    assert len(arrays) == 2 * trained, "two moments for each trained array"
    assert sum(x.size for _, x in arrays) == 2 * sum(x.size for x in jax.tree.leaves(state.trained))
    assert not set(frozen) & {name for path, _ in arrays for name in path}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trained))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(frozen))


def test_moments_lie_as_their_parameters(config):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings, _ = state_shardings(config, mesh)
    of_param = {tuple(path): s for path, s in _paths(shardings.trained)}
    found = [(path, s) for path, s in _paths(shardings.opt_state) if {"mu", "nu"} & set(map(_name, path))]
    assert len(found) == 2 * len(of_param)
    for path, sharding in found:
        (own,) = (p for p in of_param if tuple(path[-len(p) :]) == p)
        assert sharding == of_param[own]
    assert any(not s.is_fully_replicated for _, s in found)


def _name(key: str) -> str:
    return key.removeprefix(".")


# ---------------------------------------------------------------- the optimizer


def test_learning_rates():
    constant = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_steps=4), 100)
    assert [float(constant(s)) for s in (0, 1, 2, 4, 5, 99)] == pytest.approx([0, 5e-4, 1e-3, 2e-3, 2e-3, 2e-3])
    assert float(learning_rate(OptimizerConfig(learning_rate=2e-3), 100)(0)) == pytest.approx(2e-3)
    cosine = learning_rate(OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20), 100)
    wanted = [0, 1e-3, 2e-3, 2e-3 * (1 + math.cos(math.pi / 4)) / 2, 1e-3, 0]
    assert [float(cosine(s)) for s in (0, 10, 20, 40, 60, 100)] == pytest.approx(wanted, abs=1e-9)


def updates_of(config: TrainConfig, params, grads):
    optimizer = make_optimizer(config)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_only_kernels_and_embeddings_decay(config):
    own = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    # Every path of the model; sizes do not matter here.
    params = jax.tree.map(lambda x: np.ones(1, np.float32), split(abstract_params(MODEL), 3)[0])
    zeros = jax.tree.map(np.zeros_like, params)
    updates = flatten(jax.jit(functools.partial(updates_of, own))(params, zeros))
    decays = {path for path, x in updates.items() if np.asarray(x).any()}
    assert decays == {path for path in updates if path.endswith(("/kernel", "/embedding"))}
    assert not any(word in path for path in decays for word in ("norm", "bias", "pos_embed"))
    for path in decays:
        np.testing.assert_allclose(updates[path], -0.05, rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_that_is_trained(config):
    o = OptimizerConfig(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e6, clip=0.5)
    params = {"a": {"kernel": jnp.zeros(4)}, "b": {"bias": jnp.zeros(4)}}
    own = dataclasses.replace(config, optimizer=o)
    for scale, norm in ((3.0, 0.5), (0.1, 0.1 * math.sqrt(8))):
        # An eps above all gradients makes Adam's update the clipped gradient over it.
        updates = updates_of(own, params, jax.tree.map(lambda x, s=scale: jnp.full_like(x, s), params))
        total = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(updates))) * 1e6
        assert total == pytest.approx(norm, rel=1e-3)


# ---------------------------------------------------------------- what a run starts from


def read(folder) -> dict[str, np.ndarray]:
    return flatten(checkpoint.load_params(folder, as_numpy=True))


def test_from_a_checkpoint(config, start, mesh):
    state, frozen = first_state(dataclasses.replace(config, stage=2, frozen_dtype="bfloat16"), mesh)
    assert (int(state.step), int(state.skipped)) == (0, 0)
    expected, found = read(start), flatten({**state.trained, **frozen})
    assert found.keys() == expected.keys()
    for path, x in found.items():
        dtype = jnp.float32 if path.split("/")[0] in TRAINED[2] else jnp.bfloat16
        assert x.dtype == dtype
        np.testing.assert_array_equal(np.asarray(x), expected[path].astype(dtype), err_msg=path)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))


def test_parts_from_elsewhere(config, start, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    base, theirs = read(start), read(other)
    params = checkpoint.load_params(other, as_numpy=True)
    for key, part in (
        ("language_from", "language_model"), ("vision_from", "vision_model"), ("vq_from", "gen_vision_model")
    ):  # fmt: skip
        write_part(tmp_path / f"{part}.safetensors", MODEL, part, params[part])
        for source in (other, tmp_path / f"{part}.safetensors"):
            sources = open_sources(dataclasses.replace(config, **{key: str(source)}))
            assert set(sources) == PARTS
            for name, leaves in sources.items():
                expected = theirs if name == part else base
                for path, leaf in leaves.items():
                    np.testing.assert_array_equal(read_now(leaf), expected["/".join(path)], err_msg=f"{key} {path}")
    # Without init_from the parts that are named, and no others.
    named = dataclasses.replace(config, init_from="", vq_from=str(other))
    assert set(open_sources(named)) == {"gen_vision_model"}


def test_from_an_earlier_run_exactly(config, mesh, tmp_path):
    """Stage 3 goes on from stage 2's float32 parameters, not from what was rounded for export."""
    earlier = dataclasses.replace(config, stage=2, workdir=str(tmp_path / "run"), frozen_dtype="bfloat16")
    state, frozen = first_state(earlier, mesh)
    # Values that bfloat16 does not hold.
    state = dataclasses.replace(state, trained=jax.tree.map(lambda x: x + 1e-4, state.trained))
    expected = numpy_of({**state.trained, **frozen})
    with Workdir(earlier, {}) as workdir:
        workdir.save_frozen(frozen)
        with pytest.raises(ValueError, match="has a run without a complete checkpoint"):
            open_sources(dataclasses.replace(config, init_from=str(tmp_path / "run")))
        workdir.save(7, state)
        workdir.wait()
    later, still = first_state(dataclasses.replace(config, init_from=str(tmp_path / "run")), mesh)
    assert int(later.step) == 0 and "vision_model" in later.trained
    found = numpy_of({**later.trained, **still})
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, expected[path].astype(np.float32), err_msg=path)


def test_frozen_parameters_of_an_unfinished_start_are_replaced(config, mesh, start, tmp_path):
    """A start that was cut off before its first checkpoint may have had another init_from."""
    own = dataclasses.replace(config, stage=1, workdir=str(tmp_path / "run"))
    _, frozen = first_state(own, mesh)
    with Workdir(own, {}) as workdir:
        workdir.save_frozen(jax.tree.map(lambda x: x + 1, frozen))
    with Workdir(own, {}) as workdir:
        assert workdir.latest is None
        workdir.save_frozen(frozen)
    wanted = split(abstract_params(MODEL), 1)[1]
    leaves = checkpoint.array_leaves(tmp_path / "run" / "frozen", wanted)
    for path, x in flatten(frozen).items():
        np.testing.assert_array_equal(read_now(leaves[tuple(path.split("/"))]), np.asarray(x), err_msg=path)


@pytest.mark.parametrize(
    "changes, kind, told",
    [
        ({"init_from": "nowhere"}, FileNotFoundError, "init_from: nowhere"),
        ({"init_from": "tests"}, (FileNotFoundError, ValueError), "tests"),
        ({"vision_from": "nowhere.pt"}, FileNotFoundError, "vision_from: nowhere.pt does not exist"),
        ({"vq_from": "README.md"}, ValueError, "vq_from: README.md"),
        ({"language_from": "tests"}, (FileNotFoundError, ValueError), "language_from: "),
    ],
)
def test_bad_sources_are_told_in_one_line(config, changes, kind, told):
    with pytest.raises(kind) as caught:
        open_sources(dataclasses.replace(config, **changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_other_sizes_are_told(config, start, tmp_path):
    language = dataclasses.replace(MODEL.language, mlp_dim=72, layers=3)
    own = dataclasses.replace(config, model=dataclasses.replace(MODEL, language=language))
    with pytest.raises(ValueError, match=r"init_from: .*language\.mlp_dim is 64, the config's model has 72"):
        open_sources(own)
    with pytest.raises(
        ValueError,
        match=r"language_from: .* has a language_model of another model: mlp_dim is 64, the config's model has 72",
    ):
        open_sources(dataclasses.replace(own, init_from="", language_from=start))
    write_part(tmp_path / "l.safetensors", MODEL, "language_model", checkpoint.load_params(start)["language_model"])
    with pytest.raises(ValueError, match=r"language_from: .*does not contain the language_model .*: missing"):
        open_sources(dataclasses.replace(own, init_from="", language_from=str(tmp_path / "l.safetensors")))


# ---------------------------------------------------------------- steps


@functools.cache
def _step(config: TrainConfig, mesh, settings):
    return make_train_step(config, mesh, settings)


def take_steps(config, mesh, settings, batch, count: int = 2):
    state, frozen = first_state(config, mesh)
    before = numpy_of({**state.trained, **frozen})
    with jax.set_mesh(mesh):
        for _ in range(count):
            state, metrics = _step(config, mesh, settings)(state, frozen, batch)
    return before, state, frozen, metrics


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_stage_moves(config, mesh, processor, batch, stage):
    own = dataclasses.replace(config, stage=stage)
    before, state, frozen, metrics = take_steps(own, mesh, processor.settings, batch)
    after = numpy_of({**state.trained, **frozen})
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path.split("/")[0] for path in moved} == set(TRAINED[stage])
    assert all(path in moved for path in before if path.split("/")[0] in TRAINED[stage])
    assert (int(state.step), int(state.skipped), float(metrics["finite"])) == (2, 0, 1.0)
    assert metrics["learning_rate"] == pytest.approx(1.5e-3) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_out(config, mesh, processor, batch, poison):
    _, state, frozen, _ = take_steps(config, mesh, processor.settings, batch)
    bad = {**frozen, "gen_vision_model": frozen["gen_vision_model"]}
    # gen_embed is read by the batch's codes: what is poisoned reaches loss and gradients.
    embedding = state.trained["gen_embed"]["embedding"]
    trained = {**state.trained, "gen_embed": {"embedding": jnp.full_like(embedding, poison)}}
    before, moments = numpy_of(trained), numpy_of(state.opt_state)
    step = _step(config, mesh, processor.settings)
    with jax.set_mesh(mesh):
        poisoned = jax.device_put(
            TrainState(state.step, trained, state.opt_state, state.skipped), state_shardings(config, mesh)[0]
        )
        after, metrics = step(poisoned, bad, batch)
    assert float(metrics["finite"]) == 0
    assert (int(after.step), int(after.skipped)) == (3, 1)
    for path, x in numpy_of(after.trained).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    for path, x in numpy_of(after.opt_state).items():
        np.testing.assert_array_equal(x, moments[path], err_msg=path)
    # The run goes on: the next good step is an update, at the rate that was due.
    with jax.set_mesh(mesh):
        healed = {**after.trained, "gen_embed": {"embedding": jnp.ones_like(after.trained["gen_embed"]["embedding"])}}
        healed = jax.device_put(dataclasses.replace(after, trained=healed), state_shardings(config, mesh)[0])
        last, metrics = step(healed, frozen, batch)
    assert float(metrics["finite"]) == 1 and (int(last.step), int(last.skipped)) == (4, 1)
    assert metrics["learning_rate"] == pytest.approx(3e-3)


@pytest.mark.slow
def test_parts_of_a_step_add_up(config, mesh, processor, batch):
    """accumulate=2 gives the gradients of the whole batch."""
    config = dataclasses.replace(config, stage=1)
    state, frozen = first_state(config, mesh)
    results = []
    for accumulate in (1, 2):
        own = dataclasses.replace(config, accumulate=accumulate)
        gradients = jax.jit(functools.partial(step_module.gradients, own, mesh, processor.settings))
        with jax.set_mesh(mesh):
            results.append(jax.device_get(gradients(state.trained, frozen, batch)))
    (whole, sums), (parts, part_sums) = results
    assert part_sums["tokens"] == sums["tokens"] > 0
    assert part_sums["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    expected = flatten(whole)
    for path, x in flatten(parts).items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected[path], atol=1e-5 * max(1.0, np.abs(expected[path]).max()), err_msg=path)
