"""Sampling loops: prefill, then a compiled loop over image codes or text tokens.

Everything here is a pure function of arrays with static shapes. Prompts come left-padded; caches are donated. Loops
run from a traced `start` to a traced `stop`, so that a caller who wants to show progress, or to stream, runs the same
compiled program in several pieces.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model.janus import Janus, place_images
from janus_jax.model.kv_cache import KVCache, cache_bytes, grow_cache, init_cache, tile_cache
from janus_jax.sampling.finite import note_failure, refuse_failed
from janus_jax.sampling.sampler import Sampler, check_guidance, make_sampler
from janus_jax.sharding import constrain

Params = dict[str, Any]

# A step reads the whole cache, filled or not: a large one starts small, and grows to so many sizes. Each of them is one
# more program to compile, which is not worth it where the weights are most of what is read, or where all is little.
_CACHE_SIZES = 4


def guide(logits: jax.Array, guidance: jax.Array | float) -> jax.Array:
    """Classifier-free guidance: [B, 2, V] (conditional, unconditional) to [B, V]; [B, 1, V] passes through."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    conditional, unconditional = logits[:, 0], logits[:, 1]
    return unconditional + guidance * (conditional - unconditional)


def _step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def empty_cache(model: Janus, rows: int, slots: int) -> KVCache:
    """The cache that the loops below use for `model`, empty."""
    on_cpu = model.attention == "heads"
    return init_cache(model.config.language, rows, slots, model.dtype, model.scan_layers, pad_row=on_cpu)


