"""The programs of a step of reinforcement learning, compiled for devices that need not be present, and what they cost.

Their seconds are predictions: what a chip computes and moves, at its data sheet's speeds (`Compiled.least_seconds`).
A step takes longer; which part takes most, and which layout is better, is what they are good for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from janus_jax.processing.images import ImageSettings
from janus_jax.sampling.batches import even_batches
from janus_jax.sampling.cache import pieces
from janus_jax.sharding import batch_shards, make_mesh
from train.config import TrainConfig
from train.plan.drawing import compile_decoding, drawing
from train.plan.executed import executed_flops, least_flops
from train.plan.flops import typical_flops
from train.plan.moved import loop_bytes, program_bytes
from train.plan.programs import (
    Compiled,
    Made,
    compile_lowered,
    devices_of,
    fitting,
    held,
    lower_step,
    placed,
    report,
    shard_bytes,
)
from train.plan.topologies import GIB, Topology
from train.rl.loss import grpo_log_probabilities, pair_log_probabilities
from train.rl.update import abstract_rows, reference_shapes
from train.step.leaves import joined
from train.step.pipeline import model_for_drawing, params_for_drawing
from train.step.state import Params, abstract_state
from train.step.step import make_row_values
from train.validate import check_mesh

ROLLOUT, SCORING, UPDATE = "rollout", "log-probabilities", "update"
_DECODED = 16  # pictures that a device decodes at a time at most, see `janus_jax.sampling.batches.pictures_at_a_time`


def compile_reinforcement(config: TrainConfig, place: Topology) -> Iterator[Compiled]:
    """All programs of a step of `config.grpo` or `config.dpo` on `place`, in the order in which they run.

    Rewards are no part of it, and neither is the rollout of answers, which takes as long as they are. Codes are drawn
    one after the other, which is the default where a mesh splits the pictures; `draw_batch=0`, as many as fit, is
    compiled as all pictures of a step.
    """
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices_of(place))
    check_mesh(config, mesh)
    step = _Step(config, place, mesh)
    with fitting(config, place):
        if config.dpo:
            yield from step.reference()
        else:
            yield from itertools.chain(() if config.answers else step.rollout(), step.scoring())
        yield step.update()


class _Step:
    """Compiles the programs of one step; each is reported with all that lies on a device beside it."""

    def __init__(self, config: TrainConfig, place: Topology, mesh: Mesh):
        self._config, self._place, self._mesh = config, place, mesh
        self._state, self._frozen = abstract_state(config, mesh)
        self._held = held(config, self._state, self._frozen)
        self._rows = abstract_rows(config, mesh)

    def rollout(self) -> Iterator[Compiled]:
        config, mesh, g = self._config, self._mesh, self._config.grpo
        whole, params = params_for_drawing(config, mesh), joined(self._state.trained, self._frozen)
        gathered = compile_lowered(whole.lower(params))
        yield self._report(ROLLOUT, "weights for drawing", {}, gathered)
        weights = placed(whole.eval_shape(params), gathered.compiled.output_shardings)
        beside = {"drawn with": shard_bytes(weights)}

        total, shards = config.batch_size, batch_shards(mesh)
        cut, images = even_batches(total, g.draw_batch or total, shards)
        rows, prompt = self._rows["ids"].shape[1:]
        model, truncated = model_for_drawing(config), g.top_k > 0 or g.top_p < 1
        made = drawing(mesh, model, weights, images, prompt, rows, truncated)
        yield self._report(ROLLOUT, f"prefill of {images}", beside, made.prefill, len(cut))
        codes = config.model.gen_vision.num_tokens
        runs = [(size, stop - start) for size, start, stop in pieces(made.slots, prompt, codes, codes)]
        # The cache is compiled at its largest; a smaller one is less to read.
        unread = made.cache * (1 - sum(size * steps for size, steps in runs) / (made.slots[-1] * (codes - 1)))
        yield self._report(
            ROLLOUT, f"a code of {images}", beside | {"cache": made.cache}, made.loop, len(cut) * (codes - 1),
            accessed=loop_bytes(made.loop.text) - unread, floor=made.floor - unread, copies=made.copies,
        )  # fmt: skip
        parts, decoded = even_batches(images, _DECODED * shards, shards)
        decode = compile_decoding(mesh, model, weights, decoded)
        yield self._report(ROLLOUT, f"VQ decode of {decoded}", beside, decode, len(cut) * len(parts))

    def scoring(self) -> Iterator[Compiled]:
        judged = ("old", "reference", "advantage", "live")
        names = [name for name in self._rows if name not in judged]
        yield self._values(SCORING, "of the model that drew", grpo_log_probabilities, self._state.trained, names)
        if self._config.grpo.kl:
            reference = reference_shapes(self._config, self._state.trained)
            yield self._values(SCORING, "of the reference", grpo_log_probabilities, reference, names)

    def reference(self) -> Iterator[Compiled]:
        """DPO's, which is computed once for all pairs and in no step."""
        names = ("ids", "mask", "chosen", "rejected")
        name = "of the reference, once"
        yield self._values(SCORING, name, pair_log_probabilities, self._state.trained, names, runs=0)

    def update(self) -> Compiled:
        config = self._config
        lowered, _ = lower_step(config, self._mesh, ImageSettings(config.model.vision.image_size))
        with jax.set_mesh(self._mesh):
            made = compile_lowered(lowered)
        needed = least_flops(config) / self._place.chips
        updates = f"{config.updates} updates" if config.updates > 1 else "update"
        return self._report(UPDATE, updates, self._batch(*self._rows), made, flops=typical_flops(config), needed=needed)

    def _values(
        self, part: str, name: str, values: Any, trained: Params, names: Sequence[str], runs: int = 1
    ) -> Compiled:
        config, mesh = self._config, self._mesh
        of_rows = make_row_values(config, mesh, functools.partial(values, config))
        with jax.set_mesh(mesh):
            lowered = of_rows.lower(trained, self._frozen, {name: self._rows[name] for name in names})
            made = compile_lowered(lowered)
        return self._report(part, name, self._batch(*names), made, runs)

    def _batch(self, *names: str) -> dict[str, int]:
        return {"batch": shard_bytes({name: self._rows[name] for name in names})}

    def _report(
        self, part: str, name: str, beside: dict[str, int], made: Made, runs: float = 1, **more: Any
    ) -> Compiled:
        usual = {"executed": executed_flops(made.text), "accessed": program_bytes(made.text)}
        return report(
            f"{self._config.name} {part}: {name}", self._place, self._mesh, self._held | beside, made, part=part,
            runs=runs, accumulate=self._config.accumulate, **usual | more,
        )  # fmt: skip


