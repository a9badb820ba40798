"""One training step: gradients of the trained subtrees over a batch of packed rows, and the update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from janus_jax.images import ImageSettings
from janus_jax.model import Janus
from train.config import TrainConfig
from train.loss import loss_sums, token_losses
from train.state import Params, TrainState, batch_sharding, learning_rate, make_model, make_optimizer, state_shardings

Batch = dict[str, jax.Array]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(config: TrainConfig, mesh: Mesh, settings: ImageSettings) -> Step:
    """The compiled step: (state, frozen parameters, batch) to (state, metrics); the state is donated.

    Metrics are float32 scalars: the sums of `loss.loss_sums`, the samples 'damaged', 'grad_norm' before clipping,
    'learning_rate', and 'finite', 0 where the loss or a gradient is not finite and the update was therefore left out.
    Call it under `jax.set_mesh(mesh)`.
    """
    shardings, frozen = state_shardings(config, mesh)
    return jax.jit(
        functools.partial(train_step, config, make_model(config, mesh), settings),
        in_shardings=(shardings, frozen, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def make_eval_step(config: TrainConfig, mesh: Mesh, settings: ImageSettings) -> Callable[[Params, Params, Batch], Any]:
    """(trained parameters, frozen parameters, batch) to the sums of `loss.loss_sums`, compiled."""
    shardings, frozen = state_shardings(config, mesh)
    model = make_model(config, mesh)

    def evaluate(trained: Params, frozen: Params, batch: Batch):
        return _sums(config, model, settings, trained, frozen, batch)[1]

    return jax.jit(evaluate, in_shardings=(shardings.trained, frozen, batch_sharding(mesh)))


def train_step(
    config: TrainConfig, model: Janus, settings: ImageSettings, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`make_train_step`'s function, before compilation."""
    grads, sums = gradients(config, model, settings, state.trained, frozen, batch)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)

    optimizer = make_optimizer(config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (trained, opt_state), (state.trained, state.opt_state)
    )
    done = state.step - state.skipped  # updates, which is what the schedule counts
    metrics = sums | {
        "damaged": batch["damaged"].sum(dtype=jnp.float32),
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate(config.optimizer, config.steps)(done), jnp.float32),
        "finite": finite.astype(jnp.float32),
    }
    skipped = state.skipped + jnp.where(finite, 0, 1)
    return TrainState(state.step + 1, trained, opt_state, skipped), metrics


def gradients(
    config: TrainConfig, model: Janus, settings: ImageSettings, trained: Params, frozen: Params, batch: Batch
) -> tuple[Params, dict[str, jax.Array]]:
    """Float32 gradients of the mean loss a target token with regard to `trained`, and the batch's `loss_sums`.

    The batch is worked off in `config.accumulate` parts whose sums are added up and divided once.
    """
    cast = _compute_copy(config, trained)  # once, and not in every part
    objective = jax.grad(lambda trained, part: _sums(config, model, settings, trained, frozen, part), has_aux=True)

    def add(total, part: Batch):
        new = objective(cast, part)
        return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new), None

    if config.accumulate == 1:
        grads, sums = objective(cast, batch)
    else:
        parts = jax.tree.map(lambda x: _parts(x, config.accumulate), batch)
        abstract = jax.eval_shape(objective, cast, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), abstract)
        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    count = jnp.maximum(sums["tokens"], 1)
    return jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads), sums


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], each device keeping its rows."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _compute_copy(config: TrainConfig, params: Params) -> Params:
    """`params` in the compute dtype, but for the heads: their gradients are summed up over the chunks of a row."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if {"gen_head", "lm_head"} & {key.key for key in path} else x.astype(config.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _sums(config: TrainConfig, model: Janus, settings: ImageSettings, trained: Params, frozen: Params, batch: Batch):
    params = {**_compute_copy(config, frozen), **_compute_copy(config, trained)}
    losses = token_losses(model, params, batch, settings, config.loss_chunk)
    sums = loss_sums(losses, batch["tasks"])
    return sums["loss"], sums
