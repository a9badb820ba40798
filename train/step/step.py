"""One training step: gradients of what is trained over a batch of packed rows, and the update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

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
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


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
    evaluate = _make_sums(config, mesh, settings)
    return jax.jit(evaluate, in_shardings=(shardings.trained, frozen, batch_sharding(mesh)))


def train_step(
    config: TrainConfig, mesh: Mesh, settings: ImageSettings, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`make_train_step`'s function, before compilation."""
    grads, sums = gradients(config, mesh, settings, state.trained, frozen, batch)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)

    optimizer = make_optimizer(config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (trained, opt_state), (state.trained, state.opt_state)
    )
    done = state.step - state.skipped  # the updates, which the schedule counts
    metrics = sums | {
        "damaged": batch["damaged"].sum(dtype=jnp.float32),
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate(config.optimizer, config.steps)(done), jnp.float32),
        "finite": finite.astype(jnp.float32),
    }
    skipped = state.skipped + jnp.where(finite, 0, 1)
    return TrainState(state.step + 1, trained, opt_state, skipped), metrics


def gradients(
    config: TrainConfig, mesh: Mesh, settings: ImageSettings, trained: Params, frozen: Params, batch: Batch
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradients of the mean loss per target token with respect to `trained`, and the batch's `token_sums`.

    The batch is split into `config.accumulate` micro-batches, whose sums are added in float32 and divided once. Each
    device computes its share of a micro-batch's gradients in `config.compute_dtype`; the shares are summed over `fsdp`
    with each micro-batch, and over `data` and `slices` once, in `config.reduce_dtype`: with 'bfloat16' each share and
    each partial sum keeps 8 bits of mantissa; with 'float32' only the products before are rounded, and twice as many
    bytes are sent. A float32 run always sums in float32, and so does one in float16, where losses are scaled too. The
    returned gradients are float32 either way.
    """
    gradients_of_sums = _make_gradients(config, mesh, settings, trained, frozen, batch)
    if config.compute_dtype == "float16":
        grads, sums = _scaled(gradients_of_sums)
    else:
        grads, sums = gradients_of_sums(np.float32(1))
    count = jnp.maximum(sums["tokens"], 1)
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
    config: TrainConfig, mesh: Mesh, settings: ImageSettings, trained: Params, frozen: Params, batch: Batch
) -> Callable[[Any], tuple[Params, dict[str, jax.Array]]]:
    """From a scale to the gradients of the scaled sum of losses, and the sums themselves."""
    manual, rows = axes_by_hand(mesh), PartitionSpec(RULES["batch"])
    specs, frozen_specs = _specs(config, mesh, manual)
    # How the compiler splits what each device adds up.
    left = jax.tree.map(lambda spec: _only(spec, set(mesh.axis_names) - manual), _specs(config, mesh)[0])
    sums_of = _sums_of_device(config, mesh, settings)

    def local(trained: Params, frozen: Params, batch: Batch, scale: Any):
        def loss(trained: Params, micro_batch: Batch):
            sums = sums_of(trained, frozen, micro_batch)
            return sums["loss"] * scale, sums

        objective = jax.grad(loss, has_aux=True)
        if config.accumulate == 1:
            grads, sums = objective(trained, batch)
        else:
            micro_batches = jax.tree.map(lambda x: _micro_batches(x, config.accumulate), batch)
            abstract = jax.eval_shape(objective, trained, jax.tree.map(lambda x: x[0], micro_batches))
            zeros, no_sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), abstract)
            if manual != set(mesh.axis_names):
                zeros = jax.tree.map(jax.lax.with_sharding_constraint, zeros, left)

            def add(total, micro_batch: Batch):
                new = objective(trained, micro_batch)
                return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new), None

            grads, sums = jax.lax.scan(add, (zeros, no_sums), micro_batches)[0]
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


def _micro_batches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], with each device keeping its rows."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _make_sums(config: TrainConfig, mesh: Mesh, settings: ImageSettings) -> Callable[[Params, Params, Batch], Any]:
    """(trained parameters, frozen parameters, batch) to `token_sums`."""
    manual, rows = axes_by_hand(mesh), PartitionSpec(RULES["batch"])
    sums_of = _sums_of_device(config, mesh, settings)
    of_devices = jax.shard_map(
        lambda *args: jax.tree.map(lambda x: x[None], sums_of(*args)),
        mesh=mesh,
        in_specs=(*_specs(config, mesh, manual), rows),
        out_specs=rows,
        axis_names=manual,
        check_vma=False,
    )
    return lambda *args: jax.tree.map(lambda x: x.sum(0), of_devices(*args))


def _sums_of_device(
    config: TrainConfig, mesh: Mesh, settings: ImageSettings
) -> Callable[[Params, Params, Batch], dict[str, jax.Array]]:
    """(trained parameters, frozen parameters, batch) to `token_sums` of one device's rows, inside `jax.shard_map`.

    The device gathers over `fsdp` the parameters that it needs, layer by layer. This is written out, since the compiler
    would reduce the gradients of the heads again for every chunk of a row, and all others as if each device needed them
    whole.
    """
    model = make_model(config, mesh)

    def sums_of(trained: Params, frozen: Params, batch: Batch):
        if not _summed_in_float32(config):
            trained = cast(trained, config.compute_dtype)
        params = gather_but_layers(joined(trained, cast(frozen, config.compute_dtype)), config.compute_dtype)
        return token_sums(token_values(model, params, batch, settings, config.loss_chunk), batch["tasks"])

    return sums_of


def _specs(config: TrainConfig, mesh: Mesh, axes: set[str] | None = None) -> tuple[Params, Params]:
    """The PartitionSpecs of the trained and the frozen parameters, of those `axes` alone (default: all)."""
    shardings, frozen = state_shardings(config, mesh)
    axes = set(mesh.axis_names) if axes is None else axes
    return jax.tree.map(lambda s: _only(s.spec, axes), (shardings.trained, frozen))


def _only(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    """`spec` with those mesh axes alone."""
    return PartitionSpec(*(name if name in axes else None for name in spec))
