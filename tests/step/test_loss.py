"""The training loss: against transformers' port, and what packing, accumulation and recomputation must not change."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from examples.tiny import run as tiny_run
from janus_jax.config import LlamaConfig
from janus_jax.model.janus import Janus
from janus_jax.model.llama import Llama
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import ImageSettings, understanding_pixels, understanding_pixels_uint8
from janus_jax.sharding import make_mesh
from janus_jax.weights.torch_weights import read_params
from train.config import KINDS, REMATS, TASKS, TRAINED
from train.data.batches import Assembler
from train.data.mixture import Item, Plan
from train.data.packing import pack
from train.data.prepared import open_prepared
from train.plan.executed import executed_flops
from train.step.leaves import split
from train.step.loss import PER_TOKEN, combined, cross_entropy, normalize, summed_cross_entropy, token_values
from train.step.step import gradients

# transformers' port wants the head as wide as the decoder.
MODEL = dataclasses.replace(tiny_run.MODEL, gen_head_width=tiny_run.MODEL.language.width)
ROWS, CONTEXT = 4, 128
CODES = MODEL.gen_vision.num_tokens


@dataclasses.dataclass(frozen=True)
class Run:
    """One mixed step of a run: its samples, how they become rows, and our model beside the oracle's."""

    config: object
    assembler: Assembler
    items: list[Item]
    oracle: types.ModuleType
    torch_model: object
    trained: dict
    frozen: dict

    def batch(self, rows: list[list[Item]]) -> dict[str, np.ndarray]:
        """The arrays of `rows`, as the real assembler makes them."""
        mixture = types.SimpleNamespace(
            data=self.config.data, ratio=dict(zip(KINDS, self.config.data.ratio, strict=True)),
            plan=lambda step: Plan(rows, 1, 0),
        )  # fmt: skip
        batch, report = dataclasses.replace(self.assembler, mixture=mixture)(0)
        assert not report["problems"]
        return batch

    @functools.cached_property
    def packed_rows(self) -> list[list[Item]]:
        lengths, images = ([getattr(item, name) for item in self.items] for name in ("length", "images"))
        rows = pack(lengths, images, ROWS, CONTEXT, self.config.data.images_per_row)
        assert max(map(len, rows)) > 1
        return [[self.items[i] for i in row] for row in rows]

    @functools.cached_property
    def packed(self) -> dict[str, np.ndarray]:
        return self.batch(self.packed_rows)

    @functools.cached_property
    def grads(self):
        """Gradients of the summed loss, and the sums, of any batch of ROWS rows; compiled once."""
        return self.compile(self.config)

    def compile(self, config):
        mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        compiled = jax.jit(functools.partial(gradients, config, mesh, self.assembler.settings))

        def run(batch):
            grads, sums = jax.device_get(compiled(self.trained, self.frozen, batch))
            return jax.tree.map(lambda g: g * sums["tokens"], grads), sums

        return run

    @functools.cached_property
    def losses(self):
        """Loss of each token of any batch of ROWS rows; compiled once."""
        model, params = Janus(MODEL), {**self.trained, **self.frozen}
        compiled = jax.jit(lambda batch: token_values(model, params, batch, self.assembler.settings, 32)[1]["loss"])
        return lambda batch: np.asarray(compiled(batch))


@pytest.fixture(scope="module")
def run(tmp_path_factory, oracle) -> Run:
    folder = tmp_path_factory.mktemp("loss")
    paths = tiny_run.write_data(folder, count=6)
    config = tiny_run.tiny_config(paths, folder / "run", model=MODEL, batch_size=ROWS)
    assert config.data.text_loss == "all" and config.data.context == CONTEXT
    processor = Processor.from_folder(paths["tokenizer"], MODEL)
    tokenizer = processor.tokenizer
    assembler = Assembler(None, processor.settings, tokenizer.pad_id, tokenizer.image_placeholder_id)

    def item(kind: str, index: int, **changes) -> Item:
        opened = open_prepared(paths[kind])
        return Item(kind, opened, index, int(opened.lengths[index]), int(opened.images[index]), **changes)

    items = [item("understanding", i) for i in (2, 3)] + [item("text", i) for i in (2, 3)]
    items += [item("generation", 0), item("generation", 1, unconditional=True), item("generation", 2, cut=True)]
    torch_model = oracle.build(MODEL)
    torch_model.save_pretrained(folder / "model")
    params, _ = read_params(folder / "model", MODEL, dtype="float32")
    return Run(config, assembler, items, oracle, torch_model, *split(params, 3))


