"""The state that a run carries from step to step, its shardings on the mesh, the model and the optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.config import IMAGE_CHANNELS
from janus_jax.model.attention import takes
from janus_jax.model.janus import Janus
from janus_jax.sharding import RULES, param_shardings
from train.config import OptimizerConfig, TrainConfig
from train.step.leaves import abstract_leaves, joined, split_leaves

Params = dict[str, Any]
_DECAYING = ("kernel", "embedding", "lora_a", "lora_b")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, the steps taken, which is also the index of the next batch.
      trained: the float32 parameters of the stage's trained parts, or of the adapter.
      opt_state: optax's state, for `trained` only.
      skipped: int32 scalar, the steps whose update was skipped because it was not finite.
    """

    step: jax.Array
    trained: Params
    opt_state: Any
    skipped: jax.Array


def make_model(config: TrainConfig, mesh: Mesh | None = None) -> Janus:
    """The model with the config's dtype and remat; with a `mesh`, as the step runs it inside `jax.shard_map`."""
    own = {} if mesh is None else {"attention": attention_on(config, mesh), "fsdp": True}
    return Janus(config.model, dtype=jnp.dtype(config.compute_dtype), remat=config.remat, **own)


def activation_bytes(config: TrainConfig, devices: int) -> int:
    """About how much the backward pass keeps on each of `devices` with remat=none; more rather than less."""
    c, v, itemsize = config.model.language, config.model.vision, jnp.dtype(config.compute_dtype).itemsize
    rows = -(-config.batch_size // (config.accumulate * devices))
    images = rows * config.data.images_per_row if config.data.understanding or config.answers else 0

    def of_layers(layers: int, rows: int, length: int, heads: int, width: int, mlp: int) -> int:
        return layers * rows * length * ((16 * width + 6 * mlp) * itemsize + heads * length * (itemsize + 4))

    decoder = of_layers(c.layers, rows, config.data.context, c.heads, c.width, c.mlp_dim)
    return decoder + of_layers(v.layers, images, v.num_patches, v.heads, v.width, v.mlp_dim)


def attention_on(config: TrainConfig, mesh: Mesh) -> str:
    """The implementation of the decoder's attention for `config` on `mesh`."""
    if config.attention != "auto":
        return config.attention
    c, device = config.model.language, mesh.devices.flat[0]
    best = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, "xla")
    if best == "cudnn" and not _has_cudnn(device):
        best = "xla"
    taken = takes(best, config.data.context, c.heads, c.kv_heads, c.head_dim, config.compute_dtype)
    return best if taken else "xla"


def _has_cudnn(gpu: jax.Device) -> bool:
    """Whether cuDNN's attention runs on `gpu`: on NVIDIA's from Ampere on. (AMD's report an architecture's name.)"""
    major = str(getattr(gpu, "compute_capability", "")).split(".")[0]
    return major.isdigit() and int(major) >= 8


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then constant, or a cosine to 0 at `steps`."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, max(steps - warmup, 1))
    else:
        after = optax.constant_schedule(rate)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; it only ever sees what is trained."""
    o = config.optimizer
    # Norms and biases do not decay, as is usual; the reports do not say.
    decays = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key in _DECAYING)
    rate = learning_rate(o, config.steps * config.updates)
    adamw = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw)


# ---------------------------------------------------------------- shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the mesh axes of `RULES["batch"]`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold."""
    spans = {
        index[0].indices(batch_size)[:2] for index in sharding.addressable_devices_indices_map((batch_size,)).values()
    }
    return sorted({row for begin, end in spans for row in range(begin, end)})


def put_rows(batch: Mapping[str, np.ndarray], rows: Sequence[int], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] of this process's `rows`."""
    position = {row: i for i, row in enumerate(rows)}
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(batch_size)
            return x[position[begin] : position[end - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return {name: put(x) for name, x in batch.items()}


def state_shardings(config: TrainConfig, mesh: Mesh) -> tuple[TrainState, Params]:
    """Shardings of the state and of the frozen parameters; ValueError if the mesh does not divide the model."""
    leaves = abstract_leaves(config)
    trained, frozen = split_leaves(param_shardings(joined(*leaves), mesh), config)
    replicated = NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(config)
    abstract = jax.eval_shape(optimizer.init, leaves[0])
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, abstract, trained, transform_non_params=lambda _: replicated
    )
    return TrainState(replicated, trained, opt_state, replicated), frozen


def abstract_state(config: TrainConfig, mesh: Mesh) -> tuple[TrainState, Params]:
    """`jax.ShapeDtypeStruct`s with shardings of the state and of the frozen parameters."""
    trained, frozen = abstract_leaves(config)
    state = jax.eval_shape(functools.partial(start_state, make_optimizer(config)), trained)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (state, frozen),
        state_shardings(config, mesh),
    )


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """`jax.ShapeDtypeStruct`s with shardings of a batch; see `train.data.batches.Assembler`."""
    rows, size = config.batch_size, config.model.vision.image_size
    images = config.data.images_per_row if config.data.ratio[0] else 0
    per_token = {"is_code": bool, "is_image": bool, "tasks": jnp.int8}
    per_token |= dict.fromkeys(("ids", "targets", "segment_ids", "positions"), jnp.int32)
    shapes = {name: ((rows, config.data.context), dtype) for name, dtype in per_token.items()}
    shapes["images"] = ((rows, images, size, size, IMAGE_CHANNELS), jnp.uint8)
    shapes["damaged"] = ((rows,), jnp.int32)
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def start_state(optimizer: optax.GradientTransformation, trained: Params) -> TrainState:
    # Two counters, since the same buffer cannot be donated twice.
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), jnp.zeros((), jnp.int32))
