"""The updates of a step of GRPO, and of DPO: compiled programs over what was drawn and judged, or over pairs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax.config import IMAGE_CHANNELS
from janus_jax.sharding import computing_dtype, flatten, unflatten
from train.config import TrainConfig, options_of
from train.rl.loss import dpo_metrics, dpo_sums, grpo_metrics, grpo_sums
from train.step.state import Params, TrainState, batch_sharding, state_shardings
from train.step.step import Batch, Objective, Step, Sums, micro_batches, objective_step, update


def make_dpo_step(config: TrainConfig, mesh: Mesh) -> Step:
    """The compiled step of DPO: (state, frozen parameters, batch of `train.rl.loss`) to (state, metrics); the state is
    donated."""
    objective = Objective(functools.partial(dpo_sums, config), "pairs", dpo_metrics, often_empty=True)
    return _compiled(config, mesh, functools.partial(objective_step, config, mesh, objective))


def make_updates(config: TrainConfig, mesh: Mesh) -> Step:
    """The compiled updates of a step of GRPO: (state, frozen parameters, batch of `train.rl.loss`) to (state, metrics);
    the state is donated."""
    return _compiled(config, mesh, functools.partial(updates, config, mesh))


def _compiled(config: TrainConfig, mesh: Mesh, step: Any) -> Step:
    shardings, frozen = state_shardings(config, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, frozen, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=options_of(config.compiler_options) or None,
    )


def updates(
    config: TrainConfig, mesh: Mesh, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, Sums]:
    """`make_updates`'s function, before compilation; the metrics are means over updates, and the last learning rate."""
    objective = Objective(functools.partial(grpo_sums, config), "codes", grpo_metrics, often_empty=True)
    parts, count = config.grpo.updates, config.updates
    batch |= {"damaged": jnp.zeros(batch["live"].shape, jnp.int32)}
    shares = jax.tree.map(lambda x: micro_batches(x, parts), batch)

    def one(state: TrainState, number: jax.Array) -> tuple[TrainState, Sums]:
        share = jax.tree.map(lambda x: x[number % parts], shares)
        return update(config, mesh, objective, state, frozen, share, state.step * count + number - state.skipped)

    if count == 1:
        state, metrics = one(state, jnp.int32(0))
        metrics = {name: x[None] for name, x in metrics.items()}
    else:
        state, metrics = jax.lax.scan(one, state, jnp.arange(count))
    means = {name: jnp.nanmean(x) for name, x in metrics.items()}
    last = {name: metrics[name][-1] for name in ("learning_rate",)}
    state = TrainState(state.step + 1, state.trained, state.opt_state, state.skipped)
    return state, means | last | {"finite": metrics["finite"].min()}


def abstract_rows(config: TrainConfig, mesh: Mesh) -> Batch:
    """`jax.ShapeDtypeStruct`s with shardings of a batch of `train.rl.loss`, as its compiled step takes them."""
    count, codes = config.batch_size, config.drawn
    rows = 2 if config.grpo and config.grpo.guided else 1
    prompt = (count, rows, config.data.context - codes)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"ids": (prompt, jnp.int32), "mask": (prompt, bool)}
    if config.answers:
        most, size = config.data.images_per_row, config.model.vision.image_size
        shapes |= {"tokens": ((count, codes), jnp.int32), "said": ((count, codes), bool)}
        shapes |= {"where": ((count, prompt[-1]), bool)}
        shapes |= {"pixels": ((count, most, size, size, IMAGE_CHANNELS), jnp.float32)} if most else {}
    elif config.grpo:
        shapes |= {"codes": ((count, codes), jnp.int32)}
    if config.grpo:
        shapes |= {"advantage": ((count,), jnp.float32)}
        shapes |= {name: ((count, codes), jnp.float32) for name in ("old", "reference")}
    else:
        shapes |= {name: ((count, codes), jnp.int32) for name in ("chosen", "rejected")}
        shapes |= {"reference": ((count, 2), jnp.float32), "damaged": ((count,), jnp.int32)}
    shapes["live"] = ((count,), jnp.float32)
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def reference_shapes(config: TrainConfig, trained: Params) -> Params:
    """The reference's `jax.ShapeDtypeStruct`s: leaves of `trained`, split so, in the dtypes of computation."""
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, computing_dtype(path, x.dtype, config.compute_dtype), sharding=x.sharding)
        for path, x in flatten(trained).items()
    }
    return unflatten(shapes)
