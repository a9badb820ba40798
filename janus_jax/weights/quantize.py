"""Weight-only int8 and int4: kernels of the decoder and the heads in a byte or half of one, with scales beside them.

int8 has a float32 scale for each output channel. int4 has one for each group of `GROUP` inputs, in the dtype of
computation; two weights share a byte, on every platform (numpy, where it holds int4, takes a byte for each).

A decoding step reads every weight once and is bound by that: half the bytes take up to half the time and half the
memory.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.sharding import flatten, is_stacked, output_axes, unflatten

FORMS = ("int8", "int4")
GROUP = 128  # inputs that share a scale; fewer where the last axis is no multiple
_LEAST_GROUP = 8  # with fewer, scales would take most of what int4 saves
_KERNELS = re.compile(
    r"(language_model/layers(_\d+)?/(self_attn|mlp)/\w+_proj|language_model/lm_head|gen_head/\w+)/kernel"
)
_LEVELS = {"int8": 127, "int4": 7}
_BLOCK = 1 << 26  # weights that are quantized at a time; XLA:CPU holds them in float32 meanwhile


def quantize(params: Mapping[str, Any], form: str = "int8", delete: bool = False, dtype: Any = None) -> dict[str, Any]:
    """`params` with int8 or int4 kernels, each with a `kernel_scale` beside it, see `model.quantized.product`.

    Embeddings, adapters, encoders, norms and biases stay as they are: they are read little, or once an image.

    Args:
      params: of `Janus`, with layers stacked or separate.
      form: one of `FORMS`.
      delete: free the memory of each kernel once it is quantized.
      dtype: of int4's scales; default each kernel's own.
    Raises: ValueError naming an int4 kernel whose inputs no group divides.

    >>> small = quantize(janus.params, "int4")
    >>> small["gen_head"]["output_mlp_projector"]["kernel"].dtype
    dtype(int4)
    """
    made: dict[str, Any] = {}
    for path, x in flatten(params).items():
        made |= quantize_leaf(path, x, form, delete, dtype)
    return unflatten(made)


def quantize_leaf(
    path: str, x: jax.Array, form: str = "int8", delete: bool = False, dtype: Any = None
) -> dict[str, jax.Array]:
    """The arrays that `quantize` turns one parameter into, by path: itself, or its quantized form and the scales."""
    if not is_quantized(path):
        return {path: x}
    how: tuple[Any, ...]
    if form == "int8":
        how = (output_axes(path) + is_stacked(path),)
        make = _to_int8
    else:
        how = (group_size(path, x.shape), jnp.dtype(dtype or x.dtype))
        make = _to_int4
    made = jax.block_until_ready(make(x, *how, _shardings(path, x, form)))
    if delete:
        x.delete()
    return dict(zip((path, f"{path}_scale"), made, strict=True))


def dequantized(path: str, stored: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel at `path` in float32, from the arrays `stored` at it and beside it, whatever its form."""
    kernel, scale = stored[path], stored.get(f"{path}_scale")
    wide = kernel.astype(jnp.float32)
    if scale is None:
        return wide
    if scale.ndim == kernel.ndim:  # int4's groups
        return wide * jnp.repeat(scale.astype(jnp.float32), kernel.shape[-1] // scale.shape[-1], -1)
    return wide * jnp.expand_dims(scale, tuple(range(scale.ndim, kernel.ndim)))


def is_quantized(path: str) -> bool:
    """Whether `quantize` changes the parameter at `path`."""
    return _KERNELS.fullmatch(path) is not None


def scale_shape(path: str, shape: Sequence[int], form: str) -> tuple[int, ...]:
    """The shape of the scales of the kernel at `path` of `shape`; ValueError as `quantize`."""
    if form == "int8":
        return tuple(shape[: output_axes(path) + is_stacked(path)])
    return (*shape[:-1], shape[-1] // group_size(path, shape))


def group_size(path: str, shape: Sequence[int]) -> int:
    """How many neighbors on the last axis of an int4 kernel share a scale: the largest even divisor up to `GROUP`."""
    for size in range(min(GROUP, shape[-1]), _LEAST_GROUP - 1, -1):
        if size % 2 == 0 and shape[-1] % size == 0:
            return size
    raise ValueError(
        f"weights='int4': {path} has {shape[-1]} inputs on its last axis, which no group of {_LEAST_GROUP} to {GROUP} "
        "(an even number) divides; use weights='int8'"
    )


def quantized_shapes(abstract: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """What `quantize` makes of a nested dict of `jax.ShapeDtypeStruct`; the same dict for form None."""
    return dict(abstract) if form is None else dict(jax.eval_shape(functools.partial(quantize, form=form), abstract))


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes that an array takes on a device or in a converted folder: two of int4 share one."""
    return -(-math.prod(shape) * (4 if np.dtype(dtype) == jnp.int4 else 8 * np.dtype(dtype).itemsize) // 8)


def _shardings(path: str, x: Any, form: str) -> tuple[NamedSharding, NamedSharding] | None:
    """The kernel's own sharding for its quantized form, and the scales' as in `sharding.logical_axes`."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return None
    axes = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    kept = len(scale_shape(path, x.shape, form)) - (form == "int4")
    return sharding, NamedSharding(sharding.mesh, PartitionSpec(*axes[:kept]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _to_int8(kernel: jax.Array, kept: int, shardings: Any) -> tuple[jax.Array, jax.Array]:
    """`kernel` as int8, and its scales, whose axes are its first `kept`."""
    contracted = tuple(range(kept, kernel.ndim))

    def make(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = kernel.astype(jnp.float32)
        scale = jnp.abs(x).max(contracted, keepdims=True) / _LEVELS["int8"]
        rounded = jnp.round(x / jnp.where(scale > 0, scale, 1))
        return rounded.astype(jnp.int8), scale.reshape(scale.shape[:kept])

    return _in_blocks(make, kernel) if shardings is None else jax.lax.with_sharding_constraint(make(kernel), shardings)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _to_int4(kernel: jax.Array, group: int, dtype: Any, shardings: Any) -> tuple[jax.Array, jax.Array]:
    """`kernel` as int4, and its scales in `dtype`, with groups in place of its last axis."""

    def make(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = kernel.astype(jnp.float32).reshape(*kernel.shape[:-1], -1, group)
        most = _LEVELS["int4"]
        scale = (jnp.abs(x).max(-1) / most).astype(dtype)
        wide = scale.astype(jnp.float32)[..., None]  # as it will be multiplied by
        rounded = jnp.clip(jnp.round(x / jnp.where(wide > 0, wide, 1)), -most, most)
        return rounded.reshape(kernel.shape).astype(jnp.int4), scale

    return _in_blocks(make, kernel) if shardings is None else jax.lax.with_sharding_constraint(make(kernel), shardings)


def _in_blocks(make: Callable[[jax.Array], tuple[jax.Array, jax.Array]], kernel: jax.Array) -> Any:
    """`make` of the kernel's rows, each of which has its own scales, about `_BLOCK` weights at a time."""
    least = -(-kernel.size // _BLOCK)
    blocks = next((n for n in range(least, 16 * least) if len(kernel) % n == 0), 1)
    if blocks == 1:
        return make(kernel)
    # As integers, since XLA:CPU widens what it slices, and then all blocks before the first.
    as_stored = jnp.dtype(f"uint{8 * kernel.dtype.itemsize}")
    rows = jax.lax.bitcast_convert_type(kernel, as_stored).reshape(blocks, -1, *kernel.shape[1:])
    made = jax.lax.map(lambda block: make(jax.lax.bitcast_convert_type(block, kernel.dtype)), rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)
