"""Adapters while they are trained: apart from their scale, beside kernels that do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.sharding import flatten, is_stacked, output_axes, unflatten
from janus_jax.weights.adapters.adapter import Adapter, Delta, Place
from janus_jax.weights.quantize import dequantized


def trainable(params: Mapping[str, Any], adapter: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of `adapter` that are trained, and those beside them that are not: scales, and DoRA's kernel norms.

    All are float32. Joined with `params`, stacked and not fused, they are what `linear.Linear` computes with; layers of
    a stack that have a lower rank, or no change at all, are zeros, whose gradients are zeros.

    Raises: ValueError in one line for a DoRA of some layers of a stack: a magnitude has no value without effect.
    """
    flat = flatten(params)
    by_kernel: dict[str, dict[int | None, Delta]] = {}
    for (module, layer), delta in adapter.deltas.items():
        by_kernel.setdefault("/".join(module), {})[layer] = delta
    trained: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for module, deltas in by_kernel.items():
        kernel = flat[f"{module}/kernel"]
        layers = range(kernel.shape[0]) if is_stacked(f"{module}/kernel") else (None,)
        if adapter.dora and len(deltas) < len(layers):
            raise ValueError(f"a DoRA of {module} must change all {len(layers)} layers, got {len(deltas)}; use LoRA")
        own = _stacked([deltas.get(layer) for layer in layers])
        own = own if is_stacked(f"{module}/kernel") else {name: x[0] for name, x in own.items()}
        fixed[f"{module}/lora_scale"] = own.pop("lora_scale")
        if adapter.dora:
            outputs = output_axes(f"{module}/kernel") + is_stacked(f"{module}/kernel")
            axes = tuple(range(outputs, kernel.ndim))
            fixed[f"{module}/lora_norm"] = jnp.sqrt(jnp.square(dequantized(f"{module}/kernel", flat)).sum(axes))
        trained |= {f"{module}/{name}": x for name, x in own.items()}
    return unflatten(trained), unflatten(fixed)


def _stacked(deltas: list[Delta | None]) -> dict[str, jax.Array]:
    some = next(delta for delta in deltas if delta)
    rank = max(delta.rank for delta in deltas if delta)
    a = np.zeros((len(deltas), rank, *some.a.shape[1:]), np.float32)
    b = np.zeros((len(deltas), *some.b.shape[:-1], rank), np.float32)
    for i, delta in enumerate(deltas):
        if delta:
            a[i, : delta.rank] = delta.a
            b[i, ..., : delta.rank] = delta.b
    made = {"lora_a": a, "lora_b": b, "lora_scale": np.array([d.scale if d else 0 for d in deltas], np.float32)}
    if some.magnitude is not None:
        made["lora_magnitude"] = np.stack([d.magnitude for d in deltas if d])
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
    return Adapter(deltas, like.saved, like.rslora, like.dora, like.base, like.source)
