"""One training step: gradients of what is trained over a batch of packed rows, and the update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from janus_jax.model.janus import Janus
from janus_jax.processing.images import ImageSettings
from janus_jax.sharding import RULES, axes_by_hand, cast, gather_but_layers
from train.config import TrainConfig, options_of
from train.step.leaves import joined
from train.step.loss import token_sums, token_values
from train.step.state import (
    Params,
    TrainState,
    batch_sharding,
    learning_rate,
    make_model,
    make_optimizer,
    state_shardings,
)

# float16: gradients of attention scores are far below its least normal number, 6e-5, and those of a spike above 65,504.
# So losses are multiplied by the first of these scales with which all gradients are finite.
_SCALES = (2.0**8, 1.0, 2.0**-8)

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run minimizes: a sum over the rows of a batch, divided by a count of what is in them.

    Attributes:
      sums: (model, parameters, batch) to sums over a device's rows, float32 scalars: 'loss', the count, and others.
      count: name of the count.
      metrics: from these sums over all rows to the step's metrics.
      often_empty: whether a batch may well have nothing that counts; then no update is made.
    """

    sums: Callable[[Janus, Params, Batch], Sums]
    count: str = "tokens"
    metrics: Callable[[Sums], Sums] = dict
    often_empty: bool = False


def supervised(config: TrainConfig, settings: ImageSettings) -> Objective:
    """The cross entropy of packed rows."""

    def sums(model: Janus, params: Params, batch: Batch) -> Sums:
        scaled = config.compute_dtype == "float16"
        total, values = token_values(model, params, batch, settings, config.loss_chunk, scaled)
        return token_sums(values, batch["tasks"]) | {"loss": total}

    return Objective(sums)


def make_train_step(config: TrainConfig, mesh: Mesh, settings: ImageSettings) -> Step:
    """The compiled step: (state, frozen parameters, batch) to (state, metrics); the state is donated.

    Metrics are float32 scalars: the sums of `loss.token_sums`, the number of 'damaged' samples, 'grad_norm' before
    clipping, 'learning_rate', and 'finite', which is 0 if the loss or a gradient is not finite, so that the update was
    skipped. All of them reach metrics.jsonl and TensorBoard as `train/<name>`: one value for the steps since the last
    line, combined by `loss.combined`; for the gradient norm and the learning rate, the last step's. To add a metric
    of the step, add a key to `metrics` in `train_step`, and nothing else; for one of the tokens, a name to
    `loss.PER_TOKEN` and its value to `loss._of_tokens`.

    Call it under `jax.set_mesh(mesh)`.
    """
    shardings, frozen = state_shardings(config, mesh)
    return jax.jit(
        functools.partial(train_step, config, mesh, settings),
        in_shardings=(shardings, frozen, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=options_of(config.compiler_options) or None,
    )


def make_eval_step(config: TrainConfig, mesh: Mesh, settings: ImageSettings) -> Callable[[Params, Params, Batch], Any]:
    """The compiled function from (trained parameters, frozen parameters, batch) to the sums of `loss.token_sums`."""
    shardings, frozen = state_shardings(config, mesh)
    evaluate = _make_sums(config, mesh, supervised(config, settings))
    return jax.jit(evaluate, in_shardings=(shardings.trained, frozen, batch_sharding(mesh)))


def train_step(
    config: TrainConfig, mesh: Mesh, settings: ImageSettings, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`make_train_step`'s function, before compilation."""
    return objective_step(config, mesh, supervised(config, settings), state, frozen, batch)


def objective_step(
    config: TrainConfig, mesh: Mesh, objective: Objective, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, Sums]:
    """The step of any objective, of one update; before compilation."""
    state, metrics = update(config, mesh, objective, state, frozen, batch, state.step - state.skipped)
    return dataclasses.replace(state, step=state.step + 1), metrics


def update(
    config: TrainConfig, mesh: Mesh, objective: Objective, state: TrainState, frozen: Params, batch: Batch, done: Any
) -> tuple[TrainState, Sums]:
    """One update, which leaves `state.step` as it is; `done` are the updates before it, which the schedule counts."""
    grads, sums = _gradients(config, mesh, objective, state.trained, frozen, batch)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
    taken = finite & (sums[objective.count] > 0) if objective.often_empty else finite

    optimizer = make_optimizer(config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(taken, new, old), (trained, opt_state), (state.trained, state.opt_state)
    )
    metrics = objective.metrics(sums) | {
        "damaged": batch["damaged"].sum(dtype=jnp.float32),
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate(config.optimizer, config.steps * config.updates)(done), jnp.float32),
        "finite": finite.astype(jnp.float32),
    }
    skipped = state.skipped + jnp.where(taken, 0, 1)
    return TrainState(state.step, trained, opt_state, skipped), metrics


def gradients(
    config: TrainConfig, mesh: Mesh, settings: ImageSettings, trained: Params, frozen: Params, batch: Batch
) -> tuple[Params, Sums]:
    """Gradients of the mean loss per target token with respect to `trained`, and the batch's `token_sums`.

    The batch is split into `config.accumulate` micro-batches, whose sums are added in float32 and divided once. Each
    device computes its share of a micro-batch's gradients in `config.compute_dtype`; the shares are summed over `fsdp`
    with each micro-batch, and over `data` and `slices` once, in `config.reduce_dtype`: with 'bfloat16' each share and
    each partial sum keeps 8 bits of mantissa; with 'float32' only the products before are rounded, and twice as many
    bytes are sent. A float32 run always sums in float32, and so does one in float16, where losses are scaled too. The
    returned gradients are float32 either way.
    """
    return _gradients(config, mesh, supervised(config, settings), trained, frozen, batch)


def _gradients(
    config: TrainConfig, mesh: Mesh, objective: Objective, trained: Params, frozen: Params, batch: Batch
) -> tuple[Params, Sums]:
    gradients_of_sums = _make_gradients(config, mesh, objective, trained, frozen, batch)
    if config.compute_dtype == "float16":
        grads, sums = _scaled(gradients_of_sums)
    else:
        grads, sums = gradients_of_sums(np.float32(1))
    count = jnp.maximum(sums[objective.count], 1)
    return jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads), sums