def _is_large(cache: int, weights: int) -> bool:
    return cache > max(weights // 4, 256 << 20)


def cache_sizes(model: Janus, params: Any, rows: int, length: int, new_tokens: int) -> list[int]:
    """Slots of the cache, smallest first, for `rows` prompts of `length` tokens and what is drawn after them."""
    most = length + new_tokens - 1
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["language_model"]))
    sizes = _CACHE_SIZES if _is_large(cache_bytes(model.config.language, rows, most, model.dtype), weights) else 1
    return [most - new_tokens * smaller // sizes for smaller in reversed(range(sizes))]


def _pieces(slots: list[int], length: int, piece: int, new_tokens: int) -> Iterator[tuple[int, int, int]]:
    """(slots of the cache, first, behind the last) of tokens to draw together, from the second of `new_tokens` on."""
    done = 1
    for size in slots:
        # The last token that is drawn is not stored.
        while done < (room := min(size - length + 1, new_tokens)):
            stop = min(done + piece, room)
            yield size, done, stop
            done = stop


def _grown_shapes(model: Janus, state: Any, slots: list[int]) -> Iterator[Any]:
    """The shapes of `state`, with its cache in each of its sizes."""
    rows = len(state.cache.positions)
    for size in slots:
        cache = jax.eval_shape(functools.partial(empty_cache, model, rows, size))
        yield dataclasses.replace(state, cache=cache)


def _run(model: Janus, params: Params, method: str, *args):
    return model.apply({"params": params}, *args, method=method)


# ---------------------------------------------------------------- images


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageState:
    """What the image loop carries: the cache, codes [B, num_tokens] so far, and guided logits if asked for.

    `failed` [B]: see `finite.note_failure`.
    """

    cache: KVCache
    codes: jax.Array
    failed: jax.Array
    logits: jax.Array | None


@functools.partial(jax.jit, static_argnames=("model", "num_tokens", "keep_logits", "slots"))
def start_image(
    model: Janus,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    guidance: jax.Array,
    sampler: Sampler,
    num_tokens: int,
    keep_logits: bool = False,
    slots: int | None = None,
) -> ImageState:
    """Prefills the prompts and draws the first code.

    Shapes as in `generate_codes`; `slots` of the cache are by default as many as `num_tokens` take.
    """
    (prompts, pair, length), batch = ids.shape, keys.shape[0]
    slots = slots or length + num_tokens - 1
    cache = empty_cache(model, prompts * pair, slots)
    x = _run(model, params, "embed_text", ids.reshape(prompts * pair, length))
    hidden, cache = _run(model, params, "prefill", x, mask.reshape(prompts * pair, length), cache)
    logits = guide(_image_logits(model, params, hidden[:, -1:], pair), guidance)
    if prompts != batch:
        logits, cache = jnp.tile(logits, (batch, 1)), tile_cache(cache, batch)
    codes = jnp.zeros((batch, num_tokens), jnp.int32).at[:, 0].set(sampler(_step_keys(keys, 0), logits))
    failed = note_failure(jnp.full((batch,), -1, jnp.int32), logits, 0)
    kept = None
    if keep_logits:
        kept = jnp.zeros((batch, num_tokens, logits.shape[-1])).at[:, 0].set(logits)
    return ImageState(cache, constrain(codes, "batch", None), constrain(failed, "batch"), kept)


def _image_logits(model: Janus, params: Params, hidden: jax.Array, pair: int) -> jax.Array:
    logits = _run(model, params, "image_logits", hidden)
    return logits.reshape(-1, pair, logits.shape[-1])


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def continue_image(
    model: Janus,
    params: Params,
    state: ImageState,
    keys: jax.Array,
    guidance: jax.Array,
    sampler: Sampler,
    start: jax.Array,
    stop: jax.Array,
) -> ImageState:
    """Draws the codes `start` to `stop - 1`; those before `start` (at least one) are drawn already."""
    pair = state.cache.positions.shape[0] // state.codes.shape[0]

    def step(i, state: ImageState) -> ImageState:
        last = jax.lax.dynamic_slice_in_dim(state.codes, i - 1, 1, axis=1)
        # Both rows of a pair are fed the code that was drawn, and stay neighbors.
        x = jnp.repeat(_run(model, params, "embed_codes", last), pair, axis=0)
        hidden, cache = _run(model, params, "decode", x, state.cache)
        logits = guide(_image_logits(model, params, hidden, pair), guidance)
        code = sampler(_step_keys(keys, i), logits)
        failed = note_failure(state.failed, logits, i)
        codes = jax.lax.dynamic_update_slice(state.codes, code[:, None], (0, i))
        kept = state.logits
        if kept is not None:
            kept = jax.lax.dynamic_update_slice(kept, logits[:, None], (0, i, 0))
        return ImageState(cache, constrain(codes, "batch", None), constrain(failed, "batch"), kept)

    return jax.lax.fori_loop(start, stop, step, state)


def generate_codes(
    model: Janus,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    guidance: float = 5.0,
    sampler: Sampler | None = None,
    num_tokens: int | None = None,
    keep_logits: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Draws image codes (reference: generation_inference.py).

    Args:
      ids: [B, P, T] int32, left-padded prompts ending in begin_of_image. P is 2 (conditional, unconditional row) or 1
        (no guidance: the unconditional row is left out). [1, P, T] is one prompt for all images, prefilled once.
      mask: bool, as ids; False on left padding only.
      keys: [B] random keys, one an image.
      guidance: weight of classifier-free guidance; ignored when P is 1.
      sampler: see `make_sampler`; default temperature 1.
      num_tokens: codes to draw; default the whole grid.
      keep_logits: also return the guided logits of every step.
      progress: called with the number of new codes (steps, not codes times images) as they are done.
    Returns: codes [B, num_tokens] int32, and logits [B, num_tokens, codebook_size] float32 or None.
    Raises: `finite.NotFinite`, a ValueError, where logits are not finite; ValueError for guidance out of range.
    """
    check_guidance(guidance)
    sampler = make_sampler() if sampler is None else sampler
    num_tokens = num_tokens or model.config.gen_vision.num_tokens
    weight = jnp.float32(guidance)
    pair, length = ids.shape[1:]
    slots = cache_sizes(model, params, pair * len(keys), length, num_tokens)
    state = start_image(model, params, ids, mask, keys, weight, sampler, num_tokens, keep_logits, slots[0])
    refuse = functools.partial(refuse_failed, model, params, unit="image", drawn="code", guidance=guidance)
    if progress is not None:
        refuse(state.failed)  # which waits for it
        progress(1)
    piece = num_tokens if progress is None else max(1, num_tokens // 24)
    for size, start, stop in _pieces(slots, length, piece, num_tokens):
        state = dataclasses.replace(state, cache=grow_cache(state.cache, size))
        state = continue_image(model, params, state, keys, weight, sampler, jnp.int32(start), jnp.int32(stop))
        if progress is not None:
            refuse(state.failed)
            progress(stop - start)
    refuse(state.failed)
    return state.codes, state.logits


def compile_codes(
    model: Janus, params: Any, ids: jax.Array, mask: jax.Array, keys: jax.Array, *, guidance: float, sampler: Sampler
):
    """Compiles what `generate_codes` runs for such arguments; of `params` the shapes are enough."""
    num_tokens, one = model.config.gen_vision.num_tokens, jnp.int32(1)
    drawing = (keys, jnp.float32(guidance), sampler)
    slots = cache_sizes(model, params, ids.shape[1] * len(keys), ids.shape[2], num_tokens)
    start_image.lower(model, params, ids, mask, *drawing, num_tokens, False, slots[0]).compile()
    first = start_image.eval_shape(model, params, ids, mask, *drawing, num_tokens, False, slots[0])
    for state in _grown_shapes(model, first, slots):
        continue_image.lower(model, params, state, *drawing, one, one).compile()


def compile_decoding(model: Janus, params: Any, batch: int):
    """Compiles `decode_images` for `batch` images; of `params` the shapes are enough."""
    codes = jax.ShapeDtypeStruct((batch, model.config.gen_vision.num_tokens), jnp.int32)
    decode_images.lower(model, params, codes).compile()


@functools.partial(jax.jit, static_argnames=("model",))
def decode_images(model: Janus, params: Params, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes [B, grid * grid] to uint8 images [B, h, w, 3], clipped and truncated as in the reference.

    Beside them [B] bool, whether all numbers of an image were finite: what is not is black in `uint8`.
    """
    x = _run(model, params, "decode_codes", codes).astype(jnp.float32)
    return jnp.clip((x + 1) / 2 * 255, 0, 255).astype(jnp.uint8), jnp.isfinite(x).all((1, 2, 3))


# ---------------------------------------------------------------- text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextState:
    """What the text loop carries: the cache, tokens [B, max_new_tokens] so far, and which rows are done [B].

    `failed` [B]: see `finite.note_failure`. A row that fails is done; what a row does once it is done is no failure.
    """

    cache: KVCache
    tokens: jax.Array
    done: jax.Array
    failed: jax.Array


@functools.partial(jax.jit, static_argnames=("model",))
def embed_prompt(model: Janus, params: Params, ids: jax.Array, where: jax.Array, pixels: jax.Array | None) -> jax.Array:
    """Embeddings [B, T, D] of prompts with images.

    Args:
      ids: [B, T] int32.
      where: [B, T] bool, the image placeholders.
      pixels: [B, M, h, w, 3] normalized, each row's images in order (further ones are ignored), or None.
    """
    x = _run(model, params, "embed_text", ids)
    if pixels is None:
        return x
    batch, images = pixels.shape[:2]
    features = _run(model, params, "embed_images", pixels.reshape(-1, *pixels.shape[2:]))
    return place_images(x, where, features.reshape(batch, images * features.shape[1], -1))


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "slots"))
def start_text(
    model: Janus,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    eos_id: jax.Array,
    sampler: Sampler,
    max_new_tokens: int,
    slots: int | None = None,
) -> TextState:
    """Prefills embedded prompts x [B, T, D] and draws the first token.

    `slots` of the cache are by default as many as `max_new_tokens` take.
    """
    batch, length, _ = x.shape
    slots = slots or length + max_new_tokens - 1
    cache = empty_cache(model, batch, slots)
    hidden, cache = _run(model, params, "prefill", x, mask, cache)
    logits = _run(model, params, "text_logits", hidden[:, -1:])[:, 0]
    token = sampler(_step_keys(keys, 0), logits)
    tokens = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(token)
    failed = note_failure(jnp.full((batch,), -1, jnp.int32), logits, 0)
    return TextState(cache, tokens, (token == eos_id) | (failed >= 0), failed)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def continue_text(
    model: Janus,
    params: Params,
    state: TextState,
    keys: jax.Array,
    eos_id: jax.Array,
    sampler: Sampler,
    start: jax.Array,
    stop: jax.Array,
) -> TextState:
    """Draws the tokens `start` to `stop - 1`, or fewer when every row has met the end of its sentence."""

    def more(carry) -> jax.Array:
        i, state = carry
        return (i < stop) & ~jnp.all(state.done)

    def step(carry):
        i, state = carry
        last = jax.lax.dynamic_slice_in_dim(state.tokens, i - 1, 1, axis=1)
        x = _run(model, params, "embed_text", last)
        hidden, cache = _run(model, params, "decode", x, state.cache)
        logits = _run(model, params, "text_logits", hidden)[:, 0]
        token = jnp.where(state.done, eos_id, sampler(_step_keys(keys, i), logits))
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, i))
        failed = jnp.where(state.done, state.failed, note_failure(state.failed, logits, i))
        return i + 1, TextState(cache, tokens, state.done | (token == eos_id) | (failed >= 0), failed)

    return jax.lax.while_loop(more, step, (start, state))[1]


