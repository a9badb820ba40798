"""Products that are as exact as their dtype says, on every platform.

TPUs round the operands of float32 products to bfloat16 and NVIDIA GPUs from Ampere on to TF32 (10 bits) unless a
precision is asked for, or `jax_default_matmul_precision` says otherwise. A model in float32 is to compute in float32.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """What products and convolutions of `dtype` ask for: all bits of float32; narrower ones lose none as they are."""
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def einsum(spec: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """jnp.einsum of two arrays of one float dtype, at its precision, accumulated and returned in `out_dtype`."""
    return jnp.einsum(spec, x, y, precision=precision_of(x.dtype), preferred_element_type=out_dtype)


def exact(dtype: Any) -> contextlib.AbstractContextManager:
    """The same for products that others write and that take no precision, such as kernels."""
    precise = precision_of(dtype) is not None
    return jax.default_matmul_precision("highest") if precise else contextlib.nullcontext()
