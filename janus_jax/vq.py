"""Generation tokenizer: VQ-16 of LlamaGen (reference: janus/models/vq_model.py). Images are NHWC in [-1, 1]."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.config import IMAGE_CHANNELS, VQConfig
from janus_jax.sharding import constrain


class GroupNorm(nn.Module):
    """Norm over space and groups of channels, in float32 and two passes.

    Sums go over space first: XLA:CPU takes one and a half times as long for flax's, over space and groups at once.
    """

    groups: int
    eps: float
    dtype: Any
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
        return (y + bias).astype(self.dtype)


class _VQModule(nn.Module):
    """What all parts share: the config, the dtypes, and convolutions and norms built from them."""

    config: VQConfig
    dtype: Any
    param_dtype: Any

    def part(self, cls, *args, name: str):
        return cls(self.config, self.dtype, self.param_dtype, *args, name=name)

    def conv(self, features: int, name: str, strides: int = 1, padding: Any = 1) -> nn.Conv:
        return nn.Conv(
            features, (3, 3), strides=strides, padding=padding, dtype=self.dtype, param_dtype=self.param_dtype,
            name=name,
        )  # fmt: skip

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def norm(self, name: str) -> GroupNorm:
        c = self.config
        return GroupNorm(c.norm_groups, c.norm_eps, self.dtype, self.param_dtype, name=name)


class ResnetBlock(_VQModule):
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv(self.features, "conv1")(nn.swish(self.norm("norm1")(x)))
        h = self.conv(self.features, "conv2")(nn.swish(self.norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = self.dense(self.features, "nin_shortcut")(x)
        return x + h


class AttnBlock(_VQModule):
    """Single-head attention over all positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = self.norm("norm")(x).reshape(batch, height * width, channels)
        q, k, v = (self.dense(channels, name)(h) for name in "qkv")
        scores = jnp.einsum("BTC,BSC->BTS", q, k, preferred_element_type=jnp.float32) * channels**-0.5
        h = jnp.einsum("BTS,BSC->BTC", jax.nn.softmax(scores).astype(v.dtype), v)
        return x + self.dense(channels, "proj_out")(h).reshape(x.shape)


class Downsample(_VQModule):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.shape[-1], "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class Upsample(_VQModule):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class ConvBlock(_VQModule):
    """One resolution: residual blocks, each followed by attention at the lowest one, then a change of resolution."""

    features: int = 0
    num_res: int = 0
    attention: bool = False
    resample: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_res):
            x = self.part(ResnetBlock, self.features, name=f"res_{i}")(x)
            if self.attention:
                x = self.part(AttnBlock, name=f"attn_{i}")(x)
        if self.resample:
            x = self.part({"downsample": Downsample, "upsample": Upsample}[self.resample], name=self.resample)(x)
        return constrain(x, "batch", None, None, None)


class _Coder(_VQModule):
    def middle(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        x = self.part(ResnetBlock, features, name="mid_0")(x)
        x = self.part(AttnBlock, name="mid_1")(x)
        return self.part(ResnetBlock, features, name="mid_2")(x)

    def head(self, x: jax.Array, features: int) -> jax.Array:
        return self.conv(features, "conv_out")(nn.swish(self.norm("norm_out")(x)))


class Encoder(_Coder):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, last = self.config, len(self.config.ch_mult) - 1
        x = self.conv(c.ch, "conv_in")(x)
        for i, mult in enumerate(c.ch_mult):
            args = (c.ch * mult, c.num_res_blocks, i == last, "downsample" if i < last else None)
            x = self.part(ConvBlock, *args, name=f"conv_blocks_{i}")(x)
        return self.head(self.middle(x), c.z_channels)


class Decoder(_Coder):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, last = self.config, len(self.config.ch_mult) - 1
        x = self.middle(self.conv(c.ch * c.ch_mult[-1], "conv_in")(x))
        for i, mult in enumerate(reversed(c.ch_mult)):
            args = (c.ch * mult, c.num_res_blocks + 1, i == 0, "upsample" if i < last else None)
            x = self.part(ConvBlock, *args, name=f"conv_blocks_{i}")(x)
        return self.head(x, IMAGE_CHANNELS)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Unit vectors over the last axis in float32 (torch's F.normalize)."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantizer(_VQModule):
    """L2-normalised codebook [codebook_size, codebook_dim]; nearest code by Euclidean distance."""

    def setup(self):
        c = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (c.codebook_size, c.codebook_dim), self.param_dtype
        )

    def nearest(self, z: jax.Array) -> jax.Array:
        """Codes [...] int32 of vectors z [..., codebook_dim]."""
        z, codebook = l2_normalize(z), l2_normalize(self.embedding)
        # Full precision: a code is an argmin, and tensor cores would round near ties away.
        dots = jnp.einsum("...C,VC->...V", z, codebook, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(z**2, -1, keepdims=True) + jnp.sum(codebook**2, -1) - 2 * dots
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Unit vectors [..., codebook_dim] of codes [...]."""
        return l2_normalize(jnp.take(self.embedding, codes, axis=0)).astype(self.dtype)

    def quantize(self, z: jax.Array) -> QuantizerOutput:
        """Vectors z [..., codebook_dim] to their codes, with gradients for training (VectorQuantizer.forward)."""
        codes, z = self.nearest(z), l2_normalize(z)
        z_q = l2_normalize(jnp.take(self.embedding, codes, axis=0))
        codebook_loss = jnp.mean((z_q - jax.lax.stop_gradient(z)) ** 2)
        commitment_loss = jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2)
        straight_through = z + jax.lax.stop_gradient(z_q - z)
        return QuantizerOutput(straight_through, codes, z, codebook_loss, commitment_loss)


class QuantizerOutput(NamedTuple):
    """What training needs of the quantizer.

    Attributes:
      z_q: unit code vectors [..., codebook_dim]; their gradient goes to the encoder as it is (straight-through).
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
        c, types = self.config, (self.dtype, self.param_dtype)
        self.encoder = Encoder(c, *types)
        self.decoder = Decoder(c, *types)
        self.quantize = Quantizer(c, *types)
        self.quant_conv = nn.Dense(c.codebook_dim, dtype=self.dtype, param_dtype=self.param_dtype)
        self.post_quant_conv = nn.Dense(c.z_channels, dtype=self.dtype, param_dtype=self.param_dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """Codes [B, grid * grid], row by row, of images [B, image_size, image_size, 3] in [-1, 1]."""
        z = self.quant_conv(self.encoder(images.astype(self.dtype)))
        return self.quantize.nearest(z).reshape(images.shape[0], -1)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Images [B, image_size, image_size, 3], about [-1, 1] but not clipped, of codes [B, grid * grid]."""
        grid = self.config.grid
        z = self.quantize.lookup(codes.reshape(codes.shape[0], grid, grid))
        return self.decoder(self.post_quant_conv(z))

    def reconstruct(self, images: jax.Array) -> tuple[jax.Array, QuantizerOutput]:
        """For training: reconstructions [B, image_size, image_size, 3], differentiable, and the quantizer's output."""
        quantized = self.quantize.quantize(self.quant_conv(self.encoder(images.astype(self.dtype))))
        return self.decoder(self.post_quant_conv(quantized.z_q.astype(self.dtype))), quantized

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images))
