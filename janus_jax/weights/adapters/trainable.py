"""Adapters while they are trained: apart from their scale, beside kernels that do not change.

Their leaves lie beside each kernel, in a model whose layers are stacked and not fused. `lora_a`, `lora_b` and DoRA's
`lora_magnitude` are trained; `lora_scale`, and `lora_norm`, the norms of DoRA's kernel, are not. All are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.sharding import flatten, is_stacked, output_axes, unflatten
from janus_jax.weights.adapters.adapter import Adapter, Delta, Place, axes_of, padded, scale_of
from janus_jax.weights.quantize import dequantized
from janus_jax.weights.torch_names import Slot

TRAINED = ("lora_a", "lora_b", "lora_magnitude")


def new_adapter(changed: Iterable[Slot], rank: int, alpha: float, kind: str = "lora", seed: int = 0) -> Adapter:
    """An adapter of the linear layers `changed` that changes nothing yet: `a` uniform as PEFT's, `b` zeros.

    Its magnitudes, if it is a DoRA, are None: those of the kernels, whatever they are.
    """
    scale = scale_of(alpha, rank, kind == "rslora")
    deltas: dict[Place, Delta] = {}
    for number, slot in enumerate(changed):
        outputs, inputs = axes_of(slot)
        most = 1 / math.sqrt(math.prod(inputs))
        a = np.random.default_rng((seed, number)).uniform(-most, most, (rank, *inputs)).astype(np.float32)
        deltas[slot.path[:-1], slot.layer] = Delta(a, np.zeros((*outputs, rank), np.float32), scale)
    return Adapter(deltas, {}, kind == "rslora", kind == "dora")


def abstract_trainable(
    params: Mapping[str, Any], modules: Iterable[str], rank: int, dora: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `trainable` makes for an adapter of one rank of the linear layers at `modules`, as shapes."""
    flat, trained, fixed = flatten(params), {}, {}
    for module in modules:
        path = f"{module}/kernel"
        shape, stacked = flat[path].shape, is_stacked(path)
        layers, outputs = shape[:stacked], shape[stacked : stacked + output_axes(path)]
        inputs = shape[stacked + output_axes(path) :]
        trained |= {f"{module}/lora_a": (*layers, rank, *inputs), f"{module}/lora_b": (*layers, *outputs, rank)}
        fixed[f"{module}/lora_scale"] = layers
        if dora:
            trained[f"{module}/lora_magnitude"] = fixed[f"{module}/lora_norm"] = (*layers, *outputs)
    made = ({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in own.items()} for own in (trained, fixed))
    return tuple(map(unflatten, made))


def trainable(params: Mapping[str, Any], adapter: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of `adapter` that are trained, and those beside them that are not.

    Joined with `params` they are what `linear.Linear` computes with; layers of a stack that have a lower rank, or no
    change at all, are zeros, whose gradients are zeros.

    Raises: ValueError in one line for a DoRA of some layers of a stack: a magnitude has no value without effect.
    """
    flat = flatten(params)
    by_kernel: dict[str, dict[int | None, Delta]] = {}
    for (module, layer), delta in adapter.deltas.items():
        by_kernel.setdefault("/".join(module), {})[layer] = delta
    trained: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for module, deltas in by_kernel.items():
        path = f"{module}/kernel"
        layers = range(flat[path].shape[0]) if is_stacked(path) else (None,)
        if adapter.dora:
            check_dora(module, len(deltas), len(layers))
        own = _stacked([deltas.get(layer) for layer in layers])
        own = own if is_stacked(path) else {name: x[0] for name, x in own.items()}
        fixed[f"{module}/lora_scale"] = own.pop("lora_scale")
        if adapter.dora:
            beside = {name: flat[name] for name in (path, f"{path}_scale") if name in flat}
            norm = fixed[f"{module}/lora_norm"] = _norm(path, beside)
            own.setdefault("lora_magnitude", jnp.array(norm))  # of its own, since trained arrays are donated
        trained |= {f"{module}/{name}": x for name, x in own.items()}
    return unflatten(trained), unflatten(fixed)


def check_dora(module: str, changed: int, layers: int, key: str = ""):
    """ValueError in one line, after `key`, if a DoRA changes `changed` of the `layers` in a stack, and not all."""
    if changed < layers:
        raise ValueError(f"{key}a DoRA of {module} must change all {layers} layers, got {changed}; use LoRA")


@functools.partial(jax.jit, static_argnums=0)
def _norm(path: str, stored: Mapping[str, jax.Array]) -> jax.Array:
    """Norms over the inputs of the kernel at `path`, in one pass over whatever form it is stored in."""
    outputs = output_axes(path) + is_stacked(path)
    return jnp.sqrt(jnp.square(dequantized(path, stored)).sum(tuple(range(outputs, stored[path].ndim))))


def _stacked(deltas: list[Delta | None]) -> dict[str, jax.Array]:
    a, b = padded(deltas)
    made = {"lora_a": a, "lora_b": b, "lora_scale": np.array([d.scale if d else 0 for d in deltas], np.float32)}
    if magnitudes := [d.magnitude for d in deltas if d and d.magnitude is not None]:
        made["lora_magnitude"] = np.stack(magnitudes)
    return {name: jnp.asarray(x) for name, x in made.items()}


def trained_adapter(like: Adapter, trained: Mapping[str, Any]) -> Adapter:
    """`like` with the values of `trained`, in the layout of `trainable`."""
    flat = {path: np.asarray(x, np.float32) for path, x in flatten(trained).items()}

    def value(place: Place, name: str) -> np.ndarray:
        module, layer = place
        whole = flat[f"{'/'.join(module)}/{name}"]
        return whole if layer is None else whole[layer]

    deltas = {
        place: Delta(
            value(place, "lora_a")[: delta.rank],
            value(place, "lora_b")[..., : delta.rank],
            delta.scale,
            value(place, "lora_magnitude") if like.dora else None,
        )
        for place, delta in like.deltas.items()
    }
    return dataclasses.replace(like, deltas=deltas)