def assert_close(ours, oracle, tolerance: float, what: str = ""):
    """Every leaf within `tolerance` of the other's, as a part of that leaf's largest value."""
    ours, oracle = (traverse_util.flatten_dict(tree, sep="/") for tree in (ours, oracle))
    assert ours.keys() == oracle.keys()
    problems = []
    for name, wanted in oracle.items():
        # The gradient of keys' biases is nothing but rounding: softmax does not see what all scores share.
        scale = np.abs(oracle[name.replace("attn/k/bias", "attn/k/kernel")]).max()
        assert ours[name].shape == wanted.shape, name
        error = np.abs(np.asarray(ours[name], np.float64) - wanted).max()
        if error > tolerance * scale:
            problems.append(f"{what} {name} is off by {error:.1e} of {scale:.1e}")
    assert not problems, "\n".join(problems)


def torch_sums(run: Run) -> dict[str, tuple]:
    """Of each kind: (summed loss as a tensor, target tokens), sample by sample without packing."""
    tokenizer_pad, placeholder = run.assembler.pad_id, run.assembler.placeholder_id
    sums = {}
    for item in run.items:
        sample = item.folder[item.index]
        ids = sample.short_ids if item.cut else sample.ids
        assert len(ids) > 3
        if item.unconditional:
            ids = ids.copy()
            ids[1:-1] = tokenizer_pad
        pixels = np.array([understanding_pixels(image, run.assembler.settings) for image in sample.images])
        losses = run.oracle.sequence_losses(run.torch_model, ids, sample.codes, pixels, ids == placeholder)
        if item.kind == "understanding":
            losses = losses[sample.answers[1:]]
        elif item.kind == "generation":
            losses = losses[len(ids) - 1 :]  # the first one is predicted at begin_of_image
            assert len(losses) == CODES
        loss, tokens = sums.get(item.kind, (0.0, 0))
        sums[item.kind] = loss + losses.sum(), tokens + len(losses)
    return sums


def test_loss_and_gradients_of_each_task_and_of_all_are_transformers(run):
    expected = torch_sums(run)
    assert expected.keys() == set(KINDS)
    expected["all"] = sum(loss for loss, _ in expected.values()), sum(tokens for _, tokens in expected.values())
    for kind, (loss, tokens) in expected.items():
        tasks = run.packed["tasks"]
        if kind in KINDS:
            tasks = np.where(tasks == TASKS[kind], tasks, 0)
        grads, sums = run.grads(run.packed | {"tasks": tasks})
        assert sums["tokens"] == tokens
        np.testing.assert_allclose(sums["loss"], loss.item(), rtol=1e-5)
        of_torch = run.oracle.gradients(run.torch_model, MODEL, loss, TRAINED[3])
        assert set(grads) == set(TRAINED[3])
        assert_close(grads, of_torch, 1e-5, kind)
        if kind == "all":
            assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_torch))
            for name, (loss, tokens) in expected.items():
                if name in KINDS:
                    np.testing.assert_allclose(sums[f"loss_{name}"], loss.item(), rtol=1e-5)
                    assert sums[f"tokens_{name}"] == tokens


def test_the_first_code_of_an_image_is_learned_at_begin_of_image(run):
    batch, begin = run.packed, run.items[4].folder[0].ids[-1]
    learned = batch["tasks"] == TASKS["generation"]
    assert learned.sum() == 3 * CODES
    first = learned & (batch["ids"] == begin) & ~batch["is_code"]
    assert first.sum() == 3 and not (learned & ~batch["is_code"] & ~first).any()
    losses = run.losses(batch)
    assert (losses[first] > 0).all()
    row, column = np.argwhere(first)[0]
    other = {name: array.copy() for name, array in batch.items()}
    other["targets"][row, column] = (batch["targets"][row, column] + 1) % MODEL.gen_vision.codebook_size
    changed = run.losses(other) != losses
    assert changed[row, column] and changed.sum() == 1


def test_a_packed_batch_is_the_sum_of_its_samples(run):
    grads, sums = run.grads(run.packed)
    alone = [[item] for item in run.items] + [[]] * (-len(run.items) % ROWS)
    parts = [run.grads(run.batch(alone[i : i + ROWS])) for i in range(0, len(alone), ROWS)]
    total_grads, total_sums = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for name, value in sums.items():
        np.testing.assert_allclose(total_sums[name], value, rtol=1e-6, err_msg=name)
    assert_close(total_grads, grads, 1e-5)


