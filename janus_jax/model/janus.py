"""Janus: two encoders, two adapters, one decoder, two heads (reference: janus/models/modeling_vlm.py)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.config import IMAGE_CHANNELS, JanusConfig
from janus_jax.model import cpu
from janus_jax.model.kv_cache import KVCache, RowCache
from janus_jax.model.layers import Embed, MlpProjector, gelu
from janus_jax.model.linear import Linear
from janus_jax.model.llama import Llama
from janus_jax.model.precision import residual_dtype
from janus_jax.model.siglip import Siglip
from janus_jax.model.vq import VQModel
from janus_jax.sharding import constrain


class GenHead(nn.Module):
    """Hidden states [..., D] to float32 image logits [..., codebook_size]."""

    width: int
    hidden: int
    codebook_size: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Linear("...D,FD->...F", (self.hidden, self.width), **types, name="output_mlp_projector")(x)
        # Whole on every device, or TPU's partitioner passes its pieces around a ring, one product each.
        x = constrain(gelu(x), "batch", *(None,) * (x.ndim - 1))
        shape = (self.codebook_size, self.hidden)
        return Linear("...F,VF->...V", shape, **types, out_dtype=jnp.float32, name="vision_head")(x)


class Janus(nn.Module):
    """The whole model. Use `model.apply({"params": params}, ..., method="embed_text")` and its siblings.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are cast to it where they are used.
      param_dtype: dtype of the parameters that `init` creates.
      scan_layers: layout of the decoder's parameters, see `Llama`.
      remat: what training recomputes to save memory, see `layers.rematerialized`.
      attention: see `attention.attend_segments`, and for SigLIP `attention.attend_all`.
      fsdp: whether the parameters of layers are this device's shards along the mesh axis `fsdp`, to be gathered where
        they are used; inside `jax.shard_map` (training).
      fused: whether the decoder's q, k and v, and gate and up, are one product each, on parameters of `fuse.fuse`.
      cpu: whether to compute in the way that is fastest on XLA:CPU, see `janus_jax.model.cpu`; overrides `attention`.
    """

    config: JanusConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "xla"
    fsdp: bool = False
    fused: bool = False
    cpu: bool = False

    def setup(self):
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        g, width = c.gen_vision, c.language.width
        attention = "cpu" if self.cpu else self.attention
        how = {"remat": self.remat, "fsdp": self.fsdp, "attention": attention, "cpu": self.cpu, **types}
        self.vision_model = Siglip(c.vision, **how)
        self.aligner = MlpProjector(c.vision.width, width, c.aligner_depth, **types)
        self.gen_vision_model = VQModel(g, **types | {"dtype": residual_dtype(self.dtype)})
        self.gen_embed = Embed(g.codebook_size, g.codebook_dim, **types)
        self.gen_aligner = MlpProjector(g.codebook_dim, width, c.gen_aligner_depth, **types)
        self.gen_head = GenHead(width, c.gen_head_width, g.codebook_size, **types)
        self.language_model = Llama(c.language, scan_layers=self.scan_layers, fused=self.fused, **how)

    @property
    def cache_dtype(self) -> Any:
        """The dtype of keys and values in a cache."""
        return cpu.cache_dtype(self.dtype) if self.cpu else self.dtype

    # ------------------------------------------------------------ into the decoder

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """Token ids [B, T] to embeddings [B, T, D]."""
        return self.language_model.embed_tokens(ids)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Normalized pixels [B, h, w, 3] to SigLIP features [B, patches, vision width]."""
        return self.vision_model(pixels)

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """Normalized pixels [B, h, w, 3] to embeddings [B, patches, D]."""
        return self.aligner(self.vision_model(pixels))

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Image codes [B, T] to embeddings [B, T, D]."""
        return self.gen_aligner(self.gen_embed(codes))

    # ------------------------------------------------------------ through it

    def hidden(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Full forward pass without a cache: embeddings [B, T, D] to hidden states [B, T, D]; see `Llama`."""
        return self.language_model(x, positions, segment_ids)

    def prefill(self, x: jax.Array, mask: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Left-padded prompts [B, T, D] into an empty cache; see `Llama.prefill`."""
        return self.language_model.prefill(x, mask, cache)

    def decode(self, x: jax.Array, cache: KVCache, real: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """New tokens [B, T, D] after a filled cache; see `Llama.decode`."""
        return self.language_model.decode(x, cache, real)

    def decode_window(self, x: jax.Array, cache: KVCache, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        """A window of tokens [B, T, D] behind each row's own length; see `Llama.decode_window`."""
        return self.language_model.decode_window(x, cache, lengths)

    def decode_rows(
        self,
        x: jax.Array,
        cache: RowCache,
        lengths: jax.Array,
        rows: jax.Array | None = None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, RowCache]:
        """New tokens [R, T, D] behind the lengths of rows of the cache; see `Llama.decode_rows`."""
        return self.language_model.decode_rows(x, cache, lengths, rows, wanted)

    # ------------------------------------------------------------ out of it

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] to float32 logits [B, T, vocabulary]."""
        return self.language_model.lm_head(hidden)

    def image_logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] to float32 logits [B, T, codebook_size]."""
        return self.gen_head(hidden)

    # ------------------------------------------------------------ images and codes

    def encode_codes(self, images: jax.Array) -> jax.Array:
        """Images [B, h, w, 3] in [-1, 1] to codes [B, grid * grid], row by row."""
        return self.gen_vision_model.encode(images)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Codes [B, grid * grid] to images [B, h, w, 3], about [-1, 1]."""
        return self.gen_vision_model.decode(codes)

    def __call__(self, ids: jax.Array, pixels: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Touches every parameter, for initialization: text [B, T], pixels and images as above."""
        codes = self.encode_codes(images)
        rows = [self.embed_text(ids), self.embed_images(pixels), self.embed_codes(codes)]
        self.decode_codes(codes)
        x = jnp.concatenate(rows, axis=1)
        batch, length, _ = x.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        hidden = self.hidden(x, positions, jnp.ones((batch, length), jnp.int32))
        return self.text_logits(hidden), self.image_logits(hidden)


def place_images(x: jax.Array, where: jax.Array, features: jax.Array) -> jax.Array:
    """Puts image features at the image slots of a row, in order.

    Args:
      x: text embeddings [B, T, D].
      where: [B, T] bool, the placeholders.
      features: [B, Q, D], each row's image features in sequence; as many are used as there are placeholders.
    """
    index = jnp.clip(jnp.cumsum(where, axis=1) - 1, 0, features.shape[1] - 1)
    placed = jnp.take_along_axis(features, index[..., None], axis=1)
    return jnp.where(where[..., None], placed.astype(x.dtype), x)


def run(model: Janus, params: dict[str, Any], method: str, *args):
    """Calls a method of `model` by name."""
    return model.apply({"params": params}, *args, method=method)


def init_params(model: Janus, key: jax.Array) -> dict[str, Any]:
    """Random parameters of `model` (use it in `jax.jit`, or in `jax.eval_shape` for the shapes alone)."""
    v, g = model.config.vision.image_size, model.config.gen_vision.image_size
    inputs = (
        jnp.zeros((1, 2), jnp.int32),
        jnp.zeros((1, v, v, IMAGE_CHANNELS)),
        jnp.zeros((1, g, g, IMAGE_CHANNELS)),
    )
    return model.init(key, *inputs)["params"]
