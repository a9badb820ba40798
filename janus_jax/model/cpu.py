"""All workarounds for operations that XLA:CPU is slow at.

Results are the same up to rounding, so readers of the model can ignore every call: `product` is its first argument,
`attend` and `attend_rows` are `attention.attend`, `cache_dtype`, `cache_rows` and `as_cached` return their first
argument. `Janus.cpu` switches them on, and only `janus_jax.loading.layout` sets it, on a single CPU device. For
products of few tokens, the compiler picks the branch of its platform, whatever the model says.

(Not here, since it is the same on every platform: `vq.GroupNorm` sums over space before it sums over groups.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model.precision import einsum

# Up to this many tokens XLA:CPU is faster with the kernel on the left (measured: 2.6 times for 2, 1.3 for 128).
_FEW_TOKENS = 128
# In bfloat16 that holds from this many tokens on (with AVX512-BF16: 0.7 times as fast for 2, 1.4 for 64).
_FEW_NARROW_TOKENS = 16
_BLOCK = 128  # rows of an int8 or int4 kernel that are widened at a time
_SLOTS = 128  # of the cache that are attended to at a time
_LOOPS = 4  # that run at the same time


# ---------------------------------------------------------------- linear layers


def product(
    plain: Callable[[jax.Array, jax.Array], jax.Array],
    spec: str,
    x: jax.Array,
    kernel: jax.Array,
    out_dtype: Any,
    as_matrix: bool,
) -> jax.Array:
    """`plain(x, kernel)`, or on a CPU the same as a product of matrices.

    Args:
      plain: the einsum `spec` into `out_dtype`.
      kernel: output axes first, then those that are summed over; int8 is widened to x's dtype.
      as_matrix: multiply by the kernel as a matrix for any number of tokens: XLA:CPU would transpose a kernel of three
        axes in every call.
    """
    inputs, kernel_axes = spec.split("->")[0].split(",")
    contracted = sum(axis in inputs for axis in kernel_axes)
    leading, outputs = x.shape[: x.ndim - contracted], kernel.shape[: kernel.ndim - contracted]

    def matrices(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x.reshape(math.prod(leading), -1), kernel.reshape(math.prod(outputs), -1)

    def kernel_right(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows, matrix = matrices(x, kernel)
        if len(rows) == 1 and _is_narrow(rows):  # a matrix by a vector takes ten times as long
            rows = jnp.repeat(rows, 2, axis=0)
        y = _einsum("TD,FD->TF", rows, matrix.astype(rows.dtype), out_dtype)
        return y[: math.prod(leading)].reshape(*leading, *outputs)

    def kernel_left(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows, matrix = matrices(x, kernel)
        if _is_narrow(rows) and matrix.dtype == rows.dtype and len(rows) < _FEW_NARROW_TOKENS:
            return kernel_right(x, kernel)
        in_blocks = matrix.dtype == jnp.int8 and len(matrix) % _BLOCK == 0
        multiply = _multiply_in_blocks if in_blocks else _multiply
        return multiply(matrix, rows, out_dtype).T.reshape(*leading, *outputs)

    if math.prod(leading) <= _FEW_TOKENS:
        return jax.lax.platform_dependent(x, kernel, cpu=kernel_left, default=plain)
    return kernel_right(x, kernel) if as_matrix else plain(x, kernel)


def _multiply(matrix: jax.Array, rows: jax.Array, out_dtype: Any) -> jax.Array:
    """[F, D] by [T, D] to [F, T], with the matrix fixed as the left operand.

    XLA:CPU repacks the right operand of a product, however large; the barrier keeps it from swapping the two.
    """
    y = _einsum("FD,TD->FT", matrix.astype(rows.dtype), rows, out_dtype)
    return jax.lax.optimization_barrier(y)


def _is_narrow(x: jax.Array) -> bool:
    return jnp.finfo(x.dtype).bits < 32


def _einsum(spec: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`precision.einsum`, accumulated in float32 and narrowed afterwards.

    XLA:CPU takes two to four times as long where a product of narrow operands is to return them narrow.
    """
    return einsum(spec, x, y, jnp.float32).astype(out_dtype or x.dtype)


