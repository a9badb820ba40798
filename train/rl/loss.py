"""What reinforcement learning and preferences minimize: log-probabilities of what was drawn, GRPO's loss and DPO's.

Axes: B pictures or answers, C codes or tokens of each, P tokens of a prompt, which is padded on the left, and
T = P + C. What is said of codes holds of an answer's tokens too.

A batch of GRPO has

    ids        int32 [B, rows, P]  prompts ending in begin_of_image, with the unconditional row if they have two
    mask       bool  [B, rows, P]  False on padding
    codes      int32 [B, C]        what was drawn
    old        float32 [B, C]      log-probabilities under the model that drew
    reference  float32 [B, C]      those under the first parameters, before top-k and top-p; 0 if they are not needed
    advantage  float32 [B]
    live       float32 [B]         1 for pictures that count, and 0 for those of groups that are left out

with answers one row of `ids` and `mask` each, and instead of `codes`

    tokens     int32 [B, C]        what was drawn
    said       bool  [B, C]        True up to EOS, which counts, and False behind it
    where      bool  [B, P]        the placeholders of pictures in `ids`
    pixels     float32 [B, Q, S, S, 3]  these pictures in order, normalized, then zeros; absent where Q is 0

and one of DPO `ids` and `mask` [B, 1, P], `chosen` and `rejected` [B, C], `reference` [B, 2], the sums of both
pictures' log-probabilities under the first parameters, and `live` [B], 0 for damaged pairs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model.janus import Janus, place_images
from janus_jax.sampling.images import guide
from janus_jax.sampling.sampler import Sampler
from train.config import TrainConfig
from train.rl.config import GrpoConfig
from train.step.loss import cross_entropy

Params = dict[str, Any]
Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


def sampler_of(grpo: GrpoConfig) -> Sampler:
    """The Sampler of numbers, not arrays, with which pictures are drawn."""
    truncated = grpo.top_k > 0 or grpo.top_p < 1
    return Sampler(temperature=grpo.temperature, top_k=grpo.top_k, top_p=grpo.top_p, truncated=truncated)


def log_probabilities(
    model: Janus,
    params: Params,
    batch: Batch,
    codes: jax.Array,
    sampler: Sampler,
    chunk: int,
    guidance: float = 1.0,
    detach: bool = True,
) -> jax.Array:
    """log p [B, C] of `codes` [B, C], each after its prompt and the codes before it; -inf for what `sampler` drops.

    Args:
      batch: `ids` and `mask`, with two rows a prompt if there is guidance.
      chunk: codes of each picture whose logits are in memory at a time; it divides C.
      detach: whether nothing is differentiated through the unconditional rows.
    """
    rows = 1 if guidance == 1 else 2
    hidden = []
    for row in range(rows):
        own = jax.lax.stop_gradient(params) if row and detach else params
        hidden.append(_hidden(model, own, batch["ids"][:, row], batch["mask"][:, row], codes))

    def logits(own: Params, hidden: jax.Array) -> jax.Array:
        scores = []
        for row, x in enumerate(jnp.split(hidden, rows, axis=-1)):
            # Of its hidden states too, whose gradients would be computed, and dropped only afterwards.
            used, x = jax.lax.stop_gradient((own, x)) if row and detach else (own, x)
            scores.append(model.apply({"params": used}, x, method="image_logits"))
        return sampler.scaled(guide(jnp.stack(scores, 1), guidance))

    with jax.named_scope("image_logits"):
        own, wanted = {"gen_head": params["gen_head"]}, jnp.ones(codes.shape, bool)
        return -cross_entropy(logits, own, jnp.concatenate(hidden, -1), codes, wanted, chunk)["loss"]


def answer_log_probabilities(model: Janus, params: Params, batch: Batch, sampler: Sampler, chunk: int) -> jax.Array:
    """log p [B, C] of the batch's `tokens` where they are `said`, each after its prompt with its pictures and the
    tokens before it; -inf for what `sampler` drops, and 0 for what is not said."""
    ids, tokens, said = batch["ids"][:, 0], batch["tokens"], batch["said"]
    apply = functools.partial(model.apply, {"params": params})
    x = apply(jnp.concatenate([ids, tokens], axis=1), method="embed_text")
    if "pixels" in batch:
        pixels = batch["pixels"]
        features = apply(pixels.reshape(-1, *pixels.shape[2:]), method="embed_images")
        # A placeholder that the model says itself is a token like others.
        where = jnp.pad(batch["where"], ((0, 0), (0, tokens.shape[1])))
        x = place_images(x, where, features.reshape(len(ids), -1, features.shape[-1]))
    real = jnp.concatenate([batch["mask"][:, 0], said], axis=1).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden = apply(x, positions, real, method="hidden")

    def logits(own: Params, hidden: jax.Array) -> jax.Array:
        return sampler.scaled(model.apply({"params": own}, hidden, method="text_logits"))

    with jax.named_scope("text_logits"):
        own = {"language_model": {"lm_head": params["language_model"]["lm_head"]}}
        return -cross_entropy(logits, own, hidden[:, ids.shape[1] - 1 : -1], tokens, said, chunk)["loss"]


def _hidden(model: Janus, params: Params, ids: jax.Array, mask: jax.Array, codes: jax.Array) -> jax.Array:
    """Hidden states [B, C, D] from which `codes` [B, C] are predicted."""
    apply = functools.partial(model.apply, {"params": params})
    x = jnp.concatenate([apply(ids, method="embed_text"), apply(codes, method="embed_codes")], axis=1)
    real = jnp.concatenate([mask.astype(jnp.int32), jnp.ones_like(codes)], axis=1)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    # The last code is read for nothing, so that the length is the one that attention's kernels are chosen for.
    return apply(x, positions, real, method="hidden")[:, ids.shape[1] - 1 : -1]


def grpo_log_probabilities(config: TrainConfig, model: Janus, params: Params, batch: Batch) -> tuple[jax.Array, ...]:
    """log p [B, C] of the batch's codes under the distribution that is trained, and under it before top-k and top-p."""
    g = config.grpo
    if config.answers:
        of = functools.partial(answer_log_probabilities, model, params, batch, chunk=config.loss_chunk)
    else:
        guided = {"guidance": g.guidance, "detach": g.detach} if g.guided and g.loss == "guided" else {}
        of = functools.partial(
            log_probabilities, model, params, batch, batch["codes"], chunk=config.loss_chunk, **guided
        )
    plain, sampler = Sampler(temperature=g.temperature), sampler_of(g)
    if g.loss == "conditional":
        # What the guided distribution keeps, another one might drop.
        sampler = plain
    own = of(sampler=sampler)
    if not sampler.truncated or not g.kl:
        return own, own
    return own, of(sampler=plain)


