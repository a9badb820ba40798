"""Refuses reinforcement learning and preferences that cannot work, from their config alone."""

from __future__ import annotations

import math

from train.config import KINDS, TrainConfig


def check_rl(config: TrainConfig) -> list[str]:
    """Remarks, one line each, on `grpo` or `dpo` of `config`; ValueError in one line, naming the key, for what cannot
    work."""
    c, drawn = config, config.drawn
    name = "grpo" if c.grpo else "dpo"
    _require(not (c.grpo and c.dpo), "grpo and dpo exclude each other; set one of them to none")
    does, told = ("answers", f"{drawn} tokens of an answer") if c.answers else ("draws", f"{drawn} codes of a picture")
    _require(c.init_from, f"init_from is empty, but {name} starts from a model that {does}: name its checkpoint")
    _require(not c.answers or drawn >= 1, f"grpo.max_new_tokens must be at least 1, got {drawn}")
    _require(
        c.data.context >= drawn + 3,
        f"data.context={c.data.context} has no room for a prompt beside the {told}; raise it",
    )
    _require(drawn % c.loss_chunk == 0, f"loss_chunk={c.loss_chunk} does not divide the {told}")
    remarks = [f"data.{kind} is not read: {name} trains on its own" for kind in KINDS if getattr(c.data, kind)]
    if c.grpo:
        return remarks + _check_grpo(config)
    _check_dpo(config)
    return remarks


def _check_grpo(config: TrainConfig) -> list[str]:
    g, count = config.grpo, config.batch_size
    _require(g.prompts, "grpo.prompts names no file")
    _require(g.rewards, f"grpo.rewards is empty; name what judges the {g.rollouts}")
    for key, least in (("group", 2), ("epochs", 1), ("updates", 1), ("draw_batch", 0), ("top_k", 0)):
        value = getattr(g, key)
        _require(least <= value < 2**31, f"grpo.{key} must be at least {least}, got {value}")
    _require(
        count % g.group == 0, f"batch_size={count} must be a multiple of grpo.group={g.group}, a prompt's {g.rollouts}"
    )
    _require(
        not config.answers or 0 <= g.speculate <= 1,
        f"grpo.speculate={g.speculate} is of pictures' codes; with grpo.rollouts=answers leave it at 0",
    )
    _require(
        0 <= g.speculate <= config.drawn,
        f"grpo.speculate must be 0 (auto), 1 (off) or a window of up to {config.drawn} codes, got {g.speculate}",
    )
    parts = g.updates * config.accumulate
    _require(
        count % parts == 0,
        f"batch_size={count} must be a multiple of grpo.updates={g.updates} times accumulate={config.accumulate}",
    )
    _require(
        0 < g.temperature <= 1e6,
        f"grpo.temperature must be above 0 (at 0, all {g.rollouts} of a group are the same), got {g.temperature}",
    )
    _require(0 <= g.guidance <= 1e6, f"grpo.guidance must be from 0 to 1,000,000, got {g.guidance}")
    _require(0 < g.top_p <= 1, f"grpo.top_p must be above 0 and at most 1 (all codes), got {g.top_p}")
    _require(0 < g.clip < 1, f"grpo.clip must be above 0 and below 1, got {g.clip}")
    _require(0 <= g.kl < math.inf, f"grpo.kl must be at least 0, got {g.kl}")
    if config.answers:
        _require(g.loss != "conditional", "grpo.loss=conditional is of guidance, which answers lack; set it to none")
        most = config.data.images_per_row
        _require(most >= 0, f"data.images_per_row must be at least 0 (0 for prompts without pictures), got {most}")
        return []
    if g.loss == "none" and g.guidance != 1:
        return [f"grpo.guidance={g.guidance} is not used: grpo.loss=none draws without guidance"]
    return []


def _check_dpo(config: TrainConfig) -> None:
    d = config.dpo
    _require(d.pairs, "dpo.pairs names no folder")
    _require(
        not d.weights or len(d.weights) == len(d.pairs),
        f"dpo.weights has {len(d.weights)} weights for the {len(d.pairs)} folders of dpo.pairs",
    )
    _require(all(0 < weight < math.inf for weight in d.weights), "dpo.weights must be numbers above 0")
    _require(0 < d.beta < math.inf, f"dpo.beta must be a number above 0, got {d.beta}")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