def test_other_samples_of_a_row_change_nothing(run):
    """To the last bit, whatever of a neighbor changes: its words, its image, its codes."""
    batch, losses = run.packed, run.losses(run.packed)
    rng = np.random.default_rng(0)
    tried = set()
    for row, items in enumerate(run.packed_rows):
        image = 0
        for segment, item in enumerate(items, 1):
            own = np.zeros(losses.shape, bool)
            own[row] = batch["segment_ids"][row] == segment
            words = own & ~batch["is_image"] & ~batch["is_code"]
            changes = {"ids": (words, 400), "codes": (own & batch["is_code"], CODES)} if len(items) > 1 else {}
            for what, (where, most) in changes.items():
                if where.any():
                    other = batch | {"ids": np.where(where, rng.integers(0, most, losses.shape), batch["ids"])}
                    check_only(own, losses, run.losses(other))
                    tried.add(what)
            if item.images and len(items) > 1:
                other = batch | {"images": batch["images"].copy()}
                other["images"][row, image : image + item.images] ^= 255
                check_only(own, losses, run.losses(other))
                tried.add("images")
            image += item.images
    assert tried == {"ids", "codes", "images"}


def check_only(own, before, after):
    assert (before != after)[own].any()
    np.testing.assert_array_equal(before[~own], after[~own])


@pytest.mark.slow
def test_accumulation_changes_nothing(run):
    grads, sums = run.grads(run.packed)
    in_parts, its_sums = run.compile(dataclasses.replace(run.config, accumulate=2))(run.packed)
    for name, value in sums.items():
        np.testing.assert_allclose(its_sums[name], value, rtol=1e-6, err_msg=name)
    assert_close(in_parts, grads, 1e-5)


def test_a_batch_without_targets_has_no_gradient(run):
    grads, sums = run.grads(run.packed | {"tasks": np.zeros_like(run.packed["tasks"])})
    assert not any(sums.values()) and not any(leaf.any() for leaf in jax.tree.leaves(grads))
    assert combined([sums]) == {f"tokens{name}": 0 for name in ("", *(f"_{kind}" for kind in KINDS))}


def test_metrics_of_several_steps_are_one_number_each():
    """Losses by their tokens, left-out updates aside; counts summed; whatever else a step reports is averaged."""
    names = ("loss", "accuracy", "tokens", "loss_text", "tokens_text", "finite", "norm", "loss_scale")
    numbers = [(6, 3, 3, 2, 1, 1, 1, 8), (9, 1, 2, 0, 0, 1, 4, 4), (math.nan, 0, 5, 1, 1, 0, math.inf, 0)]
    steps = [dict(zip(names, map(float, step), strict=True)) for step in numbers]
    assert combined(steps) == dict(zip(names, (3, 0.8, 5, 2, 1, 2 / 3, 2.5, 4), strict=True))
    left_out = combined(steps[2:])
    assert math.isnan(left_out.pop("norm"))
    assert left_out == {"tokens": 0, "tokens_text": 0, "finite": 0.0, "loss_scale": 0.0}


# ---------------------------------------------------------------- cross entropy


@pytest.fixture
def problem(rng):
    """Hidden states, a head, targets, and wanted tokens: none in row 0, all in row 1, some in row 2."""
    hidden, head = rng.normal(size=(3, 24, 5)).astype(np.float32), rng.normal(size=(5, 11)).astype(np.float32)
    targets, wanted = rng.integers(0, 11, (3, 24)), rng.random((3, 24)) < 0.3
    wanted[0], wanted[1] = False, True
    return hidden, head, targets, wanted


def chunked(hidden, head, targets, wanted, chunk):
    return cross_entropy(lambda head, h: h @ head, head, hidden, targets, wanted, chunk)


