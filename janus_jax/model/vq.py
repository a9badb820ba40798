"""Generation tokenizer: VQ-16 of LlamaGen (reference: janus/models/vq_model.py). Images are NHWC in [-1, 1].

Modules compute in the dtype of their input. Codes are always computed in float32, whatever the model's dtype: data are
encoded once, on one machine, and then used by models on others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.config import IMAGE_CHANNELS, VQConfig
from janus_jax.model.precision import einsum, precision_of
from janus_jax.sharding import constrain


class GroupNorm(nn.Module):
    """Norm over space and groups of channels, in float32 and two passes.

    Sums go over space first: flax's norm, which sums over space and groups at once, takes 1.5 times as long on XLA:CPU.
    """

    groups: int
    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)

        def mean(y: jax.Array) -> jax.Array:
            of_groups = y.mean((1, 2)).reshape(len(y), self.groups, -1).mean(-1)
            return of_groups.repeat(channels // self.groups, axis=1)[:, None, None]

        y = x.astype(jnp.float32)
        y -= mean(y)
        y *= jax.lax.rsqrt(mean(jnp.square(y)) + self.eps) * scale
        return (y + bias).astype(x.dtype)


class _VQModule(nn.Module):
    """Base class: the config, the parameters' dtype, and modules, convolutions and norms built from them."""

    config: VQConfig
    param_dtype: Any

    def module(self, cls: type[_VQModule], **how: Any) -> _VQModule:
        return cls(self.config, param_dtype=self.param_dtype, **how)

    def conv(self, x: jax.Array, features: int, name: str, strides: int = 1, padding: Any = 1) -> jax.Array:
        how = {"strides": strides, "padding": padding, **_exactly(x.dtype, self.param_dtype)}
        return nn.Conv(features, (3, 3), **how, name=name)(x)

    def dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        return nn.Dense(features, **_exactly(x.dtype, self.param_dtype), name=name)(x)

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.config.norm_groups, self.config.norm_eps, self.param_dtype, name=name)


def _exactly(dtype: Any, param_dtype: Any) -> dict[str, Any]:
    return {"dtype": dtype, "param_dtype": param_dtype, "precision": precision_of(dtype)}


class ResnetBlock(_VQModule):
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv(nn.swish(self.norm("norm1")(x)), self.features, "conv1")
        h = self.conv(nn.swish(self.norm("norm2")(h)), self.features, "conv2")
        if x.shape[-1] != self.features:
            x = self.dense(x, self.features, "nin_shortcut")
        return x + h


