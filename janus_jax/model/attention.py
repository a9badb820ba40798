"""Scaled dot-product attention: one function for caches and encoders, one for packed sequences."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from janus_jax.model import cpu
from janus_jax.model.precision import einsum, exact, precision_of
from janus_jax.sharding import activation_spec, automatic_axes

KEPT = "attention"  # the name of what a backward pass may keep of it, see `layers.rematerialized`


def keep(x: jax.Array) -> jax.Array:
    """`x`, named as a part of the attention."""
    return checkpoint_name(x, KEPT)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Attention with grouped key/value heads; scores and softmax in float32.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, S, H], heads before length as in the KV cache; N is a multiple of K.
      mask: boolean [B or 1, T or 1, S], True where a query may attend; None attends everywhere.
    Returns: [B, T, N, H] in q's dtype. A query whose mask is all False gets the mean of the values.
    """
    weights = attention_weights(q, k, mask).astype(v.dtype)
    return einsum("BKGTS,BKSH->BTKGH", weights, v).reshape(q.shape)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """How much each query attends to each key, float32 [B, K, N / K, T, S]; arguments as for `attend`."""
    batch, length, _, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[1], -1, head_dim)
    scores = einsum("BTKGH,BKSH->BKGTS", q, k, jnp.float32) * head_dim**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Boolean [B, T, T]: each token attends to itself and to earlier tokens of its segment.

    Args:
      segment_ids: [B, T]; padding is a separate segment (0 by convention), so it never leaks into others.
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))


def attend_segments(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, implementation: str = "xla"
) -> jax.Array:
    """Causal attention in which tokens attend only within their segment.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H]; N is a multiple of K.
      segment_ids: [B, T], see `causal_mask`.
      implementation: 'xla', which holds the scores of all pairs; 'cpu', which holds those of one head, see
        `cpu.attend`; or a kernel that holds none: 'splash' (TPU) or 'cudnn' (GPU), see `takes` for their shapes.
    Returns: [B, T, N, H] in q's dtype.
    """
    if implementation in ("xla", "cpu"):
        how = attend if implementation == "xla" else cpu.attend
        return how(q, k, v, causal_mask(segment_ids))
    kernel = {"splash": _splash, "cudnn": functools.partial(_cudnn, causal=True)}[implementation]
    return _by_shard(kernel, q.swapaxes(1, 2), k, v, segment_ids.astype(jnp.int32)).swapaxes(1, 2)


def attend_all(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "xla") -> jax.Array:
    """Attention in which every token attends to every other, as in an encoder.

    Shapes and implementations as in `attend_segments`; falls back to 'xla' if a kernel does not support the shapes.
    """
    if implementation == "cpu":
        return cpu.attend(q, k, v)
    length, heads, head_dim = q.shape[1:]
    if implementation == "cudnn" and takes("cudnn", length, heads, k.shape[1], head_dim, q.dtype):
        return _by_shard(functools.partial(_cudnn, causal=False), q.swapaxes(1, 2), k, v, None).swapaxes(1, 2)
    return attend(q, k, v)


_LANES = 128  # of a TPU's vector registers
_BLOCK = 128  # the fewest tokens that splash takes at a time
_LARGEST_BLOCK = 512
_MOST_PARTS = 8  # of a gradient, as in a row of 4096 tokens
# Tests set these to run the kernels on CPU: interpreted, or by another implementation of dot_product_attention.
_INTERPRET, _CUDNN = False, "cudnn"


def takes(
    implementation: str, length: int, heads: int, kv_heads: int, head_dim: int, dtype: jnp.dtype | str = jnp.bfloat16
) -> bool:
    """Whether an implementation of `attend_segments` supports rows of `length` tokens.

    Splash's blocks must divide its sizes. cuDNN needs 16-bit values and heads of at most 128 (NVIDIA's cuDNN frontend,
    "Scaled Dot Product Attention"), on GPUs of compute capability 8.0 and up.
    """
    return {
        "xla": True,
        "splash": length % _BLOCK == 0 and head_dim % _LANES == 0,
        "cudnn": jnp.dtype(dtype).itemsize == 2 and length % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128,
    }[implementation]


def _by_shard(kernel, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Runs `kernel` on each device's rows and heads: the compiler cannot split a kernel by itself."""
    if precision_of(q.dtype) is not None:
        kernel = _exactly(kernel)
    mesh = automatic_axes()
    if not mesh:
        return kernel(q, k, v, segment_ids)
    of_q = activation_spec(q.shape, ("batch", "heads", None, None), mesh)
    of_kv = activation_spec(k.shape, ("batch", "kv_heads", None, None), mesh)
    if of_q[1] != of_kv[1]:  # fewer key/value heads than shards
        of_q = of_kv
    of_ids = None if segment_ids is None else activation_spec(segment_ids.shape, ("batch", None), mesh)
    specs = (of_q, of_kv, of_kv, of_ids)
    sharded = jax.shard_map(kernel, in_specs=specs, out_specs=of_q, axis_names=set(mesh), check_vma=False)
    return sharded(q, k, v, segment_ids)


def _exactly(kernel):
    """`kernel` with exact float32 products, also in its gradient, which is traced later than the kernel itself."""

    def forward(*args):
        with exact(jnp.float32):
            return jax.vjp(kernel, *args)

    def backward(of_kernel, grad):
        with exact(jnp.float32):
            return of_kernel(grad)

    exactly = jax.custom_vjp(lambda *args: forward(*args)[0])
    exactly.defvjp(forward, backward)
    return exactly


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    # Imported here since it takes a second, and only TPUs have the kernel.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, length, head_dim = q.shape
    block = math.gcd(length, _LARGEST_BLOCK)
    sizes: dict[str, int] = {
        f"block_{name}": block for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    }
    # One kernel for all gradients computes the scores once where two compute them twice, but it leaves the queries' in
    # length / block parts, which are written out and summed.
    if length // block <= _MOST_PARTS:
        sizes["use_fused_bwd_kernel"] = True
    else:
        sizes |= {"block_q_dq": block, "block_kv_dq": block}
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=_INTERPRET,
    )

    def one_row(q, k, v, segment_ids):
        return kernel(q, k, v, splash.SegmentIds(segment_ids, segment_ids))

    return jax.vmap(one_row)(q * jnp.asarray(head_dim**-0.5, q.dtype), k, v, segment_ids)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, causal: bool) -> jax.Array:
    # The public API to cuDNN's kernel has no segment ids; a mask takes 2 bytes per pair, shared by all heads.
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=_CUDNN)
    return y.swapaxes(1, 2)