def test_cross_entropy_and_its_gradients_for_any_chunk(problem):
    hidden, head, targets, wanted = problem

    def plain(hidden, head):
        picked = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], axis=-1)[..., 0]
        return jnp.where(wanted, -picked, 0)

    weights = np.random.default_rng(1).normal(size=wanted.shape)  # so that no token's gradient hides in another's
    expected = plain(hidden, head)
    right = wanted & ((hidden @ head).argmax(-1) == targets)
    assert 0 < right.sum() < wanted.sum()
    of_plain = jax.grad(lambda *args: (weights * plain(*args)).sum(), (0, 1))(hidden, head)
    for chunk in (1, 8, 24):

        def ours(hidden, head, chunk=chunk):
            values = chunked(hidden, head, targets, wanted, chunk)
            return (weights * values["loss"]).sum(), values

        grads, values = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(hidden, head)
        assert set(values) == set(PER_TOKEN)
        np.testing.assert_allclose(values["loss"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(values["accuracy"], right)
        assert not any(np.asarray(value)[~wanted].any() for value in values.values())
        for got, wanted_grad in zip(grads, of_plain, strict=True):
            np.testing.assert_allclose(got, wanted_grad, rtol=1e-5, atol=1e-5)
        assert not np.asarray(grads[0])[~wanted].any()


def test_the_gradients_of_the_sum_are_those_of_the_losses(problem):
    """To the last bit, with any factor that is a power of two; also of the hidden states or the head alone."""
    hidden, head, targets, wanted = problem
    values = chunked(hidden, head, targets, wanted, 8)

    def later(hidden, head):
        return 4 * chunked(hidden, head, targets, wanted, 8)["loss"].sum()

    def at_once(hidden, head):
        total, found = summed_cross_entropy(lambda head, h: h @ head, head, hidden, targets, wanted, 8)
        return 4 * total, found

    for arguments in ((0, 1), (0,), (1,)):
        grads, found = jax.jit(jax.grad(at_once, arguments, has_aux=True))(hidden, head)
        jax.tree.map(np.testing.assert_array_equal, found, values)
        for got, expected in zip(grads, jax.jit(jax.grad(later, arguments))(hidden, head), strict=True):
            assert got.any()
            np.testing.assert_array_equal(got, expected)


def test_only_the_sum_is_differentiated(problem):
    def of(hidden, values_too):
        total, values = summed_cross_entropy(lambda head, h: h @ head, problem[1], hidden, *problem[2:], 8)
        return total + values["loss"].sum() if values_too else total

    assert jax.grad(of)(problem[0], False).any()
    with pytest.raises(TypeError, match="only the sum can be differentiated"):
        jax.grad(of)(problem[0], True)


@pytest.mark.parametrize(("entropy", "times"), [(cross_entropy, 4), (summed_cross_entropy, 3)])
def test_the_products_of_a_step_with_its_gradients(problem, entropy, times):
    """The logits, both of their gradients, and the logits again where the losses' factors are not known."""
    hidden, head, targets, wanted = problem

    def loss(hidden, head):
        found = entropy(lambda head, h: h @ head, head, hidden, targets, wanted, 8)
        return found[0] if isinstance(found, tuple) else found["loss"].sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head).compile().as_text()
    assert executed_flops(text) == pytest.approx(times * 2 * hidden.size * head.shape[1])


def test_chunks_without_a_wanted_token_are_skipped(problem):
    hidden, head, targets, _ = problem
    calls = []

    def logits(head, hidden):
        jax.debug.callback(lambda: calls.append(1))
        return hidden @ head

    compiled = jax.jit(lambda wanted: cross_entropy(logits, head, hidden, targets, wanted, 4)["loss"])
    for counts, chunks in (((0, 0, 0), 0), ((0, 1, 4), 1), ((5, 0, 4), 2), ((24, 3, 0), 6)):
        wanted = np.arange(24)[::-1] < np.array(counts)[:, None]  # at the rows' ends: they are moved to the front
        calls.clear()
        losses = np.asarray(compiled(wanted))
        jax.effects_barrier()
        assert len(calls) == chunks and ((losses > 0) == wanted).all()


# ---------------------------------------------------------------- pixels, recomputation


@pytest.mark.parametrize(
    "settings",
    [
        ImageSettings(image_size=32),
        ImageSettings(image_size=32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)),
        ImageSettings(image_size=32, do_normalize=False, rescale_factor=1 / 127),
    ],
    ids=["janus", "clip", "scaled"],
)
def test_normalize_is_what_the_host_does(settings, rng):
    images = [tiny_run.some_image(rng) for _ in range(3)]
    stacked = np.stack([understanding_pixels_uint8(image, settings) for image in images])
    expected = np.stack([understanding_pixels(image, settings) for image in images])
    np.testing.assert_allclose(normalize(jnp.asarray(stacked), settings), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_recomputation_changes_no_gradient(rng):
    config = LlamaConfig(vocab_size=8, width=16, mlp_dim=24, layers=2, heads=2, kv_heads=1, head_dim=8)
    x = rng.normal(size=(2, 6, 16)).astype(np.float32)
    positions, segments = np.tile(np.arange(6), (2, 1)), np.ones((2, 6), np.int32)
    abstract = jax.eval_shape(Llama(config).init, jax.random.key(0), x, positions, segments)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) / 4, abstract)

    def of(remat):
        model = Llama(config, remat=remat)
        return jax.jit(jax.grad(lambda params, x: (model.apply(params, x, positions, segments) ** 3).sum(), (0, 1)))

    assert ["remat" in str(jax.make_jaxpr(of(remat))(params, x)) for remat in ("none", "full")] == [False, True]
    kept, *others = (jax.device_get(of(remat)(params, x)) for remat in REMATS)
    for grads in others:
        assert_close({"params": grads[0], "x": grads[1]}, {"params": kept[0], "x": kept[1]}, 1e-6)