class AttnBlock(_VQModule):
    """Single-head attention over all positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = self.norm("norm")(x).reshape(batch, height * width, channels)
        q, k, v = (self.dense(h, channels, name) for name in "qkv")
        scores = einsum("BTC,BSC->BTS", q, k, jnp.float32) * channels**-0.5
        h = einsum("BTS,BSC->BTC", jax.nn.softmax(scores).astype(v.dtype), v)
        return x + self.dense(h, channels, "proj_out").reshape(x.shape)


class Downsample(_VQModule):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x, x.shape[-1], "conv", strides=2, padding=((0, 1), (0, 1)))


class Upsample(_VQModule):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2), x.shape[-1], "conv")


class ConvBlock(_VQModule):
    """One resolution: residual blocks, each followed by attention at the lowest one, then a change of resolution."""

    features: int = 0
    num_res: int = 0
    attention: bool = False
    resample: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_res):
            x = self.module(ResnetBlock, features=self.features, name=f"res_{i}")(x)
            if self.attention:
                x = self.module(AttnBlock, name=f"attn_{i}")(x)
        if self.resample:
            x = self.module({"downsample": Downsample, "upsample": Upsample}[self.resample], name=self.resample)(x)
        return constrain(x, "batch", None, None, None)


class _Coder(_VQModule):
    def middle(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        x = self.module(ResnetBlock, features=features, name="mid_0")(x)
        x = self.module(AttnBlock, name="mid_1")(x)
        return self.module(ResnetBlock, features=features, name="mid_2")(x)

    def head(self, x: jax.Array, features: int) -> jax.Array:
        return self.conv(nn.swish(self.norm("norm_out")(x)), features, "conv_out")


class Encoder(_Coder):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, last = self.config, len(self.config.ch_mult) - 1
        x = self.conv(x, c.ch, "conv_in")
        for i, mult in enumerate(c.ch_mult):
            how = {"attention": i == last, "resample": "downsample" if i < last else None}
            block = self.module(
                ConvBlock, features=c.ch * mult, num_res=c.num_res_blocks, **how, name=f"conv_blocks_{i}"
            )
            x = block(x)
        return self.head(self.middle(x), c.z_channels)


class Decoder(_Coder):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, last = self.config, len(self.config.ch_mult) - 1
        x = self.middle(self.conv(x, c.ch * c.ch_mult[-1], "conv_in"))
        for i, mult in enumerate(reversed(c.ch_mult)):
            how = {"attention": i == 0, "resample": "upsample" if i < last else None}
            block = self.module(
                ConvBlock, features=c.ch * mult, num_res=c.num_res_blocks + 1, **how, name=f"conv_blocks_{i}"
            )
            x = block(x)
        return self.head(x, IMAGE_CHANNELS)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Unit vectors over the last axis in float32 (torch's F.normalize)."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantizer(_VQModule):
    """L2-normalized codebook [codebook_size, codebook_dim]; nearest code by Euclidean distance."""

    def setup(self):
        c = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (c.codebook_size, c.codebook_dim), self.param_dtype
        )

    def nearest(self, z: jax.Array) -> jax.Array:
        """Codes [...] int32 of vectors z [..., codebook_dim]; -1, which is not a code, if a vector is not finite."""
        z, codebook = l2_normalize(z), l2_normalize(self.embedding)
        distances = (
            jnp.sum(z**2, -1, keepdims=True) + jnp.sum(codebook**2, -1) - 2 * einsum("...C,VC->...V", z, codebook)
        )
        finite = jnp.isfinite(z).all(-1) & jnp.isfinite(codebook).all()
        return jnp.where(finite, jnp.argmin(distances, axis=-1), -1).astype(jnp.int32)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Unit vectors [..., codebook_dim] of codes [...], in float32."""
        return l2_normalize(jnp.take(self.embedding, codes, axis=0))

    def quantize(self, z: jax.Array) -> QuantizerOutput:
        """Vectors z [..., codebook_dim] to their codes, with gradients for training (VectorQuantizer.forward)."""
        codes, z = self.nearest(z), l2_normalize(z)
        z_q = l2_normalize(jnp.take(self.embedding, codes, axis=0))
        codebook_loss = jnp.mean((z_q - jax.lax.stop_gradient(z)) ** 2)
        commitment_loss = jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2)
        straight_through = z + jax.lax.stop_gradient(z_q - z)
        return QuantizerOutput(straight_through, codes, z, codebook_loss, commitment_loss)


class QuantizerOutput(NamedTuple):
    """The quantizer's output for training.

    Attributes:
      z_q: unit code vectors [..., codebook_dim]; their gradient is passed unchanged to the encoder (straight-through).
      codes: [...] int32.
      z: the encoder's unit vectors [..., codebook_dim].
      codebook_loss: mean((z_q - sg(z))**2), which moves the codebook.
      commitment_loss: mean((sg(z_q) - z)**2), which moves the encoder; not yet weighted with beta.
    """

    z_q: jax.Array
    codes: jax.Array
    z: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array


class VQModel(nn.Module):
    """Images to codes and codes to images."""

    config: VQConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, param_dtype=self.param_dtype)
        self.decoder = Decoder(c, param_dtype=self.param_dtype)
        self.quantize = Quantizer(c, param_dtype=self.param_dtype)
        self.quant_conv = nn.Dense(c.codebook_dim, **_exactly(jnp.float32, self.param_dtype))
        self.post_quant_conv = nn.Dense(c.z_channels, **_exactly(self.dtype, self.param_dtype))

    def encode(self, images: jax.Array) -> jax.Array:
        """Codes [B, grid * grid], row by row, of images [B, image_size, image_size, 3] in [-1, 1].

        -1, which is not a code, marks vectors of the encoder that are not finite.
        """
        z = self.quant_conv(self.encoder(images.astype(jnp.float32)))
        return self.quantize.nearest(z).reshape(images.shape[0], -1)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Images [B, image_size, image_size, 3], about [-1, 1] but not clipped, of codes [B, grid * grid]."""
        grid = self.config.grid
        z = self.quantize.lookup(codes.reshape(codes.shape[0], grid, grid))
        return self.decoder(self.post_quant_conv(z.astype(self.dtype)))

    def reconstruct(self, images: jax.Array) -> tuple[jax.Array, QuantizerOutput]:
        """For training: reconstructions [B, image_size, image_size, 3], differentiable, and the quantizer's output."""
        quantized = self.quantize.quantize(self.quant_conv(self.encoder(images.astype(self.dtype))))
        return self.decoder(self.post_quant_conv(quantized.z_q.astype(self.dtype))), quantized

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images))
