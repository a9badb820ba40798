"""Decoder: LLaMA-type transformer with an explicit key/value cache (reference: transformers LlamaForCausalLM)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from janus_jax.config import LlamaConfig
from janus_jax.model.attention import attend_segments, attention_weights, causal_mask, keep
from janus_jax.model.kv_cache import KVCache, RowCache, RowSlots, attend_cached, attend_rows, store
from janus_jax.model.layers import Embed, RMSNorm, apply_rope, gelu, rematerialized, rope
from janus_jax.model.linear import Linear
from janus_jax.model.precision import residual_dtype
from janus_jax.sharding import constrain, gather_layer
from janus_jax.sizes import DECODER_ACTIVATION

# By their names in config.json. nn.gelu is another one: it approximates.
ACTIVATIONS = {"silu": nn.silu, "gelu": gelu}


class Attention(nn.Module):
    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    attention: str
    fused: bool
    cpu: bool

    @nn.compact
    def __call__(self, x, cos_sin, where, kv, layer, slot):
        """See Block; returns the attention output [B, T, D] and the updated `kv`."""
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype, "cpu": self.cpu}
        if self.fused:
            qkv = Linear("BTD,CNHD->BTCNH", (3, c.heads, c.head_dim, c.width), **types, name="qkv_proj")(x)
            q, k, v = (qkv[:, :, i] for i in range(3))
        else:
            q = Linear("BTD,NHD->BTNH", (c.heads, c.head_dim, c.width), **types, name="q_proj")(x)
            k = Linear("BTD,KHD->BTKH", (c.kv_heads, c.head_dim, c.width), **types, name="k_proj")(x)
            v = Linear("BTD,KHD->BTKH", (c.kv_heads, c.head_dim, c.width), **types, name="v_proj")(x)
        q, k, v = keep(q), keep(k), keep(v)
        q = constrain(apply_rope(q, cos_sin), "batch", "length", "heads", None)
        k, v = apply_rope(k, cos_sin).swapaxes(1, 2), v.swapaxes(1, 2)
        if slot is None and self.is_mutable_collection("intermediates"):  # only for who asks, see `inside.py`
            self.sow("intermediates", "weights", attention_weights(q, k, causal_mask(where)))
        if isinstance(slot, RowSlots) and slot.of_one_token(x.shape[1]) and not self.cpu:
            y, kv = attend_rows(q, kv, k, v, layer, slot)
        else:
            if kv is not None:
                kv = store(kv, k, v, layer, 0 if slot is None else slot)
            if slot is None:
                y = attend_segments(q, k, v, where, self.attention)
            else:
                y = attend_cached(q, kv, layer, where, slot, self.cpu)
        out = {"out_dtype": residual_dtype(self.dtype), **types}
        return keep(Linear("BTNH,DNH->BTD", (c.width, c.heads, c.head_dim), **out, name="o_proj")(y)), kv


class Mlp(nn.Module):
    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    fused: bool
    cpu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype, "cpu": self.cpu}
        if self.fused:
            both = Linear("BTD,CFD->BTCF", (2, c.mlp_dim, c.width), **types, name="gate_up_proj")(x)
            gate, up = both[:, :, 0], both[:, :, 1]
        else:
            gate = Linear("BTD,FD->BTF", (c.mlp_dim, c.width), **types, name="gate_proj")(x)
            up = Linear("BTD,FD->BTF", (c.mlp_dim, c.width), **types, name="up_proj")(x)
        h = constrain(ACTIVATIONS[DECODER_ACTIVATION](gate) * up, "batch", "length", "mlp")
        out = {"out_dtype": residual_dtype(self.dtype), **types}
        return Linear("BTF,DF->BTD", (c.width, c.mlp_dim), **out, name="down_proj")(h)


class Block(nn.Module):
    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    attention: str
    fused: bool
    cpu: bool

    @nn.compact
    def __call__(self, carry, cos_sin, where, slot):
        """One layer.

        Args:
          carry: (x [B, T, D], kv, layer): kv is None or (keys, values), of all layers [layers, B, K, S, H] with this
            one at index `layer`, or of this layer alone [B, K, S, H] with `layer` None.
          where: what is attended to: segment ids [B, T] if `slot` is None, else a mask [B, T, keys] of the cache.
          slot: the slot at which the new keys are written to the cache (or RowSlots), which is then attended to; None
            writes at 0 and attends to the new keys alone.
        Returns: (carry, None), as nn.scan expects.
        """
        x, kv, layer = carry
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        how = {"fused": self.fused, **types}
        with jax.named_scope("attention"):
            h = RMSNorm(c.norm_eps, **types, name="input_layernorm")(x)
            attention = Attention(c, attention=self.attention, cpu=self.cpu, **how, name="self_attn")
            h, kv = attention(h, cos_sin, where, kv, layer, slot)
        x = constrain(x + h, "batch", "length", None)
        with jax.named_scope("mlp"):
            h = RMSNorm(c.norm_eps, **types, name="post_attention_layernorm")(x)
            h = Mlp(c, cpu=self.cpu, **how, name="mlp")(h)
        return (constrain(x + h, "batch", "length", None), kv, None if layer is None else layer + 1), None


class Llama(nn.Module):
    """Embedding, layers, final norm and text head.

    `scan_layers` is the layout of the parameters: `layers` stacked on a leading axis (training, conversion), or
    separate `layers_0`, `layers_1`, ... (decoding: on CPU and GPU, slicing the stack copies the weights in each step).
    `remat`: see `layers.rematerialized`. `attention`: see `attention.attend_segments`.
    `fsdp`, `fused`, `cpu`: see `Janus`.
    """

    config: LlamaConfig
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
        self.embed_tokens = Embed(c.vocab_size, c.width, **types, rows="vocab")
        block = Block
        if self.fsdp:
            gather = functools.partial(gather_layer, "language_model/layers/", self.dtype)
            block = nn.map_variables(block, "params", trans_in_fn=gather)
        block = rematerialized(block, self.remat)
        how = {"attention": self.attention, "fused": self.fused, "cpu": self.cpu, **types}
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,) * 3,
                length=c.layers,
            )
            self.layers = scanned(c, **how)
        else:
            self.layers = [block(c, **how) for _ in range(c.layers)]
        self.norm = RMSNorm(c.norm_eps, **types)
        self.lm_head = Linear("BTD,VD->BTV", (c.vocab_size, c.width), **types, out_dtype=jnp.float32)

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] after the final norm of embeddings x [B, T, D].

        Args:
          positions: [B, T] int32, counted from 0 in each segment.
          segment_ids: [B, T] int32; tokens attend within their segment only.
        """
        hidden, _ = self._run(x, positions, segment_ids, None, None)
        return hidden

    def prefill(self, x: jax.Array, mask: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Fills an empty cache from left-padded prompts.

        Args:
          x: embeddings [B, T, D].
          mask: [B, T] bool, False on padding.
        Returns: hidden states [B, T, D] (undefined on padding), and the cache.
        """
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden, kv = self._run(x, positions, mask, cache, None)
        cache = dataclasses.replace(
            kv,
            mask=jax.lax.dynamic_update_slice(cache.mask, mask.astype(bool), (0, 0)),
            length=jnp.asarray(x.shape[1], jnp.int32),
            positions=mask.sum(axis=1, dtype=jnp.int32),
        )
        return hidden, cache

    def decode(self, x: jax.Array, cache: KVCache, real: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """Appends T new tokens, embedded as x [B, T, D], to every row; returns their hidden states and the cache.

        Args:
          real: [B, T] bool, False on padding, which must be on the left; None if all rows have T tokens.
        """
        batch, length, _ = x.shape
        if real is None:
            new, count, real = jnp.arange(length), length, jnp.ones((batch, length), bool)
        else:
            new, count = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0), real.sum(axis=1, dtype=jnp.int32)
        positions = cache.positions[:, None] + new
        valid = jax.lax.dynamic_update_slice(cache.mask, real, (0, cache.length))
        mask = valid[:, None, :]
        if length > 1:
            mask &= jnp.arange(valid.shape[1]) <= cache.length + jnp.arange(length)[:, None]
        hidden, kv = self._run(x, positions, mask, cache, cache.length)
        return hidden, dataclasses.replace(
            kv, mask=valid, length=cache.length + length, positions=cache.positions + count
        )

    def decode_window(self, x: jax.Array, cache: KVCache, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        """T tokens, embedded as x [B, T, D], behind each row's own length [B] int32 in slots, at least the prompts'.

        They attend to each other causally. Of the cache that prefill has left only keys and values change: what stays
        of the new ones is up to whoever keeps the lengths, and the next tokens overwrite the others.
        """
        slots, ends = jnp.arange(cache.mask.shape[1]), lengths[:, None] + jnp.arange(x.shape[1])
        mask = (cache.mask | (slots >= cache.length))[:, None] & (slots <= ends[..., None])
        positions = cache.positions[:, None] + ends - cache.length
        where = RowSlots(None, lengths, lengths, begins=cache.length - cache.positions)
        return self._run(x, positions, mask, cache, where)

    def decode_rows(
        self,
        x: jax.Array,
        cache: RowCache,
        lengths: jax.Array,
        rows: jax.Array | None = None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, RowCache]:
        """Appends T tokens, embedded as x [R, T, D], to rows of the cache, each behind its own length [R] int32.

        Args:
          rows: [R] int32; None for all rows, in order. The same row may be given several times with the same tokens.
          wanted: [R] bool, False for rows whose hidden states may be anything finite; None wants all.
        """
        seen = lengths if wanted is None else jnp.where(wanted, lengths, 0)
        slots, tokens = RowSlots(rows, lengths, seen), x.shape[1]
        positions = lengths[:, None] + jnp.arange(tokens)
        return self._run(x, positions, slots.mask(tokens, cache.slots), cache, slots)

    def _run(self, x, positions, where, cache, slot):
        c = self.config
        cos_sin = rope(positions, c.head_dim, c.rope_theta)
        groups = [None] if cache is None else list(zip(cache.keys, cache.values, strict=True))
        x = constrain(x.astype(residual_dtype(self.dtype)), "batch", "length", None)
        if self.scan_layers:
            (x, groups[0], _), _ = self.layers((x, groups[0], jnp.zeros((), jnp.int32)), cos_sin, where, slot)
        else:
            groups = groups * c.layers if cache is None else groups
            for i, block in enumerate(self.layers):
                (x, groups[i], _), _ = block((x, groups[i], None), cos_sin, where, slot)
        if cache is not None:
            keys, values = zip(*groups, strict=True)
            cache = dataclasses.replace(cache, keys=keys, values=values)
        return self.norm(x), cache
