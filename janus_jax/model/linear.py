"""The one linear layer, used by the decoder, the encoders' towers, the adapters and the heads.

Its kernel is plain, int8 or int4 (`janus_jax.weights.quantize`), of one map or of several that read the same input
(`janus_jax.weights.fuse`, which stacks them on a new axis). Axis letters: see `janus_jax.model.layers`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.model import cpu, quantized
from janus_jax.model.precision import einsum_with_narrow_gradients


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
        # The product of a low-rank adapter would be added here.
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

    def _kernel_axes(self) -> tuple[range, range]:
        """The kernel's output axes, and those that are summed over."""
        inputs, kernel = self.spec.split("->")[0].split(",")
        added = sum(axis not in inputs for axis in kernel)
        return range(added), range(added, len(kernel))
