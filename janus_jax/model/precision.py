"""Products at the full precision of their dtype, on every platform.

By default, TPUs round the operands of float32 products to bfloat16, and NVIDIA GPUs from Ampere on to TF32 (10 bits),
unless a precision or `jax_default_matmul_precision` is set. A model in float32 should compute in float32.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """The precision for products and convolutions of `dtype`: the highest for float32; narrower dtypes lose nothing."""
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def residual_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of residual streams, and of the VQ model, in a model of `dtype`: float32 for float16, for its range."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def einsum(spec: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """jnp.einsum of two arrays of the same float dtype at full precision, accumulated and returned in `out_dtype`."""
    return jnp.einsum(spec, x, y, precision=precision_of(x.dtype), preferred_element_type=out_dtype)


def einsum_with_narrow_gradients(spec: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`einsum` into `out_dtype`, with gradients computed as products in the operands' dtype.

    JAX would compute them in `out_dtype`: for bfloat16 operands in float32, at half the speed or less on GPUs.
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
    """Context with the same effect on products that do not take a precision, such as those in kernels."""
    precise = precision_of(dtype) is not None
    return jax.default_matmul_precision("highest") if precise else contextlib.nullcontext()