def stream_tokens(
    model: Janus,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    eos_id: int,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    piece: int = 8,
    room: int | None = None,
) -> Iterator[jax.Array]:
    """Draws text tokens, `piece` at a time.

    Args:
      x: embedded, left-padded prompts [B, T, D], from `embed_prompt`.
      mask: [B, T] bool, False on padding.
      keys: [B] random keys, one a row.
      eos_id: token that ends a row; -1 for none.
      max_new_tokens: at most so many tokens.
      sampler: see `make_sampler`; default greedy.
      piece: tokens between two yields, at most.
      room: for new tokens in the compiled program, at least max_new_tokens (its default); calls that share it share
        the program.
    Yields: int32 tokens [B, n]; rows that are done repeat eos_id.
    Raises: `finite.NotFinite`, a ValueError, where logits are not finite, before a token of that piece is yielded.
    """
    sampler = make_sampler(0) if sampler is None else sampler
    eos = jnp.int32(eos_id)
    (batch, length, _), room = x.shape, room or max_new_tokens
    slots = cache_sizes(model, params, batch, length, room)
    state = start_text(model, params, x, mask, keys, eos, sampler, room, slots[0])
    refuse_failed(model, params, state.failed, "conversation", "token")
    yield state.tokens[:, :1]
    for size, start, stop in _pieces(slots, length, piece, max_new_tokens):
        if bool(state.done.all()):
            return
        state = dataclasses.replace(state, cache=grow_cache(state.cache, size))
        state = continue_text(model, params, state, keys, eos, sampler, jnp.int32(start), jnp.int32(stop))
        refuse_failed(model, params, state.failed, "conversation", "token")
        yield state.tokens[:, start:stop]


