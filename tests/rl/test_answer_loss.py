"""GRPO of answers: its loss and gradients against torch in float64, and what was drawn has the ratio 1."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from janus_jax.model.janus import Janus, run
from janus_jax.sampling.cache import empty_cache
from janus_jax.sampling.sampler import make_sampler, step_keys
from janus_jax.sampling.text import embed_prompt, generate_tokens
from tests.rl.conftest import MODEL
from tests.rl.test_loss import assert_close, compiled, config_of, truncated
from train.config import TRAINED, DataConfig, GrpoConfig
from train.rl.loss import grpo_log_probabilities, grpo_metrics, grpo_sums
from train.step import step
from train.step.leaves import split

PROMPT, MOST, ANSWERS, PLACEHOLDER = 40, 8, 4, MODEL.language.vocab_size - 1
SHARP = {"temperature": 0.8, "top_k": 24, "top_p": 0.95}
GRPO = GrpoConfig(prompts=("p.jsonl",), rollouts="answers", max_new_tokens=MOST, group=2, kl=0.3, clip=0.1, **SHARP)


def answers_config(grpo: GrpoConfig):
    return config_of(grpo=grpo, data=DataConfig(context=PROMPT + MOST, images_per_row=2))


@pytest.fixture(scope="module")
def prompts() -> dict[str, np.ndarray]:
    """Of one picture, of one, of two and of none; of as many lengths, padded on the left."""
    rng = np.random.default_rng(0)
    patches, size = MODEL.vision.num_patches, MODEL.vision.image_size
    ids = np.zeros((ANSWERS, 1, PROMPT), np.int32)
    mask = np.zeros(ids.shape, bool)
    pixels = np.zeros((ANSWERS, 2, size, size, 3), np.float32)
    for row, (pictures, words) in enumerate(((1, 3), (1, 9), (2, 6), (0, 5))):
        own = rng.integers(1, PLACEHOLDER, words).tolist()
        for number in range(pictures):
            place = int(rng.integers(1, len(own)))
            own[place:place] = [PLACEHOLDER] * patches
            pixels[row, number] = rng.normal(size=pixels.shape[2:])
        ids[row, 0, -len(own) :] = own
        mask[row, 0, -len(own) :] = True
    return {"ids": ids, "mask": mask, "where": (ids == PLACEHOLDER)[:, 0], "pixels": pixels}


def drawn(params, prompts, grpo: GrpoConfig) -> dict[str, np.ndarray]:
    """Answers by the sampler, one of which ends early and one with the last token that it may have."""
    x = embed_prompt(Janus(MODEL), params, prompts["ids"][:, 0], prompts["where"], prompts["pixels"])
    sampler = make_sampler(grpo.temperature, grpo.top_k, grpo.top_p)
    keys = jax.random.split(jax.random.key(5), ANSWERS)
    draw = functools.partial(
        generate_tokens, Janus(MODEL), params, x, prompts["mask"][:, 0], keys, max_new_tokens=MOST, sampler=sampler
    )
    end = int(draw(eos_id=-1)[1, 3])
    tokens = np.asarray(draw(eos_id=end))
    ends = tokens == end
    said = np.cumsum(ends, 1) - ends == 0
    assert said[1].sum() <= 4 and said.all(1).any()
    return {"tokens": tokens, "said": said, "end": end, "keys": keys}


@functools.partial(jax.jit, static_argnames="model")
def step_by_step(model: Janus, params, prompts, tokens) -> jax.Array:
    """Logits [B, C, V] from which the sampler draws `tokens` [B, C], with its cache."""
    x = embed_prompt(model, params, prompts["ids"][:, 0], prompts["where"], prompts["pixels"])
    start = run(model, params, "prefill", x, prompts["mask"][:, 0], empty_cache(model, ANSWERS, PROMPT + MOST))

    def one(carry, token):
        hidden, cache = carry
        logits = run(model, params, "text_logits", hidden[:, -1:])[:, 0]
        return run(model, params, "decode", run(model, params, "embed_text", token[:, None]), cache), logits

    first = (start[0][:, -1:], start[1])
    return jax.lax.scan(one, first, tokens.T)[1].swapaxes(0, 1)


def torch_log_probabilities(model, batch, how: GrpoConfig, truncate: bool = True):
    """log p [B, C] of what is said, 0 elsewhere, answer by answer; -inf for what is dropped."""
    import torch

    found = []
    for row in range(ANSWERS):
        ids, tokens = batch["ids"][row, 0][batch["mask"][row, 0]], batch["tokens"][row][batch["said"][row]]
        x = model.get_input_embeddings()(torch.tensor(np.concatenate([ids, tokens]), dtype=torch.int64))
        if count := (ids == PLACEHOLDER).sum() // MODEL.vision.num_patches:
            pixels = torch.tensor(batch["pixels"][row, :count], dtype=torch.float64).permute(0, 3, 1, 2)
            features = model.model.get_image_features(pixels).pooler_output
            x = x.clone()
            x[np.flatnonzero(ids == PLACEHOLDER)] = features.reshape(-1, x.shape[-1])
        hidden = model.model.language_model(inputs_embeds=x[None, :-1], use_cache=False).last_hidden_state[0]
        logits = model.lm_head(hidden[len(ids) - 1 :]) / how.temperature
        if truncate:
            logits = torch.stack([truncated(each, how) for each in logits])
        own = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)]
        found.append(torch.nn.functional.pad(own, (0, MOST - len(tokens))))
    return torch.stack(found)


@pytest.mark.slow
def test_the_loss_is_torchs(models, prompts, oracle):
    """With pictures, an early end, top-k, top-p, clip, divergence, and an answer that does not count."""
    import torch

    (policy, earlier, reference), params = models
    batch = prompts | drawn(params[1], prompts, GRPO)
    with torch.no_grad():
        old = torch_log_probabilities(earlier, batch, GRPO)
        of_reference = torch_log_probabilities(reference, batch, GRPO, truncate=False)
    assert torch.isfinite(old).all(), "what was drawn is what the earlier policy keeps"
    advantage = torch.tensor(np.random.default_rng(3).normal(size=ANSWERS))
    live = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)
    counted = torch.tensor(batch["said"]) * live[:, None]

    own = torch_log_probabilities(policy, batch, GRPO)
    there = torch.isfinite(own)
    ratio = torch.where(there, torch.exp(torch.where(there, own, 0) - old), 0)
    clipped = ratio.clip(1 - GRPO.clip, 1 + GRPO.clip)
    loss = -torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    whole = torch_log_probabilities(policy, batch, GRPO, truncate=False)
    k3 = torch.exp(of_reference - whole) - (of_reference - whole) - 1
    loss = ((loss + GRPO.kl * k3) * counted).sum() / counted.sum()

    config = answers_config(GRPO)
    objective = step.Objective(functools.partial(grpo_sums, config), "codes", grpo_metrics, True)
    trained, frozen = split(params[0], 3)
    arrays = {name: batch[name] for name in ("ids", "mask", "where", "pixels", "tokens", "said")} | {
        "old": old.numpy().astype(np.float32), "reference": of_reference.numpy().astype(np.float32),
        "advantage": advantage.numpy().astype(np.float32), "live": live.numpy().astype(np.float32),
    }  # fmt: skip
    # What stands behind an end is read by nobody.
    arrays["tokens"] = np.where(batch["said"], batch["tokens"], 7).astype(np.int32)
    grads, sums = jax.device_get(compiled(config, objective)(trained, frozen, arrays))
    assert sums["codes"] == counted.sum() < 3 * MOST
    np.testing.assert_allclose(sums["loss"] / sums["codes"], loss.item(), rtol=1e-5)
    assert_close(grads, oracle.gradients(policy, MODEL, loss, TRAINED[3]))
    assert np.abs(grads["vision_model"]["patch_embed"]["kernel"]).max() > 0
    np.testing.assert_allclose(sums["kl"], (k3 * counted).sum().item(), rtol=1e-5)
    assert sums["dropped"] == (~there * counted).sum()
    acted = (ratio != clipped) * counted
    assert 0.1 < acted.sum() / counted.sum() < 0.9, "the clip acts on some tokens, and not on others"


def test_what_is_drawn_has_the_ratio_1(models, prompts):
    """The log-probabilities of training are those of the very steps in which the sampler drew, token by token."""
    _, params = models
    own = drawn(params[0], prompts, GRPO)
    model, sampler = Janus(MODEL), make_sampler(GRPO.temperature, GRPO.top_k, GRPO.top_p)
    logits = step_by_step(model, params[0], prompts, own["tokens"])
    for i in range(MOST):
        token, said = np.asarray(sampler(step_keys(own["keys"], i), logits[:, i])), own["said"][:, i]
        np.testing.assert_array_equal(token[said], own["tokens"][said, i])
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(sampler.scaled(logits))), own["tokens"][..., None], 2)
    config = answers_config(GRPO)
    batch = prompts | {name: own[name] for name in ("tokens", "said")}
    found, _ = jax.jit(functools.partial(grpo_log_probabilities, config, model))(params[0], batch)
    said = own["said"]
    assert np.isfinite(found).all() and np.std(np.asarray(found)[said]) > 0.1
    assert np.abs(np.exp(np.asarray(found) - chosen[..., 0]) - 1)[said].max() <= 1e-5
    assert not np.asarray(found)[~said].any()
