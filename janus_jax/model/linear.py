"""The one linear layer, used by the decoder, the encoders' towers, the adapters and the heads.

Its kernel is plain, int8 or int4 (`janus_jax.weights.quantize`), of one map or of several that read the same input
(`janus_jax.weights.fuse`, which stacks them on a new axis). A low-rank adapter's parameters may lie beside it
(`janus_jax.weights.adapters`). Axis letters: see `janus_jax.model.layers`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.model import cpu, quantized
from janus_jax.model.precision import einsum, einsum_with_narrow_gradients

_ADAPTER = ("a", "b", "scale", "gain", "magnitude", "norm")


class Linear(nn.Module):
    """Linear map over named axes, with a bias over its output axes: y = einsum(spec, x, kernel) + bias.

    Kernels are laid out as in torch, outputs first: conversion is then a copy, and each output of a token is one
    contiguous dot product.

    Attributes:
      spec: einsum of input and kernel, such as "...D,NHD->...NH".
      shape: kernel shape: the output axes, then those that are summed over.
      dtype: dtype to which input and kernel are cast for the product.
      out_dtype: dtype in which the product is accumulated and returned; default `dtype`.
      cpu: see `cpu.product`.
    """

    spec: str
    shape: tuple[int, ...]
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    out_dtype: Any = None
    cpu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs, contracted = self._kernel_axes()
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=contracted, out_axis=outputs)
        kernel = self.param("kernel", init, self.shape, self.param_dtype)
        y = self._product(x.astype(self.dtype), kernel)
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x.astype(self.dtype), y, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.shape[: len(outputs)], self.param_dtype)
            y = y + bias.astype(y.dtype)
        return y

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """`x` times the kernel, in whatever form it is stored: a new form is one more branch here."""
        if self.has_variable("params", "kernel_scale"):  # int8 or int4
            scale = self.get_variable("params", "kernel_scale")
            return quantized.product(self.spec, x, kernel, scale, self.out_dtype or self.dtype, self.cpu)

        def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return einsum_with_narrow_gradients(self.spec, x, kernel.astype(self.dtype), self.out_dtype)

        return cpu.product(plain, self.spec, x, kernel, self.out_dtype, self.cpu)

    def _adapted(self, x: jax.Array, y: jax.Array, kernel: jax.Array) -> jax.Array:
        """`y`, the product with the kernel, changed by the low-rank adapter beside it.

        `lora_a` is [rank, inputs] and `lora_b` [outputs, rank], each with the fused maps' axis first. While it is
        trained, an adapter has its scale, and for DoRA magnitudes and the kernel's own norms; afterwards the scale is
        in `lora_b`, and what DoRA multiplies by in `lora_gain`: see `janus_jax.weights.adapters`.
        """
        leaves = {name: self.get_variable("params", f"lora_{name}") for name in _ADAPTER}
        a, b = (leaves[name].astype(self.dtype) for name in "ab")
        inputs, outputs = self.spec.split(",")[0], self.spec.split("->")[1]
        added, contracted = (self.spec.split("->")[0].split(",")[1][r.start : r.stop] for r in self._kernel_axes())
        fused = added[: a.ndim - 1 - len(contracted)]
        low = inputs.removesuffix(contracted) + fused + "R"
        change = einsum(f"{inputs},{fused}R{contracted}->{low}", x, a)
        change = einsum(f"{low},{added}R->{outputs}", change, b, self.out_dtype)
        if leaves["scale"] is not None:
            change = change * leaves["scale"].astype(change.dtype)
        y = y + change.astype(y.dtype)
        if leaves["gain"] is not None:
            y = y * leaves["gain"].astype(y.dtype)
        elif leaves["magnitude"] is not None:
            norm = self._changed_norm(kernel, a, b, leaves["norm"], leaves["scale"])
            # The norm is taken for constant (DoRA, section 4.3), and so costs no gradient of the kernel's size.
            y = y * (leaves["magnitude"] / jax.lax.stop_gradient(norm)).astype(y.dtype)
        return y

    def _changed_norm(self, kernel: jax.Array, a: jax.Array, b: jax.Array, norm: jax.Array, scale: Any) -> jax.Array:
        """Norm [outputs] over the inputs of kernel + scale * b @ a in float32, of a kernel that has `norm` itself.

        It takes products of the adapter's size alone, with the kernel in whatever form it is stored.
        """
        rank, outputs = len(a), norm.shape
        leading = (1, rank) if "..." not in self.spec else (rank,)
        seen = self._product(a.reshape(*leading, *a.shape[1:]), kernel).reshape(rank, -1).astype(jnp.float32)
        rows, flat = a.reshape(rank, -1).astype(jnp.float32), b.reshape(-1, rank).astype(jnp.float32)
        gram = einsum("RD,SD->RS", rows, rows)
        cross = jnp.sum(flat * seen.T, -1)
        square = jnp.square(norm.reshape(-1)) + 2 * scale * cross
        square = square + jnp.square(scale) * jnp.sum(einsum("FR,RS->FS", flat, gram) * flat, -1)
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)).reshape(outputs)

    def _kernel_axes(self) -> tuple[range, range]:
        """The kernel's output axes, and those that are summed over."""
        inputs, kernel = self.spec.split("->")[0].split(",")
        added = sum(axis not in inputs for axis in kernel)
        return range(added), range(added, len(kernel))