# ---------------------------------------------------------------- what a step takes


def step_table(config: TrainConfig, made: Sequence[Compiled]) -> Iterator[str]:
    """Lines on a step of these programs: a Markdown table of its parts, and how many steps there are in an hour."""
    seconds = {part: sum(one.runs * one.least_seconds for one in made if one.part == part) for part in _parts(made)}
    step, place = sum(seconds.values()), made[0].place
    peak = max(one.peak for one in made)
    fits = "fits" if all(one.fits for one in made) else "does not fit with 5% to spare"
    yield (
        f"a step of {config.name} on {place.name}: peak {peak / GIB:.2f} GiB of {place.hbm / GIB:.2f} a chip, {fits}; "
        f"at least {step:.2f} s (predicted)"
    )
    yield "| part | peak, GiB | TFLOP a chip | GiB moved a chip | s at least (predicted) | share |"
    yield "|---|---|---|---|---|---|"
    for part, own in seconds.items():
        programs = [one for one in made if one.part == part]
        flops, moved = (sum(one.runs * getattr(one, key) for one in programs) for key in ("executed", "accessed"))
        highest = max(one.peak for one in programs) / GIB
        yield f"| {part} | {highest:.2f} | {flops / 1e12:.1f} | {moved / GIB:.0f} | {own:.3f} | {own / step:.0%} |"
    hourly = 3600 / step
    if config.answers:
        yield "their rollout, which takes as long as they are, is not counted"
    elif config.grpo:
        groups = f"{config.batch_size // config.grpo.group:,} groups of {config.grpo.group}"
        yield (
            f"at most {hourly:,.0f} steps of {groups} an hour, {hourly * config.batch_size:,.0f} pictures (predicted; "
            "rewards are not counted)"
        )
    else:
        yield f"at most {hourly:,.0f} steps of {config.batch_size} pairs an hour (predicted)"


def _parts(made: Sequence[Compiled]) -> list[str]:
    return list(dict.fromkeys(one.part for one in made if one.runs))