def grpo_sums(config: TrainConfig, model: Janus, params: Params, batch: Batch) -> Sums:
    """Sums over the codes of live pictures, to be divided by their number, 'codes'. So a long answer weighs more.

    'loss' is -min(ratio A, clip(ratio) A) + kl * k3, where ratio = p / p_old, A is the advantage, and k3 estimates the
    divergence from the reference as r - 1 - log r, r = p_reference / p. A code that top-k or top-p would drop by now
    has the ratio 0 and no gradient, and counts as 'dropped'.
    """
    g = config.grpo
    own, whole = grpo_log_probabilities(config, model, params, batch)
    live = jnp.broadcast_to(batch["live"][:, None] > 0, own.shape)
    if config.answers:
        live &= batch["said"]
    there = live & jnp.isfinite(own) & jnp.isfinite(batch["old"])
    change = jnp.where(there, own - batch["old"], 0)
    ratio = jnp.where(there, jnp.exp(change), 0)
    advantage = batch["advantage"][:, None]
    clipped = jnp.clip(ratio, 1 - g.clip, 1 + g.clip)
    values = {
        "loss": -jnp.minimum(ratio * advantage, clipped * advantage),
        "clipped": (ratio - clipped) * advantage > 0,
        "dropped": ~there,
        "entropy": jnp.where(there, -own, 0),
        "drift": jnp.abs(change),
        "codes": jnp.ones_like(ratio),
    }
    if g.kl:
        away = jnp.where(live, batch["reference"] - whole, 0)
        values["kl"] = jnp.exp(away) - away - 1
        values["loss"] += g.kl * values["kl"]
    return {name: jnp.where(live, value, 0).sum(dtype=jnp.float32) for name, value in values.items()}


def grpo_metrics(sums: Sums) -> Sums:
    """The means of `grpo_sums` over live codes, NaN if there are none."""
    names = {"loss": "policy_loss", "clipped": "clip_share", "dropped": "dropped_share"}
    count = jnp.where(sums["codes"] > 0, sums["codes"], jnp.nan)
    return {names.get(name, name): x / count for name, x in sums.items() if name != "codes"}


def pair_log_probabilities(config: TrainConfig, model: Janus, params: Params, batch: Batch) -> jax.Array:
    """[B, 2]: log p of the whole chosen and the whole rejected picture of each pair, without guidance."""
    double = {name: jnp.concatenate([batch[name]] * 2) for name in ("ids", "mask")}
    codes = jnp.concatenate([batch["chosen"], batch["rejected"]])
    found = log_probabilities(model, params, double, codes, Sampler(), config.loss_chunk)
    return found.sum(-1).reshape(2, -1).T


def dpo_sums(config: TrainConfig, model: Janus, params: Params, batch: Batch) -> Sums:
    """Sums over live pairs, to be divided by their number, 'pairs'; 'loss' is -log sigmoid(beta * margin)."""
    beta = config.dpo.beta
    moved = pair_log_probabilities(config, model, params, batch) - batch["reference"]
    margin = beta * (moved[:, 0] - moved[:, 1])
    values = {
        "loss": jax.nn.softplus(-margin),
        "margin": margin,
        "preferred": margin > 0,
        "chosen_reward": beta * moved[:, 0],
        "rejected_reward": beta * moved[:, 1],
        "pairs": jnp.ones_like(margin),
    }
    live = batch["live"] > 0
    return {name: jnp.where(live, value, 0).sum(dtype=jnp.float32) for name, value in values.items()}


def dpo_metrics(sums: Sums) -> Sums:
    """The means of `dpo_sums` over pairs, NaN if there are none."""
    count = jnp.where(sums["pairs"] > 0, sums["pairs"], jnp.nan)
    return {"dpo_loss" if name == "loss" else name: x / count for name, x in sums.items() if name != "pairs"}
