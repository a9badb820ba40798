"""Products that are as exact as their dtype says, on every platform.

TPUs round the operands of float32 products to bfloat16 and NVIDIA GPUs from Ampere on to TF32 (10 bits) unless a
precision is asked for, or `jax_default_matmul_precision` says otherwise. A model in float32 is to compute in float32.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """What products and convolutions of `dtype` ask for: all bits of float32; narrower ones lose none as they are."""
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def einsum(spec: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """jnp.einsum of two arrays of one float dtype, at its precision, accumulated and returned in `out_dtype`."""
    return jnp.einsum(spec, x, y, precision=precision_of(x.dtype), preferred_element_type=out_dtype)


def einsum_with_narrow_gradients(spec: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`einsum` into `out_dtype`, whose gradients are products of the operands' own dtype.

    JAX's are products of `out_dtype`: of float32 for bfloat16 operands, on GPUs half as fast or less.
    """
    if out_dtype in (None, x.dtype):
        return einsum(spec, x, y)
    return _widening_einsum(spec, out_dtype, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _widening_einsum(spec: str, out_dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return einsum(spec, x, y, out_dtype)


def _einsum_forward(spec: str, out_dtype: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    return _widening_einsum(spec, out_dtype, x, y), (x, y)


def _einsum_backward(spec: str, out_dtype: Any, operands: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, y), grad = operands, grad.astype(operands[0].dtype)
    (of_x,) = jax.linear_transpose(lambda x: einsum(spec, x, y), x)(grad)
    (of_y,) = jax.linear_transpose(lambda y: einsum(spec, x, y), y)(grad)
    return of_x, of_y


_widening_einsum.defvjp(_einsum_forward, _einsum_backward)


def exact(dtype: Any) -> contextlib.AbstractContextManager:
    """The same for products that others write and that take no precision, such as kernels."""
    precise = precision_of(dtype) is not None
    return jax.default_matmul_precision("highest") if precise else contextlib.nullcontext()
