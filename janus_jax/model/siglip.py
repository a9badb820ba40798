"""Understanding encoder: the SigLIP vision transformer (reference: janus/models/siglip_vit.py)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.config import SiglipConfig
from janus_jax.model.attention import attend_all, keep
from janus_jax.model.layers import gelu, rematerialized
from janus_jax.model.linear import Linear
from janus_jax.model.precision import precision_of, residual_dtype
from janus_jax.sharding import constrain, gather_layer


def _layer_norm(module: nn.Module, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=module.config.norm_eps,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        use_fast_variance=False,
        name=name,
    )


class Attention(nn.Module):
    config: SiglipConfig
    dtype: Any
    param_dtype: Any
    attention: str
    cpu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        split = (c.heads, c.head_dim, c.width)
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype, "cpu": self.cpu}
        q, k, v = (keep(Linear("BTD,NHD->BTNH", split, **types, name=n)(x)) for n in "qkv")
        q = constrain(q, "batch", "length", "heads", None)
        y = attend_all(q, k.swapaxes(1, 2), v.swapaxes(1, 2), self.attention)
        out = {"out_dtype": residual_dtype(self.dtype), **types}
        return keep(Linear("BTNH,DNH->BTD", (c.width, c.heads, c.head_dim), **out, name="proj")(y))


class Mlp(nn.Module):
    config: SiglipConfig
    dtype: Any
    param_dtype: Any
    cpu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype, "cpu": self.cpu}
        h = Linear("BTD,FD->BTF", (c.mlp_dim, c.width), **types, name="fc1")(x)
        h = gelu(constrain(h, "batch", "length", "mlp"))
        out = {"out_dtype": residual_dtype(self.dtype), **types}
        return Linear("BTF,DF->BTD", (c.width, c.mlp_dim), **out, name="fc2")(h)


class Block(nn.Module):
    config: SiglipConfig
    dtype: Any
    param_dtype: Any
    attention: str
    cpu: bool

    @nn.compact
    def __call__(self, x: jax.Array, _) -> tuple[jax.Array, None]:
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = _layer_norm(self, "norm1")(x)
        x = x + Attention(c, **types, attention=self.attention, cpu=self.cpu, name="attn")(h)
        h = _layer_norm(self, "norm2")(x)
        x = x + Mlp(c, **types, cpu=self.cpu, name="mlp")(h)
        return constrain(x, "batch", "length", None), None


class Siglip(nn.Module):
    """Pixels [B, image_size, image_size, 3], normalized, to patch features [B, num_patches, width].

    The final LayerNorm is applied; as in the reference, there is no class token and no pooling.
    `remat`: see `layers.rematerialized`. `fsdp`, `cpu`: see `Janus`. `attention`: see `attention.attend_all`.
    """

    config: SiglipConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    fsdp: bool = False
    attention: str = "xla"
    cpu: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        patch = (c.patch_size, c.patch_size)
        x = nn.Conv(
            c.width, patch, strides=patch, padding="VALID", dtype=self.dtype, param_dtype=self.param_dtype,
            precision=precision_of(self.dtype), name="patch_embed",
        )(pixels.astype(self.dtype))  # fmt: skip
        x = x.reshape(x.shape[0], c.num_patches, c.width)
        pos = self.param("pos_embed", nn.initializers.normal(0.02), (c.num_patches, c.width), self.param_dtype)
        x = constrain((x + pos.astype(self.dtype)).astype(residual_dtype(self.dtype)), "batch", "length", None)
        block = Block
        if self.fsdp:
            gather = functools.partial(gather_layer, "vision_model/blocks/", self.dtype)
            block = nn.map_variables(block, "params", trans_in_fn=gather)
        block = rematerialized(block, self.remat)
        blocks = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
        how = {"dtype": self.dtype, "param_dtype": self.param_dtype, "attention": self.attention, "cpu": self.cpu}
        x, _ = blocks(c, **how, name="blocks")(x, None)
        return _layer_norm(self, "norm")(x)