def compile_tokens(
    model: Janus,
    params: Any,
    ids: jax.Array,
    where: jax.Array,
    pixels: jax.Array | None,
    mask: jax.Array,
    keys: jax.Array,
    *,
    sampler: Sampler,
    room: int,
):
    """Compiles `embed_prompt` and what `stream_tokens` runs for such arguments; of `params` the shapes are enough."""
    one = jnp.int32(1)
    embed_prompt.lower(model, params, ids, where, pixels).compile()
    x = embed_prompt.eval_shape(model, params, ids, where, pixels)
    slots = cache_sizes(model, params, *ids.shape, room)
    start_text.lower(model, params, x, mask, keys, one, sampler, room, slots[0]).compile()
    first = start_text.eval_shape(model, params, x, mask, keys, one, sampler, room, slots[0])
    for state in _grown_shapes(model, first, slots):
        continue_text.lower(model, params, state, keys, one, sampler, one, one).compile()


def generate_tokens(*args, max_new_tokens: int, **kwargs) -> jax.Array:
    """All tokens [B, n] of `stream_tokens` in one array; n is at most max_new_tokens."""
    pieces = list(stream_tokens(*args, max_new_tokens=max_new_tokens, piece=max_new_tokens, **kwargs))
    return jnp.concatenate(pieces, axis=1)


def bucket(length: int, smallest: int = 32) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: lengths are padded to these, so that few programs are compiled."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size
