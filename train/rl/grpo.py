"""A step of GRPO: pictures are drawn, judged and compared with those of the same prompt, and the model is updated."""

from __future__ import annotations

import functools
import json
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
from janus_jax.sampling.sampler import Options
from janus_jax.sharding import batch_shards, computing_dtype, flatten, unflatten
from train.config import TrainConfig
from train.data.work import Batches, Work
from train.rl.advantages import advantages
from train.rl.config import GrpoConfig
from train.rl.loss import grpo_log_probabilities
from train.rl.prompts import Prompt, padded, read_prompts
from train.rl.rewards import Rewards, Scores
from train.rl.update import make_updates
from train.run.distributed import together
from train.run.faults import STOPPED, Stopped
from train.step.earlier import REFERENCE
from train.step.pipeline import pipeline_of
from train.step.state import Params, TrainState
from train.step.step import make_row_values


class Grpo(Work):
    """Pictures of prompts, and the updates that follow from their rewards."""

    curves = tuple(f"train/{name}" for name in ("reward", "reward_spread", "kl", "entropy", "clip_share", "distinct"))

    def __init__(self, config: TrainConfig, mesh: Mesh, processor: Processor):
        super().__init__(config, mesh, processor)
        self._grpo, self._codes = config.grpo, config.model.gen_vision.num_tokens
        self._longest = config.data.context - self._codes
        self._prompts = read_prompts(config.grpo.prompts, processor, self._longest, config.seed)
        self._rewards: Rewards | None = None
        self._reference: Params | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        return self._prompts.fingerprints

    def about(self, first: int) -> str:
        g, count = self._grpo, self.config.batch_size
        updates = f"{self.config.updates} update{'s' if self.config.updates > 1 else ''}"
        return f"{g.group} pictures of each of {count // g.group} of {len(self._prompts.prompts)} prompts, {updates}"

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
        dtype = self.config.compute_dtype
        shapes = {
            path: jax.ShapeDtypeStruct(x.shape, computing_dtype(path, x.dtype, dtype), sharding=x.sharding)
            for path, x in flatten(state.trained).items()
        }
        return {REFERENCE: unflatten(shapes)}

    # ------------------------------------------------------------ a step

    def begin(self, kept: Params) -> None:
        self._reference = kept.get(REFERENCE)
        with together():
            self._rewards = Rewards(self._grpo.rewards)
        self._options = drawing_options(self._grpo)
        self._values = make_row_values(self.config, self.mesh, functools.partial(grpo_log_probabilities, self.config))
        self._update = make_updates(self.config, self.mesh)

    def batches(self, first: int) -> Batches:
        count, tokens = self.config.batch_size, self.config.batch_size * self._codes
        report = {"tokens": tokens, "samples": count, "images": 0, "left_out": 0, "problems": []}
        for step in range(first, self.config.steps):
            prompts = self._prompts.of_step(step, count // self._grpo.group)
            yield step, (step, prompts), report | {"sample_length": float(self.config.data.context)}

    def step(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        step, prompts = batch
        g = self._grpo
        drawn = [prompt for prompt in prompts for _ in range(g.group)]
        given = padded([prompt.ids for prompt in drawn], self.processor, self._longest, g.guided)
        codes, scored = self._roll_out(state, frozen, step, given, drawn)

        whole = given | {"codes": codes}
        arrays = self.put({name: x[self.rows] for name, x in whole.items()})
        old, _ = self._values(state.trained, frozen, arrays)
        reference = jnp.zeros_like(old)
        if self._reference is not None:
            reference = self._values(self._reference, frozen, arrays)[1]

        with together():
            scores = [self._rewards.result(handle) for _, handle in scored]
        total, figures = self._gathered([rows for rows, _ in scored], scores)
        found = advantages(total, g.group, g.scale)
        judged = self.put({"advantage": found.values[self.rows], "live": found.live[self.rows]})
        state, metrics = self._update(state, frozen, arrays | judged | {"old": old, "reference": reference})
        return state, metrics | figures | {
            "reward_spread": found.spread,
            "failed_groups": found.failed,
            "equal_groups": found.equal,
            "distinct": len(np.unique(codes, axis=0)) / len(codes),
        }  # fmt: skip

    def _roll_out(
        self, state: TrainState, frozen: Params, step: int, given: dict[str, np.ndarray], drawn: Sequence[Prompt]
    ) -> tuple[np.ndarray, list[tuple[list[int], Any]]]:
        """Codes [N, C] of a step's pictures, and for each part of them the rows that this process has judged, and what
        they are asked for with. A part is judged while the next one is drawn."""
        pipeline = pipeline_of(self.config, self.processor, self.mesh, state, frozen, fast=True)
        keys = rollout_keys(self.config.seed, step, len(drawn))
        cut, _ = even_batches(len(drawn), self._grpo.draw_batch or len(drawn), batch_shards(self.mesh))
        mine, codes, scored = set(self.rows), [], []
        for part in cut:
            try:
                size = self._grpo.draw_batch or None
                one = pipeline.sample_codes(
                    given["ids"][part], given["mask"][part], keys[part], self._options, batch_size=size,
                    progress=False, speculate=False,
                )  # fmt: skip
                pictures = pipeline.decode_codes(one)
            except NotFinite as error:
                raise Stopped(f"step {step + 1} cannot draw: {error}", STOPPED) from None
            rows = [row for row in range(part.start, part.stop) if row in mine]
            own = [drawn[row] for row in rows]
            handle = self._rewards.start(
                pictures[[row - part.start for row in rows]],
                [prompt.text for prompt in own],
                [prompt.metadata for prompt in own],
            )
            codes.append(one)
            scored.append((rows, handle))
        return np.concatenate(codes), scored

    def _gathered(self, rows: Sequence[list[int]], scores: Sequence[Scores]) -> tuple[np.ndarray, dict[str, Any]]:
        """Rewards [N] of all processes' pictures, and metrics of them."""
        own = [
            {
                "rows": part,
                "total": one.total.tolist(),
                "columns": {name: list(map(float, column)) for name, column in one.columns.items()},
                "retried": one.retried,
            }
            for part, one in zip(rows, scores, strict=True)
        ]
        # JSON keeps every bit of a float, and NaN.
        everywhere = [part for told in gather(json.dumps(own)) for part in json.loads(told)]
        count = self.config.batch_size
        total, columns = np.full(count, np.nan), {}
        for part in reversed(everywhere):  # rows that several processes hold are the first one's
            total[part["rows"]] = part["total"]
            for name, column in part["columns"].items():
                columns.setdefault(name, np.full(count, np.nan))[part["rows"]] = column
        figures = {"reward": _mean(total), "retried": sum(part["retried"] for part in everywhere)}
        if len(columns) > 1:
            figures |= {f"reward_{name}": _mean(column) for name, column in columns.items()}
        return total, figures

    def close(self) -> None:
        if self._rewards is not None:
            self._rewards.close()


def _mean(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


def drawing_options(grpo: GrpoConfig) -> Options:
    """The settings with which pictures are drawn."""
    weight = grpo.guidance if grpo.guided else 1.0
    return Options(temperature=grpo.temperature, top_k=grpo.top_k or None, top_p=grpo.top_p, cfg_weight=weight)


def rollout_keys(seed: int, step: int, count: int) -> jax.Array:
    """The random keys [count] of a step's pictures."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