def _scaled(gradients_of_sums: Callable[[jax.Array], Any]) -> Any:
    """`gradients_of_sums` with the first of _SCALES for which they are finite, unless the loss itself is not."""
    scales = jnp.asarray(_SCALES, jnp.float32)

    def unfinished(carry: Any) -> jax.Array:
        tries, grads, sums = carry
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        return (tries == 0) | ((tries < len(_SCALES)) & jnp.isfinite(sums["loss"]) & ~finite)

    def attempt(carry: Any) -> Any:
        tries = carry[0]
        grads, sums = gradients_of_sums(scales[tries])
        return tries + 1, jax.tree.map(lambda g: g.astype(jnp.float32) / scales[tries], grads), sums

    abstract = jax.eval_shape(lambda: attempt((jnp.int32(0),)))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    return jax.lax.while_loop(unfinished, attempt, start)[1:]


def _make_gradients(
    config: TrainConfig, mesh: Mesh, objective: Objective, trained: Params, frozen: Params, batch: Batch
) -> Callable[[Any], tuple[Params, dict[str, jax.Array]]]:
    """From a scale to the gradients of the scaled sum of losses, and the sums themselves."""
    manual, rows = axes_by_hand(mesh), PartitionSpec(RULES["batch"])
    specs, frozen_specs = _specs(config, mesh, manual)
    # How the compiler splits what each device adds up.
    left = jax.tree.map(lambda spec: _only(spec, set(mesh.axis_names) - manual), _specs(config, mesh)[0])
    sums_of = _sums_of_device(config, mesh, objective)

    def local(trained: Params, frozen: Params, batch: Batch, scale: Any):
        def loss(trained: Params, micro_batch: Batch):
            sums = sums_of(trained, frozen, micro_batch)
            return sums["loss"] * scale, sums

        gradient = jax.grad(loss, has_aux=True)
        if config.accumulate == 1:
            grads, sums = gradient(trained, batch)
        else:
            parts = jax.tree.map(lambda x: micro_batches(x, config.accumulate), batch)
            abstract = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], parts))
            zeros, no_sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), abstract)
            if manual != set(mesh.axis_names):
                zeros = jax.tree.map(jax.lax.with_sharding_constraint, zeros, left)

            def add(total, micro_batch: Batch):
                new = gradient(trained, micro_batch)
                return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new), None

            grads, sums = jax.lax.scan(add, (zeros, no_sums), parts)[0]
        grads = jax.tree.map(lambda g, x, spec: _over_devices(g, x.dtype, spec, mesh), grads, trained, specs)
        return grads, jax.tree.map(lambda x: x[None], sums)

    of_devices = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, frozen_specs, rows, PartitionSpec()), out_specs=(specs, rows),
        axis_names=manual, check_vma=False,
    )  # fmt: skip
    # Cast once, not for every micro-batch.
    narrow = trained if _summed_in_float32(config) else cast(trained, config.compute_dtype)

    def of(scale: Any):
        grads, sums = of_devices(narrow, frozen, batch, scale)
        return grads, jax.tree.map(lambda x: x.sum(0), sums)

    return of


