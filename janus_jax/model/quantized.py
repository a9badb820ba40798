"""Products by int8 and int4 kernels (`janus_jax.weights.quantize`), in the form that each compiler reads them once in.

Chosen when a program is lowered, by the platform that it is lowered for:

    platform                         few tokens (a decoding step)                many tokens
    CPU, int4                        `cpu.int4_product`                          the same
    TPU, int4                        multiply by each group alone, scale, sum    dequantize, then multiply
    GPU, int4                        multiply group by group, scale, then sum    dequantize, then multiply
    GPU in float16, int8 and int4    multiply and sum in float32                 as any GPU
    any other, int8                  multiply, then scale                        the same

XLA casts a kernel inside the product, but writes a dequantized one out wide, and reads it again. float16 is what GPUs
compute in that have no bfloat16 units (compute capability below 8.0); Triton does not serve them either, so that any
product would go through a float16 copy.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model import cpu
from janus_jax.model.precision import einsum, einsum_with_narrow_gradients, precision_of

# Partial sums of groups, in float32, cost more than a copy of the kernel from about 64 tokens on.
_FEW_TOKENS = 32
_ROWS_IN_FLOAT32 = 4  # multiplied and summed one by one
# Above, a TPU's products of a token for each group cost more than to write a kernel out and read it, by its data sheet.
_FEW_TOKENS_IN_BLOCKS = 16


def product(spec: str, x: jax.Array, kernel: jax.Array, scale: jax.Array, out_dtype: Any, as_matrix: bool) -> jax.Array:
    """einsum `spec` of x and the kernel that `kernel` and `scale` stand for, accumulated in float32, in `out_dtype`.

    Only x is differentiated; the kernel and its scales are constants, and all that is kept for the backward pass.

    Args:
      kernel: int8 or int4; output axes first, then those that are summed over.
      scale: for int8 [output axes], float32; for int4 the kernel's shape, but for its last axis, which has groups.
      as_matrix: see `cpu.product`.
    """
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)

    @jax.custom_vjp
    def differentiable(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return _forward(spec, x, kernel, scale, out_dtype, as_matrix)

    def backward(constants: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
        kernel, scale = constants
        if kernel.dtype == jnp.int4:
            wide = dequantize(kernel, scale, like.dtype)
        else:
            wide, grad = kernel.astype(like.dtype), grad.astype(jnp.float32) * scale
        (of_x,) = jax.linear_transpose(lambda x: einsum(spec, x, wide), like)(grad.astype(like.dtype))
        return of_x, None, None

    differentiable.defvjp(lambda *args: (differentiable(*args), args[1:]), backward)
    return differentiable(x, kernel, scale)


def _forward(
    spec: str, x: jax.Array, kernel: jax.Array, scale: jax.Array, out_dtype: Any, as_matrix: bool
) -> jax.Array:
    inputs, axes = spec.split("->")[0].split(",")
    contracted = sum(axis in inputs for axis in axes)
    leading, outputs = x.shape[: x.ndim - contracted], kernel.shape[: kernel.ndim - contracted]
    tokens = math.prod(leading)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return einsum_with_narrow_gradients(spec, x, kernel.astype(x.dtype), jnp.float32)

    def matrices(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, D], the kernel [F, D] and its scales [F, groups]."""
        rows = math.prod(outputs)
        return x.reshape(tokens, -1), kernel.reshape(rows, -1), scale.reshape(rows, -1)

    def back(y: jax.Array) -> jax.Array:
        return y.reshape(*leading, *outputs)

    def scaled(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return cpu.product(plain, spec, x, kernel, jnp.float32, as_matrix) * scale

    def dequantized(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return plain(x, dequantize(kernel, scale, x.dtype))

    def by_groups(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return back(_by_groups(*matrices(x, kernel, scale)))

    def by_blocks(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return _by_blocks(*(a.reshape(*axes, -1) for a, axes in ((x, leading), (kernel, outputs), (scale, outputs))))

    def in_float32(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return back(_in_float32(*matrices(x, kernel, scale)))

    def on_cpu(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return back(cpu.int4_product(*matrices(x, kernel, scale)))

    int4 = kernel.dtype == jnp.int4
    on_gpu = usual = dequantized if int4 else scaled
    if int4 and tokens <= _FEW_TOKENS:
        on_gpu = by_groups
    if x.dtype == jnp.float16 and tokens <= _ROWS_IN_FLOAT32:
        on_gpu = in_float32
    on_tpu = by_blocks if int4 and tokens <= _FEW_TOKENS_IN_BLOCKS else usual
    if on_gpu is usual and not int4:
        y = usual(x, kernel, scale)
    else:
        forms = {"cpu": on_cpu if int4 else usual, "cuda": on_gpu, "rocm": on_gpu, "tpu": on_tpu}
        y = jax.lax.platform_dependent(x, kernel, scale, **forms, default=usual)
    return y.astype(out_dtype)


def dequantize(kernel: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The int4 kernel in `dtype`: each group of its last axis times its scale."""
    groups = kernel.reshape(*scale.shape, -1).astype(dtype)
    return (groups * scale[..., None].astype(dtype)).reshape(kernel.shape)


def _by_groups(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """[T, D] by [F, D] to [T, F], with a product for each group of D, and then a sum."""
    groups = scale.shape[1]
    kernel = kernel.reshape(len(kernel), groups, -1).astype(x.dtype)
    y = einsum("TGD,FGD->GTF", x.reshape(len(x), groups, -1), kernel, jnp.float32)
    return (y * scale.T[:, None].astype(jnp.float32)).sum(0)


def _by_blocks(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """[..., D] by [*outputs, D] to [..., *outputs] in one product, of each token once a group with zeros elsewhere.

    A TPU's matrix units take 128 tokens in the time of one. A kernel with an axis of groups would be laid out anew, and
    one whose outputs are joined would be gathered where a mesh splits them.
    """
    size, groups = x.shape[-1], scale.shape[-1]
    own = jnp.arange(size) // (size // groups) == jnp.arange(groups)[:, None]
    blocks = jnp.where(own, x[..., None, :], 0)
    y = jnp.tensordot(
        blocks, kernel.astype(x.dtype), (-1, -1), precision=precision_of(x.dtype), preferred_element_type=jnp.float32
    )
    return (y * jnp.moveaxis(scale, -1, 0).astype(jnp.float32)).sum(x.ndim - 1)


def _in_float32(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """[T, D] by [F, D] to [T, F] without a product of matrices: one fusion, which reads the kernel once.

    Groups are scaled before they are summed. One sum a group, then scaled, would be written out: with groups of 128 and
    two tokens that is a quarter more traffic than int4 and its scales.
    """
    groups = scale.shape[1]
    wide = kernel.reshape(len(kernel), groups, -1).astype(jnp.float32)
    scale = scale.astype(jnp.float32)
    x = x.astype(jnp.float32).reshape(len(x), groups, -1)
    if groups == 1:
        return jnp.stack([(wide * row).sum((1, 2)) * scale[:, 0] for row in x])
    return jnp.stack([(wide * scale[..., None] * row).sum((1, 2)) for row in x])
