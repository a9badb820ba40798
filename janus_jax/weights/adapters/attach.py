"""Adapters in a model's parameters: the arrays beside each kernel that `linear.Linear` adds, and their merging.

Any layout of parameters is taken: layers stacked or separate, kernels fused or not, plain or quantized.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax.io.messages import one_line
from janus_jax.sharding import flatten, is_stacked, output_axes, param_shardings, unflatten
from janus_jax.weights.adapters.adapter import Adapter, Delta, padded
from janus_jax.weights.fuse import MEMBERS
from janus_jax.weights.quantize import dequantized
from janus_jax.weights.torch_weights import LazyArray, LazyParams

_SEPARATE = re.compile(r"language_model/layers_(\d+)/")
LEAVES = re.compile(r".*/lora_\w+")


def attach(params: Mapping[str, Any], adapter: Adapter, scale: float, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """`params` with `adapter`, whose changes are multiplied by `scale`; no array of `params` is copied or changed.

    Args:
      params: of `Janus`, without an adapter; may be shapes inside `jax.eval_shape`.
      dtype: of the adapter's arrays.
      mesh: the mesh on which the parameters lie.
    Raises: ValueError in one line where this layout of parameters cannot take it.
    """
    flat = flatten(params)
    made = _replaced(flat, adapter, dtype)
    for path in made:
        flat.pop(f"{path}_scale", None)  # of a quantized kernel
    flat |= made
    for path, kernel in flat.items():
        if path.endswith("/kernel"):
            made |= _beside(path, kernel, flat, adapter, scale, dtype)
    if mesh is not None:
        made = flatten(jax.device_put(unflatten(made), param_shardings(unflatten(made), mesh)))
    return unflatten(flat | made)


def merge(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` of `attach` with every kernel changed for good, computed in float32.

    Raises: ValueError if a changed kernel is quantized: rounding would take most of the change away again.
    """
    flat = flatten(params)
    made = {path: x for path, x in flat.items() if not LEAVES.fullmatch(path)}
    for path in [path for path in made if f"{path.removesuffix('kernel')}lora_a" in flat]:
        module, kernel = path.removesuffix("kernel"), flat[path]
        if not jnp.issubdtype(kernel.dtype, jnp.floating) or f"{path}_scale" in flat:
            raise ValueError(
                f"{path} is quantized, and would lose the adapter to rounding; merge into the checkpoint with "
                "convert/to_torch.py --adapter DIR --merge, and load the result quantized"
            )
        leaves = {name: flat.get(module + name) for name in ("lora_a", "lora_b", "lora_gain")}
        made[path] = _merged(kernel, *leaves.values(), kind=_Kind.of(path))
    return unflatten(made)


def merged_kernel(kernel: np.ndarray, delta: Delta) -> np.ndarray:
    """One layer's kernel [*outputs, *inputs] with `delta`, in float32."""
    outputs = delta.b.shape[:-1]
    changed = kernel.astype(np.float32).reshape(*outputs, -1)
    changed = changed + delta.scale * (delta.b @ delta.a.reshape(delta.rank, -1))
    if delta.magnitude is not None:
        changed = changed * (delta.magnitude / np.linalg.norm(changed, axis=-1))[..., None]
    return changed.reshape(kernel.shape)


def merged_leaves(leaves: LazyParams, adapter: Adapter) -> LazyParams:
    """A checkpoint's `leaves`, still in their files, with `adapter` merged in: float32, then cast to each leaf's."""
    by_path: dict[tuple[str, ...], dict[int | None, Delta]] = {}
    saved: dict[tuple[str, ...], dict[int | None, np.ndarray]] = {}
    for (module, layer), delta in adapter.deltas.items():
        by_path.setdefault((*module, "kernel"), {})[layer] = delta
    for (path, layer), array in adapter.saved.items():
        saved.setdefault(path, {})[layer] = array
    return leaves | {
        path: _merged_leaf("/".join(path), leaves[path], by_path.get(path, {}), saved.get(path, {}))
        for path in by_path.keys() | saved.keys()
    }


def _merged_leaf(
    name: str, leaf: LazyArray, deltas: Mapping[int | None, Delta], saved: Mapping[int | None, np.ndarray]
) -> LazyArray:
    stacked = is_stacked(name)

    def one(layer: int | None) -> np.ndarray:
        whole = (slice(None),) * (len(leaf.shape) - stacked)
        if layer in saved:
            kernel = saved[layer]
        elif layer is None:
            kernel = leaf.read(whole)
        else:
            kernel = leaf.read((slice(layer, layer + 1), *whole))[0]
        return merged_kernel(kernel, deltas[layer]) if layer in deltas else np.asarray(kernel, np.float32)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return one(None)[index]
        return np.stack([one(layer)[index[1:]] for layer in range(*index[0].indices(leaf.shape[0]))])

    return LazyArray(leaf.shape, np.dtype(np.float32), read).astype(leaf.dtype, name)