def _over_devices(grad: jax.Array, dtype: Any, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """The sum of `grad` over the axes that split rows and not this parameter; the others' were scattered as computed.

    After the last micro-batch, since every sum over slices goes through the data-center network. TPU's compiler makes
    of one over `slices` and `data` a reduce-scatter within each slice, a sum of the shards over slices, and a gather.
    """
    axes = tuple(axis for axis in RULES["batch"] if mesh.shape[axis] > 1 and axis not in spec)
    return jax.lax.psum(grad.astype(dtype), axes) if axes else grad


def _summed_in_float32(config: TrainConfig) -> bool:
    return config.reduce_dtype == "float32" or config.compute_dtype == "float16"


def micro_batches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], with each device keeping its rows."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _make_sums(config: TrainConfig, mesh: Mesh, objective: Objective) -> Callable[[Params, Params, Batch], Any]:
    """(trained parameters, frozen parameters, batch) to `token_sums`."""
    manual, rows = axes_by_hand(mesh), PartitionSpec(RULES["batch"])
    sums_of = _sums_of_device(config, mesh, objective)
    of_devices = jax.shard_map(
        lambda *args: jax.tree.map(lambda x: x[None], sums_of(*args)),
        mesh=mesh,
        in_specs=(*_specs(config, mesh, manual), rows),
        out_specs=rows,
        axis_names=manual,
        check_vma=False,
    )
    return lambda *args: jax.tree.map(lambda x: x.sum(0), of_devices(*args))


def _sums_of_device(config: TrainConfig, mesh: Mesh, objective: Objective) -> Callable[[Params, Params, Batch], Sums]:
    """(trained parameters, frozen parameters, batch) to the objective's sums of one device's rows."""
    model, params_of = make_model(config, mesh), _params_of_device(config)
    return lambda trained, frozen, batch: objective.sums(model, params_of(trained, frozen), batch)


def _params_of_device(config: TrainConfig) -> Callable[[Params, Params], Params]:
    """(trained parameters, frozen parameters) to all that a device computes with, inside `jax.shard_map`.

    The device gathers over `fsdp` the parameters that it needs, layer by layer. This is written out, since the compiler
    would reduce the gradients of the heads again for every chunk of a row, and all others as if each device needed them
    whole.
    """

    def params_of(trained: Params, frozen: Params) -> Params:
        if not _summed_in_float32(config):
            trained = cast(trained, config.compute_dtype)
        return gather_but_layers(joined(trained, cast(frozen, config.compute_dtype)), config.compute_dtype)

    return params_of


def make_row_values(
    config: TrainConfig, mesh: Mesh, values: Callable[[Janus, Params, Batch], Any]
) -> Callable[[Params, Params, Batch], Any]:
    """The compiled function from (trained parameters, frozen parameters, batch) to `values`, arrays with a row for each
    of the batch, which are computed in as many micro-batches as an update's."""
    manual, rows = axes_by_hand(mesh), PartitionSpec(RULES["batch"])
    model, params_of = make_model(config, mesh), _params_of_device(config)

    def local(trained: Params, frozen: Params, batch: Batch):
        params = params_of(trained, frozen)
        if config.accumulate == 1:
            return values(model, params, batch)
        parts = jax.tree.map(lambda x: micro_batches(x, config.accumulate), batch)
        found = jax.lax.map(functools.partial(values, model, params), parts)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)

    of_devices = jax.shard_map(
        local, mesh=mesh, in_specs=(*_specs(config, mesh, manual), rows), out_specs=rows, axis_names=manual,
        check_vma=False,
    )  # fmt: skip
    return jax.jit(of_devices, compiler_options=options_of(config.compiler_options) or None)


def _specs(config: TrainConfig, mesh: Mesh, axes: set[str] | None = None) -> tuple[Params, Params]:
    """The PartitionSpecs of the trained and the frozen parameters, of those `axes` alone (default: all)."""
    shardings, frozen = state_shardings(config, mesh)
    axes = set(mesh.axis_names) if axes is None else axes
    return jax.tree.map(lambda s: _only(s.spec, axes), (shardings.trained, frozen))


def _only(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    """`spec` with those mesh axes alone."""
    return PartitionSpec(*(name if name in axes else None for name in spec))
