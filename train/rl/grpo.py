"""A step of GRPO: pictures, or answers, are drawn, judged and compared in groups, and the model is updated."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax.processes import gather
from janus_jax.processing.chat import Processor
from janus_jax.sampling.batches import even_batches
from janus_jax.sampling.finite import NotFinite
from janus_jax.sharding import batch_shards
from train.config import TrainConfig
from train.data.work import Batches, Work
from train.rl.advantages import advantages
from train.rl.loss import grpo_log_probabilities
from train.rl.prompts import Prompt
from train.rl.rewards import Rewards, Scores
from train.rl.rollouts import Arrays, rollouts_of
from train.rl.update import make_updates, reference_shapes
from train.run.distributed import together
from train.run.faults import STOPPED, Stopped
from train.step.earlier import REFERENCE
from train.step.pipeline import pipeline_of
from train.step.state import Params, TrainState
from train.step.step import make_row_values


class Grpo(Work):
    """Pictures of prompts or answers to them, and the updates that follow from their rewards."""

    curves = tuple(f"train/{name}" for name in ("reward", "reward_spread", "kl", "entropy", "clip_share", "distinct"))

    def __init__(self, config: TrainConfig, mesh: Mesh, processor: Processor):
        super().__init__(config, mesh, processor)
        self._grpo, self._rollouts = config.grpo, rollouts_of(config, processor)
        self._prompts = self._rollouts.prompts
        self._rewards: Rewards | None = None
        self._reference: Params | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        return self._prompts.fingerprints

    def about(self, first: int) -> str:
        g, count = self._grpo, self.config.batch_size
        updates = f"{self.config.updates} update{'s' if self.config.updates > 1 else ''}"
        of = f"{count // g.group} of {len(self._prompts.prompts)} prompts"
        return f"{g.group} {g.rollouts} of each of {of}, {updates}"

    # ------------------------------------------------------------ the reference

    def first_kept(self, state: TrainState, frozen: Params) -> Params:
        shapes = self.kept_shapes(state)
        if not shapes:
            return {}
        shardings = jax.tree.map(lambda x: x.sharding, shapes)

        def copied(trained: Params) -> Params:
            # Not the same buffers, which the first step donates.
            return {REFERENCE: jax.tree.map(lambda x, s: jnp.copy(x).astype(s.dtype), trained, shapes[REFERENCE])}

        return jax.jit(copied, out_shardings=shardings)(state.trained)

    def kept_shapes(self, state: TrainState) -> Params:
        if not self._grpo.kl:
            return {}
        return {REFERENCE: reference_shapes(self.config, state.trained)}

    # ------------------------------------------------------------ a step

    def begin(self, kept: Params) -> None:
        self._reference = kept.get(REFERENCE)
        with together():
            self._rewards = Rewards(self._grpo.rewards, self._grpo.rollouts)
        self._values = make_row_values(self.config, self.mesh, functools.partial(grpo_log_probabilities, self.config))
        self._update = make_updates(self.config, self.mesh)

    def batches(self, first: int) -> Batches:
        count, tokens = self.config.batch_size, self.config.batch_size * self.config.drawn
        report = {"tokens": tokens, "samples": count, "images": 0, "left_out": 0}
        for step in range(first, self.config.steps):
            prompts = self._prompts.of_step(step, count // self._grpo.group)
            given, problems = self._rollouts.given(prompts)
            told = {"problems": list(problems.values()), "sample_length": float(self.config.data.context)}
            yield step, (step, prompts, given, list(problems)), report | told

    def step(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        step, prompts, given, damaged = batch
        g = self._grpo
        given = {name: np.repeat(x, g.group, axis=0) for name, x in given.items()}
        began = time.monotonic()
        drawn, scored = self._roll_out(state, frozen, step, given, [each for each in prompts for _ in range(g.group)])
        drawing = time.monotonic() - began

        whole = given | drawn
        arrays = self.put({name: x[self.rows] for name, x in whole.items()})
        old, _ = self._values(state.trained, frozen, arrays)
        reference = jnp.zeros_like(old)
        if self._reference is not None:
            reference = self._values(self._reference, frozen, arrays)[1]

        jax.block_until_ready((old, reference))
        began = time.monotonic()
        with together():
            scores = [self._rewards.result(handle) for _, handle in scored]
        waiting = time.monotonic() - began
        total, figures, damaged = self._gathered([rows for rows, _ in scored], scores, damaged)
        total.reshape(-1, g.group)[damaged] = np.nan
        found = advantages(total, g.group, g.scale)
        judged = self.put({"advantage": found.values[self.rows], "live": found.live[self.rows]})
        state, metrics = self._update(state, frozen, arrays | judged | {"old": old, "reference": reference})
        return state, metrics | figures | self._rollouts.figures(drawn) | {
            "reward_spread": found.spread,
            "failed_groups": found.failed,
            "equal_groups": found.equal,
            "damaged": len(damaged),
            "drawing_seconds": drawing,
            "waiting_seconds": waiting,
        }  # fmt: skip

    def _roll_out(
        self, state: TrainState, frozen: Params, step: int, given: Arrays, prompts: Sequence[Prompt]
    ) -> tuple[Arrays, list[tuple[list[int], Any]]]:
        """What is drawn in a step, N rows, and for each part of them the rows that this process has judged, and what
        they are asked for with. A part is judged while the next one is drawn."""
        pipeline = pipeline_of(self.config, self.processor, self.mesh, state, frozen, fast=True)
        keys, size = rollout_keys(self.config.seed, step, len(prompts)), self._grpo.draw_batch or None
        cut, _ = even_batches(len(prompts), size or len(prompts), batch_shards(self.mesh))
        mine, parts, scored = set(self.rows), [], []
        for part in cut:
            rows = [row for row in range(part.start, part.stop) if row in mine]
            own = [prompts[row] for row in rows]
            asked = {name: x[part] for name, x in given.items()}
            try:
                drawn = self._rollouts.draw(pipeline, asked, keys[part], size)
                judged = self._rollouts.judged(pipeline, drawn)
            except NotFinite as error:
                raise Stopped(f"step {step + 1} cannot draw: {error}", STOPPED) from None
            here = [row - part.start for row in rows]
            handle = self._rewards.start(
                judged[here] if isinstance(judged, np.ndarray) else [judged[row] for row in here],
                [prompt.text for prompt in own],
                [prompt.metadata for prompt in own],
            )
            parts.append(drawn)
            scored.append((rows, handle))
        return {name: np.concatenate([drawn[name] for drawn in parts]) for name in parts[0]}, scored

    def _gathered(
        self, rows: Sequence[list[int]], scores: Sequence[Scores], damaged: Sequence[int]
    ) -> tuple[np.ndarray, dict[str, Any], list[int]]:
        """Rewards [N] of what all processes have judged, metrics of them, and the prompts that some process could not
        read."""
        parts = [
            {
                "rows": part,
                "total": one.total.tolist(),
                "columns": {name: list(map(float, column)) for name, column in one.columns.items()},
                "retried": one.retried,
            }
            for part, one in zip(rows, scores, strict=True)
        ]
        # JSON keeps every bit of a float, and NaN.
        told = [json.loads(each) for each in gather(json.dumps({"parts": parts, "damaged": list(damaged)}))]
        everywhere = [part for each in told for part in each["parts"]]
        count = self.config.batch_size
        total, columns = np.full(count, np.nan), {}
        for part in reversed(everywhere):  # rows that several processes hold are the first one's
            total[part["rows"]] = part["total"]
            for name, column in part["columns"].items():
                columns.setdefault(name, np.full(count, np.nan))[part["rows"]] = column
        figures = {"reward": _mean(total), "retried": sum(part["retried"] for part in everywhere)}
        if len(columns) > 1:
            figures |= {f"reward_{name}": _mean(column) for name, column in columns.items()}
        return total, figures, sorted({row for each in told for row in each["damaged"]})

    def close(self) -> None:
        if self._rewards is not None:
            self._rewards.close()


def _mean(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


def rollout_keys(seed: int, step: int, count: int) -> jax.Array:
    """The random keys [count] of what a step draws."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