def _multiply_in_blocks(matrix: jax.Array, rows: jax.Array, out_dtype: Any) -> jax.Array:
    """`_multiply` of an int8 matrix, widened a block at a time, so that the wide form stays in the processor's cache.

    XLA:CPU would otherwise write out the whole matrix in float32 and read it again, which takes 2.5 times as long.
    """

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(matrix, i * _BLOCK, _BLOCK).astype(rows.dtype)
        made = _multiply(jax.lax.optimization_barrier(block), rows, out_dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, made, i * _BLOCK, 0)

    empty = jnp.zeros((len(matrix), len(rows)), out_dtype)
    return jax.lax.fori_loop(0, len(matrix) // _BLOCK, step, empty)


def int4_product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """[T, D] by the int4 [F, D] to float32 [T, F]; `scale` [F, groups] has one for each group of D.

    XLA:CPU widens int4 one by one, ten times as slow as int8. Two that share a byte are therefore taken as one int8 and
    told apart by shifts: the first of each two is multiplied by the even columns of x, the second by the odd.
    """
    features, groups = scale.shape
    pairs = jax.lax.bitcast_convert_type(kernel.reshape(features, -1, 2), jnp.int8)
    even, odd = (x.reshape(len(x), -1, 2)[..., i] for i in range(2))
    size = _BLOCK if features % _BLOCK == 0 else features

    def multiply(halves: jax.Array, own: jax.Array, rows: jax.Array) -> jax.Array:
        wide = halves.astype(jnp.float32).reshape(size, groups, -1) * own[..., None].astype(jnp.float32)
        wide = jax.lax.optimization_barrier(wide.reshape(size, -1).astype(x.dtype))
        return _multiply(wide, rows, jnp.float32)

    def block(i: jax.Array) -> jax.Array:
        both = jax.lax.dynamic_slice_in_dim(pairs, i * size, size)
        own = jax.lax.dynamic_slice_in_dim(scale, i * size, size)
        first = jnp.right_shift(jnp.left_shift(both, 4), 4)
        return multiply(first, own, even) + multiply(jnp.right_shift(both, 4), own, odd)

    made = jax.lax.map(block, jnp.arange(features // size))
    return made.reshape(features, len(x)).T


# ---------------------------------------------------------------- attention


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`attention.attend`, one key/value head of one row at a time.

    XLA:CPU multiplies single matrices two to three times as fast as batches, and one head's scores stay in the cache.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    q = q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> jax.Array:
        scores = einsum("TH,SH->TS", q.reshape(-1, head_dim), k, jnp.float32)
        scores = scores.reshape(length, -1, slots) * head_dim**-0.5
        if mask is not None:
            own = mask[row % len(mask)]
            scores = jnp.where(own[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return _einsum("TS,SH->TH", weights.reshape(-1, slots), v).reshape(q.shape)

    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    y = jax.lax.map(lambda given: one(*given), (*flat, jnp.repeat(jnp.arange(batch), kv_heads)))
    return y.reshape(batch, kv_heads, length, -1, head_dim).transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, -1)


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array | None,
    seen: jax.Array,
    begins: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend` of new tokens q [R, T, N, H] of rows of a cache [B, K, S, H]; arguments as in `RowSlots`.

    It reads only slots that are filled, in blocks, with the softmax of those read so far: rows differ in length, and on
    a CPU nothing hides what is read in vain. One token takes all heads at once, several take them one by one, as in
    `attend`. Loops that do not depend on each other run at the same time.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    together = kv_heads if tokens == 1 else 1  # heads
    block = min(_SLOTS, slots)
    q = q.reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads // together, together, -1, head_dim)
    queries = q.shape[2]  # of each head: all tokens, for each of the heads that share these keys
    least = jnp.finfo(jnp.float32).min

    def one(i: jax.Array, q: jax.Array) -> jax.Array:
        which, head = i // (kv_heads // together), i % (kv_heads // together) * together
        row = which if rows is None else rows[which]
        last = seen[which] + jnp.arange(queries) % tokens

        def some(x: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x, (row, head, start, 0), (1, together, block, head_dim))[0]

        def step(n: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            y, most, total = state
            start = jnp.minimum(n * block, slots - block)
            slot = start + jnp.arange(block)
            scores = einsum("KMH,KSH->KMS", q, some(k, start), jnp.float32) * head_dim**-0.5
            # The last block may begin within the one before.
            # What a block of nothing but padding adds fades to 0 with the first slot that counts.
            first = n * block if begins is None else jnp.maximum(n * block, begins[which])
            scores = jnp.where((slot <= last[:, None]) & (slot >= first), scores, least)
            new = jnp.maximum(most, scores.max(axis=-1))
            weights, faded = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            values = einsum("KMS,KSH->KMH", weights.astype(v.dtype), some(v, start), jnp.float32)
            return y * faded[..., None] + values, new, total * faded + weights.sum(axis=-1)

        empty = jnp.full(q.shape[:2], least, jnp.float32)
        none = jnp.zeros(q.shape, jnp.float32), empty, jnp.zeros_like(empty)
        y, _, total = jax.lax.fori_loop(0, (seen[which] + tokens - 1) // block + 1, step, none)
        return (y / total[..., None]).astype(v.dtype)

    numbers = jnp.arange(len(q))
    each = -(-len(q) // _LOOPS)
    parts = [slice(start, start + each) for start in range(0, len(q), each)]
    y = jnp.concatenate([jax.lax.map(lambda given: one(*given), (numbers[part], q[part])) for part in parts])
    y = y.reshape(batch, kv_heads, -1, tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, tokens, heads, head_dim)


# ---------------------------------------------------------------- the cache


def cache_dtype(dtype: Any) -> Any:
    """float32 for a model of any `dtype`: XLA:CPU would widen a narrow cache in every step.

    That is seven times as slow for 16 rows of 640 tokens.
    """
    return jnp.promote_types(dtype, jnp.float32)


def cache_rows(batch: int) -> int:
    """Number of rows to keep for `batch` rows, if layers are separate: a single row is kept twice.

    XLA:CPU would copy a cache of one row several times per step.
    """
    return max(batch, 2)


def as_cached(x: jax.Array, rows: int) -> jax.Array:
    """`x` [B, ...], or its single row repeated to the cache's `rows`."""
    return x if len(x) == rows else jnp.broadcast_to(x, (rows, *x.shape[1:]))
