"""Layers shared by the encoders and the decoder.

Axis legend, here and in every einsum: B batch, T query length, S key length, N heads, K key/value heads, G heads
per key/value head, H head dim, D width, F MLP width, V vocabulary, C channels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.model.precision import einsum
from janus_jax.sharding import constrain

# Up to so many tokens XLA:CPU is faster with the kernel on the left (measured: 2.6 times for 2, 1.3 for 128).
_FEW_TOKENS = 128
_BLOCK = 128  # rows of an int8 kernel that XLA:CPU widens at a time


class Einsum(nn.Module):
    """Linear map over named axes, with a bias over the axes that it adds.

    Kernels are laid out as in torch, outputs first: conversion is then a copy, and a row of the kernel meets one token
    in one contiguous dot product.

    Attributes:
      spec: einsum of input and kernel, such as "...D,NHD->...NH".
      shape: kernel shape.
      out_dtype: what the product is accumulated and returned in; default the compute dtype.
      flat: multiplies by the kernel as a matrix: one of three axes XLA:CPU would transpose in every call.
    """

    spec: str
    shape: tuple[int, ...]
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    out_dtype: Any = None
    flat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, kernel_axes = self.spec.split("->")[0].split(",")
        contracted = [i for i, axis in enumerate(kernel_axes) if axis in inputs]
        added = [i for i, axis in enumerate(kernel_axes) if axis not in inputs]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=contracted, out_axis=added)
        kernel = self.param("kernel", init, self.shape, self.param_dtype)
        quantized = self.has_variable("params", "kernel_scale")  # see `janus_jax.weights.quantize`
        out_dtype = jnp.float32 if quantized else self.out_dtype
        x = x.astype(self.dtype)
        leading, out_shape = x.shape[: x.ndim - len(contracted)], tuple(self.shape[i] for i in added)

        def default(x, kernel):
            kernel = kernel.astype(self.dtype)
            if out_dtype not in (None, self.dtype):
                return _widening_einsum(self.spec, out_dtype, x, kernel)
            return einsum(self.spec, x, kernel)

        def as_matrices(x, kernel):
            return x.reshape(math.prod(leading), -1), kernel.reshape(math.prod(out_shape), -1)

        def kernel_right(x, kernel):
            rows, matrix = as_matrices(x, kernel)
            y = einsum("TD,FD->TF", rows, matrix.astype(self.dtype), out_dtype)
            return y.reshape(*leading, *out_shape)

        def kernel_left(x, kernel):
            rows, matrix = as_matrices(x, kernel)
            product = _product_in_blocks if quantized and len(matrix) % _BLOCK == 0 else _product
            return product(matrix, rows, out_dtype).T.reshape(*leading, *out_shape)

        if math.prod(leading) <= _FEW_TOKENS:
            y = jax.lax.platform_dependent(x, kernel, cpu=kernel_left, default=default)
        else:
            y = (kernel_right if self.flat else default)(x, kernel)
        if quantized:
            y = (y * self.get_variable("params", "kernel_scale")).astype(self.out_dtype or self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, out_shape, self.param_dtype)
            y = y + bias.astype(y.dtype)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _widening_einsum(spec: str, out_dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum into `out_dtype`, whose gradients are products of the operands' own dtype.

    JAX's are products of `out_dtype`: of float32 for bfloat16 operands, on GPUs half as fast or less.
    """
    return einsum(spec, x, y, out_dtype)


def _einsum_forward(spec: str, out_dtype: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    return _widening_einsum(spec, out_dtype, x, y), (x, y)


def _einsum_backward(spec: str, out_dtype: Any, operands: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, y), grad = operands, grad.astype(operands[0].dtype)
    (of_x,) = jax.linear_transpose(lambda x: einsum(spec, x, y), x)(grad)
    (of_y,) = jax.linear_transpose(lambda y: einsum(spec, x, y), y)(grad)
    return of_x, of_y


_widening_einsum.defvjp(_einsum_forward, _einsum_backward)


def _product(matrix: jax.Array, rows: jax.Array, out_dtype: Any) -> jax.Array:
    """[F, D] by [T, D] to [F, T], with the matrix as the left operand for good.

    XLA:CPU repacks the right operand of a product, however large; the barrier keeps it from swapping them.
    """
    y = einsum("FD,TD->FT", matrix.astype(rows.dtype), rows, out_dtype)
    return jax.lax.optimization_barrier(y)


def _product_in_blocks(matrix: jax.Array, rows: jax.Array, out_dtype: Any) -> jax.Array:
    """`_product` of an int8 matrix, widened a block at a time, so that the wide form stays in the processor's cache.

    XLA:CPU would otherwise write the whole matrix out in float32 and read it again: 2.5 times the time.
    """

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(matrix, i * _BLOCK, _BLOCK).astype(rows.dtype)
        part = _product(jax.lax.optimization_barrier(block), rows, out_dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, part, i * _BLOCK, 0)

    empty = jnp.zeros((len(matrix), len(rows)), out_dtype)
    return jax.lax.fori_loop(0, len(matrix) // _BLOCK, step, empty)


class Embed(nn.Module):
    """Embedding table [num, features]: ids [...] give [..., features]. `rows` is the logical axis of num."""

    num: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    rows: str | None = None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.num, self.features), self.param_dtype)
        # Gathered over fsdp like any other weight: its width split there would fight the batch for the same axis.
        table = constrain(table, self.rows, None)
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32 (reference: transformers LlamaRMSNorm)."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The exact erf form, which every GELU of Janus is."""
    return jax.nn.gelu(x, approximate=False)


class MlpProjector(nn.Module):
    """Adapter: Linear, then (GELU, Linear) depth - 1 times (reference: janus/models/projector.py).

    Layers carry the indices of the reference's nn.Sequential: layers_0, layers_2, ...
    """

    in_width: int
    width: int
    depth: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        in_width = self.in_width
        for i in range(self.depth):
            x = x if i == 0 else gelu(x)
            shape = (self.width, in_width)
            x = Einsum("...D,FD->...F", shape, True, self.dtype, self.param_dtype, name=f"layers_{2 * i}")(x)
            in_width = self.width
        return x


def rope(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] in float32 of the rotary embedding at `positions` [B, T]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, T, N, H] in float32; halves are paired as in transformers' rotate_half."""
    cos, sin = (table[:, :, None, :] for table in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# What a block's backward pass finds saved instead of computing it again.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """`block`, whose backward pass computes activations again.

    Args:
      remat: 'none' keeps all activations, 'dots' the matrix products, 'full' only the block's input.
    """
    if remat == "none":
        return block
    # In a scan XLA cannot undo the recomputation by common-subexpression elimination, and barriers would cost time.
    return nn.remat(block, policy=_REMAT_POLICIES[remat], prevent_cse=False)
