"""The losses of GRPO and DPO and their gradients, against torch in float64, where every distribution is written out."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model.janus import Janus
from janus_jax.sampling.images import generate_codes
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sharding import flatten, make_mesh
from tests.rl.conftest import MODEL
from train.config import TRAINED, DataConfig, DpoConfig, GrpoConfig, OptimizerConfig, TrainConfig
from train.rl.loss import (
    dpo_metrics,
    dpo_sums,
    grpo_log_probabilities,
    grpo_metrics,
    grpo_sums,
    pair_log_probabilities,
)
from train.step import step
from train.step.leaves import split

CODES, VOCABULARY = MODEL.gen_vision.num_tokens, MODEL.gen_vision.codebook_size
PROMPT, PICTURES = 12, 4
SHARP = {"guidance": 2.0, "temperature": 0.8, "top_k": 24, "top_p": 0.95}
GRPO = GrpoConfig(prompts=("p.txt",), group=2, kl=0.3, clip=0.1, **SHARP)


def config_of(**changes) -> TrainConfig:
    made = TrainConfig(
        name="rl", workdir="run", model=MODEL, stage=3, steps=4, batch_size=PICTURES, tokenizer="t",
        data=DataConfig(context=PROMPT + CODES), optimizer=OptimizerConfig(), compute_dtype="float32",
        frozen_dtype="float32", remat="none", loss_chunk=8,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def prompts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = np.zeros((PICTURES, 2, PROMPT), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, length in enumerate((5, 5, 11, 11)):
        own = rng.integers(1, MODEL.language.vocab_size, length)
        own = own if row % 2 == 0 else ids[row - 1, 0, -length:]
        ids[row, 0, -length:] = own
        ids[row, 1, -length:] = [own[0], *[2] * (length - 2), own[-1]]
        mask[row, :, -length:] = True
    return {"ids": ids, "mask": mask}


def torch_log_probabilities(model, prompts, codes, how: GrpoConfig | None, truncate: bool = True):
    """log p [B, C] as a tensor, written out picture by picture and code by code; -inf for what is dropped."""
    import torch

    found = []
    for ids, mask, own in zip(prompts["ids"], prompts["mask"], codes, strict=True):
        scores = []
        for row in range(2):
            text = model.get_input_embeddings()(torch.tensor(ids[row][mask[row]], dtype=torch.int64))
            drawn = model.model.generation_aligner(
                model.model.generation_embeddings(torch.tensor(own, dtype=torch.int64))
            )
            x = torch.cat([text, drawn])[None, :-1]
            hidden = model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state[0]
            scores.append(model.model.generation_head(hidden[len(text) - 1 :]))
        conditional, unconditional = scores
        if how is None or how.loss == "none":
            logits = conditional
        elif how.loss == "conditional":
            logits, truncate = conditional, False
        else:
            unconditional = unconditional.detach() if how.detach else unconditional
            logits = unconditional + how.guidance * (conditional - unconditional)
        if how is not None:
            logits = logits / how.temperature
        if how is not None and truncate:
            logits = torch.stack([truncated(row, how) for row in logits])
        found.append(logits.log_softmax(-1)[torch.arange(CODES), torch.tensor(own, dtype=torch.int64)])
    return torch.stack(found)


def truncated(row, how: GrpoConfig):
    """Of one distribution, -inf for what top-k and then top-p drop."""
    order = np.argsort(-row.detach().numpy(), kind="stable")[: how.top_k or len(row)]
    p = np.exp(row.detach().numpy()[order] - row.detach().numpy()[order].max())
    before = np.cumsum(p / p.sum()) - p / p.sum()
    mask = np.full(len(row), -np.inf)
    mask[order[(before < how.top_p) | (how.top_p >= 1)]] = 0
    return row + row.new_tensor(mask)


def assert_close(ours, wanted, tolerance: float = 1e-5):
    ours, wanted = flatten(ours), flatten(wanted)
    assert ours.keys() == wanted.keys()
    largest = max(np.abs(x).max() for x in wanted.values())
    assert largest > 0
    for path, x in wanted.items():
        # The gradient of keys' biases is nothing but rounding: softmax does not see what all scores share.
        like = wanted[path.replace("attn/k/bias", "attn/k/kernel")]
        scale = max(np.abs(like).max(), 1e-6 * largest)
        error = np.abs(np.asarray(ours[path], np.float64) - x).max()
        assert error <= tolerance * scale, f"{path} is off by {error:.1e} of {scale:.1e}"


def compiled(config: TrainConfig, objective):
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    return jax.jit(functools.partial(step._gradients, config, mesh, objective))


CASES = {
    "guided": GRPO,
    "both rows": dataclasses.replace(GRPO, detach=False),
    "conditional": dataclasses.replace(GRPO, loss="conditional"),
    "none": dataclasses.replace(GRPO, loss="none", top_p=1.0),
    "no divergence": dataclasses.replace(GRPO, kl=0.0),
}


@pytest.mark.parametrize(
    "case", ["guided", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "guided")]
)
def test_grpo_is_torchs(case, models, prompts, oracle):
    import torch

    (policy, earlier, reference), params = models
    grpo = CASES[case]
    rng = np.random.default_rng(3)
    with torch.no_grad():
        drawing = dataclasses.replace(grpo, loss="none" if grpo.loss == "none" else "guided")
        codes, _ = generate_codes(
            Janus(MODEL), params[1], prompts["ids"][:, : 1 if grpo.loss == "none" else 2],
            prompts["mask"][:, : 1 if grpo.loss == "none" else 2], jax.random.split(jax.random.key(5), PICTURES),
            guidance=drawing.guidance, sampler=make_sampler(drawing.temperature, drawing.top_k, drawing.top_p),
        )  # fmt: skip
        codes = np.asarray(codes)
        old = torch_log_probabilities(earlier, prompts, codes, grpo)
        of_reference = torch_log_probabilities(reference, prompts, codes, grpo, truncate=False)
    assert torch.isfinite(old).all(), "what was drawn is what the earlier policy keeps"
    advantage = torch.tensor(rng.normal(size=PICTURES))
    live = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)

    own = torch_log_probabilities(policy, prompts, codes, grpo)
    there = torch.isfinite(own)
    ratio = torch.where(there, torch.exp(torch.where(there, own, 0) - old), 0)
    clipped = ratio.clip(1 - grpo.clip, 1 + grpo.clip)
    loss = -torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    whole = torch_log_probabilities(policy, prompts, codes, grpo, truncate=False)
    k3 = torch.exp(of_reference - whole) - (of_reference - whole) - 1
    loss = ((loss + grpo.kl * k3) * live[:, None]).sum() / (3 * CODES)
    acted = (ratio != clipped)[:3].double().mean()
    assert 0.1 < acted < 0.9, "the clip acts on some codes, and not on others"

    config = config_of(grpo=grpo)
    objective = step.Objective(functools.partial(grpo_sums, config), "codes", grpo_metrics, True)
    trained, frozen = split(params[0], 3)
    batch = {
        **prompts, "codes": codes, "old": old.numpy().astype(np.float32), "advantage": advantage.numpy(),
        "reference": of_reference.numpy().astype(np.float32), "live": live.numpy().astype(np.float32),
    }  # fmt: skip
    batch["advantage"] = batch["advantage"].astype(np.float32)
    grads, sums = jax.device_get(compiled(config, objective)(trained, frozen, batch))
    assert sums["codes"] == 3 * CODES
    np.testing.assert_allclose(sums["loss"] / sums["codes"], loss.item(), rtol=1e-5)
    assert_close(grads, oracle.gradients(policy, MODEL, loss, TRAINED[3]))
    assert sums["dropped"] == (~there)[:3].sum()
    if grpo.kl:
        np.testing.assert_allclose(sums["kl"], k3[:3].sum().item(), rtol=1e-5)
    metrics = grpo_metrics({name: jnp.asarray(x) for name, x in sums.items()})
    np.testing.assert_allclose(metrics["policy_loss"], loss.item(), rtol=1e-5)
    by_hand = ((ratio > clipped) & (advantage[:, None] > 0)) | ((ratio < clipped) & (advantage[:, None] < 0))
    np.testing.assert_allclose(metrics["clip_share"], by_hand[:3].double().mean(), rtol=1e-6)


def test_dpo_is_torchs(models, prompts, oracle):
    import torch

    (policy, _, reference), params = models
    rng = np.random.default_rng(4)
    chosen, rejected = rng.integers(0, VOCABULARY, (2, PICTURES, CODES)).astype(np.int32)
    live, beta = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64), 0.05
    with torch.no_grad():
        of_reference = torch.stack(
            [torch_log_probabilities(reference, prompts, codes, None).sum(-1) for codes in (chosen, rejected)], -1
        )
    own = torch.stack(
        [torch_log_probabilities(policy, prompts, codes, None).sum(-1) for codes in (chosen, rejected)], -1
    )
    margin = beta * ((own[:, 0] - of_reference[:, 0]) - (own[:, 1] - of_reference[:, 1]))
    loss = -(torch.nn.functional.logsigmoid(margin) * live).sum() / 3

    config = config_of(dpo=DpoConfig(pairs=("p",), beta=beta))
    objective = step.Objective(functools.partial(dpo_sums, config), "pairs", dpo_metrics, True)
    batch = {
        "ids": prompts["ids"][:, :1], "mask": prompts["mask"][:, :1], "chosen": chosen, "rejected": rejected,
        "reference": of_reference.numpy().astype(np.float32), "live": live.numpy().astype(np.float32),
    }  # fmt: skip
    grads, sums = jax.device_get(compiled(config, objective)(*split(params[0], 3), batch))
    np.testing.assert_allclose(sums["loss"] / sums["pairs"], loss.item(), rtol=1e-5)
    assert_close(grads, oracle.gradients(policy, MODEL, loss, TRAINED[3]))
    np.testing.assert_allclose(sums["margin"], (margin * live).sum().item(), rtol=1e-5)
    assert sums["preferred"] == ((margin > 0) & (live > 0)).sum()
    found = pair_log_probabilities(config, Janus(MODEL), params[0], batch)
    np.testing.assert_allclose(found, own.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("case", ["guided", pytest.param("none", marks=pytest.mark.slow)])
def test_what_is_drawn_has_the_ratio_1(case, models, prompts):
    """The log-probabilities of training are those of the sampler, code by code: both compute the same distribution."""
    _, params = models
    grpo = CASES[case]
    rows = 1 if case == "none" else 2
    sampler = make_sampler(grpo.temperature, grpo.top_k, grpo.top_p)
    codes, logits = generate_codes(
        Janus(MODEL), params[0], prompts["ids"][:, :rows], prompts["mask"][:, :rows],
        jax.random.split(jax.random.key(8), PICTURES), guidance=grpo.guidance, sampler=sampler, keep_logits=True,
    )  # fmt: skip
    drawn = jax.nn.log_softmax(sampler.scaled(logits))
    drawn = np.take_along_axis(np.asarray(drawn), np.asarray(codes)[..., None], -1)[..., 0]
    config = config_of(grpo=grpo)
    own, _ = jax.jit(functools.partial(grpo_log_probabilities, config, Janus(MODEL)))(
        params[0], {**prompts, "codes": codes}
    )
    assert np.isfinite(own).all() and np.std(own) > 0.1
    assert np.abs(np.exp(own - drawn) - 1).max() <= 1e-5


@pytest.mark.slow
def test_micro_batches_and_shards_change_nothing(models, prompts):
    """Also for the log-probabilities that an update compares with."""
    _, params = models
    rng = np.random.default_rng(6)
    codes = rng.integers(0, VOCABULARY, (PICTURES, CODES)).astype(np.int32)
    batch = {
        **prompts, "codes": codes, "old": rng.normal(-3, 0.2, codes.shape).astype(np.float32),
        "reference": rng.normal(-3, 0.2, codes.shape).astype(np.float32),
        "advantage": rng.normal(size=PICTURES).astype(np.float32), "live": np.ones(PICTURES, np.float32),
    }  # fmt: skip
    trained, frozen = split(params[0], 3)
    found = []
    for accumulate, shape in ((1, {"fsdp": 1}), (2, {"fsdp": 2}), (1, {"fsdp": 2, "tensor": 2})):
        config = config_of(grpo=dataclasses.replace(GRPO, top_k=0, top_p=1.0), accumulate=accumulate)
        mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
        objective = step.Objective(functools.partial(grpo_sums, config), "codes", grpo_metrics, True)
        values = step.make_row_values(config, mesh, functools.partial(grpo_log_probabilities, config))
        with jax.set_mesh(mesh):
            grads, sums = jax.jit(functools.partial(step._gradients, config, mesh, objective))(trained, frozen, batch)
            own, _ = values(trained, frozen, {name: batch[name] for name in ("ids", "mask", "codes")})
        found.append(jax.device_get((grads, sums, own)))
    (grads, sums, own), *others = found
    for other, other_sums, other_own in others:
        np.testing.assert_allclose(own, other_own, rtol=1e-5)
        np.testing.assert_allclose(sums["loss"], other_sums["loss"], rtol=1e-5)
        assert_close(other, jax.tree.map(lambda x: np.asarray(x, np.float64), grads), 2e-5)