# ---------------------------------------------------------------- beside kernels


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a kernel at a path is laid out: the layers and linear layers that it holds, and its axes of outputs."""

    stacked: bool
    fused: bool
    outputs: int

    @staticmethod
    def of(path: str) -> _Kind:
        return _Kind(is_stacked(path), path.split("/")[-2] in MEMBERS, output_axes(path))

    @property
    def leading(self) -> int:
        """How many axes come before those of one linear layer."""
        return self.stacked + self.fused

    def matrices(self, a: Any, b: Any, kernel: Any) -> tuple[Any, Any, Any]:
        """a [X, rank, I], b [X, O, rank] and kernel [X, O, I] for the X linear layers in them."""
        lead = kernel.shape[: self.leading]
        rank, outs = a.shape[self.leading], kernel.shape[self.leading : self.stacked + self.outputs]
        count, flat = int(np.prod(lead)), int(np.prod(outs))
        return a.reshape(count, rank, -1), b.reshape(count, flat, rank), kernel.reshape(count, flat, -1)


def _beside(
    path: str, kernel: Any, flat: Mapping[str, Any], adapter: Adapter, scale: float, dtype: Any
) -> dict[str, Any]:
    """The adapter's leaves for the kernel at `path`, by path; none if it changes nothing there."""
    kind, module = _Kind.of(path), path.removesuffix("/kernel")
    layer: int | None = None
    if found := _SEPARATE.match(path):
        layer, module = int(found[1]), _SEPARATE.sub("language_model/layers/", module)
    parent, _, name = module.rpartition("/")
    members = [tuple(f"{parent}/{member}".split("/")) for member in MEMBERS.get(name, (name,))]
    layers = range(kernel.shape[0]) if kind.stacked else (layer,)
    deltas = [adapter.deltas.get((member, layer)) for layer in layers for member in members]
    if not any(deltas):
        return {}
    a, b = padded([delta and dataclasses.replace(delta, b=delta.b * (delta.scale * scale)) for delta in deltas])
    lead = kernel.shape[: kind.leading]
    made = {"lora_a": jnp.asarray(a.reshape(*lead, *a.shape[1:]), dtype)}
    made["lora_b"] = jnp.asarray(b.reshape(*lead, *b.shape[1:]), dtype)
    if adapter.dora:
        changed = np.asarray([delta is not None for delta in deltas])
        outs = kernel.shape[kind.leading : kind.stacked + kind.outputs]
        magnitude = np.stack([delta.magnitude if delta else np.zeros(outs, np.float32) for delta in deltas])
        wide = dequantized(path, flat)
        made["lora_gain"] = _gain(
            wide, made["lora_a"], made["lora_b"], magnitude.reshape(*lead, *outs), changed, kind
        ).astype(dtype)
    return {path.removesuffix("kernel") + leaf: x for leaf, x in made.items()}


@functools.partial(jax.jit, static_argnames="kind")
def _gain(kernel: Any, a: Any, b: Any, magnitude: Any, changed: Any, kind: _Kind) -> Any:
    """The factor of each output that gives it DoRA's magnitude."""
    changed_kernel = _sum(kernel, a, b, kind)
    norm = jnp.sqrt(jnp.square(changed_kernel).sum(-1))
    gain = jnp.where(changed[:, None], magnitude.reshape(norm.shape) / norm, 1)
    return gain.reshape(magnitude.shape)


@functools.partial(jax.jit, static_argnames="kind")
def _merged(kernel: Any, a: Any, b: Any, gain: Any, kind: _Kind) -> Any:
    made = _sum(kernel, a, b, kind)
    if gain is not None:
        made = made * gain.astype(jnp.float32).reshape(made.shape[:-1])[..., None]
    return made.reshape(kernel.shape).astype(kernel.dtype)


def _sum(kernel: Any, a: Any, b: Any, kind: _Kind) -> Any:
    wide = (x.astype(jnp.float32) for x in (a, b, kernel))
    a, b, kernel = kind.matrices(*wide)
    return kernel + jnp.einsum("xor,xri->xoi", b, a, precision=jax.lax.Precision.HIGHEST)


# ---------------------------------------------------------------- whole parameters


def _replaced(flat: Mapping[str, Any], adapter: Adapter, dtype: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for (parts, layer), array in adapter.saved.items():
        path = "/".join(parts)
        if layer is not None and path not in flat:
            path, layer = path.replace("language_model/layers/", f"language_model/layers_{layer}/"), None
        if path not in flat:
            raise ValueError(
                f"{one_line(adapter.source)}: modules_to_save has {'/'.join(parts)}, which is fused with its "
                "neighbors here; load with fused=False"
            )
        base = made.get(path, flat[path])
        plain = jnp.issubdtype(base.dtype, jnp.floating)
        if layer is None:
            made[path] = jnp.asarray(array, base.dtype if plain else dtype)
        elif plain:
            made[path] = base.at[layer].set(array)
        else:
            raise ValueError(
                f"{one_line(adapter.source)}: modules_to_save has {path}, which is quantized and stacked; "
                "load without weights="
            )
    return made
