"""Drawing images: prefill of the prompts, a compiled loop over image codes, and conversion between codes and pixels.

Everything here is a pure function of arrays with static shapes. Prompts are left-padded; caches are donated. The loop
runs from a traced `start` to a traced `stop`, so that a caller can run the same compiled program in several pieces to
show progress.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.config import VQConfig
from janus_jax.model.janus import Janus, run
from janus_jax.model.kv_cache import KVCache, grow_cache, tile_cache
from janus_jax.sampling.acceptance import Guesses
from janus_jax.sampling.cache import cache_sizes, empty_cache, grown_shapes, pieces
from janus_jax.sampling.finite import note_failure, refuse_failed
from janus_jax.sampling.sampler import Sampler, check_guidance, guide, make_sampler, step_keys
from janus_jax.sampling.speculative import (
    Speculate,
    Speculation,
    behind_first,
    continue_windows,
    draw_windows,
    slots_of,
    window_of,
)
from janus_jax.sharding import constrain

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageState:
    """The state of the image loop: the cache, codes [B, num_tokens] so far, and guided logits if requested.

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

    Shapes as in `generate_codes`; by default the cache has as many `slots` as `num_tokens` need.
    """
    (prompts, pair, length), batch = ids.shape, keys.shape[0]
    slots = slots or length + num_tokens - 1
    cache = empty_cache(model, prompts * pair, slots)
    x = run(model, params, "embed_text", ids.reshape(prompts * pair, length))
    hidden, cache = run(model, params, "prefill", x, mask.reshape(prompts * pair, length), cache)
    logits = guide(_image_logits(model, params, hidden[:, -1:], pair), guidance)
    if prompts != batch:
        logits, cache = jnp.tile(logits, (batch, 1)), tile_cache(cache, batch)
    codes = jnp.zeros((batch, num_tokens), jnp.int32).at[:, 0].set(sampler(step_keys(keys, 0), logits))
    failed = note_failure(jnp.full((batch,), -1, jnp.int32), logits, 0)
    kept = None
    if keep_logits:
        kept = jnp.zeros((batch, num_tokens, logits.shape[-1])).at[:, 0].set(logits)
    return ImageState(cache, constrain(codes, "batch", "length"), constrain(failed, "batch"), kept)


def _image_logits(model: Janus, params: Params, hidden: jax.Array, pair: int) -> jax.Array:
    logits = run(model, params, "image_logits", hidden)
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
    """Draws the codes `start` to `stop - 1`; those before `start` (at least one) have already been drawn."""
    pair = state.cache.positions.shape[0] // state.codes.shape[0]

    def step(i, state: ImageState) -> ImageState:
        last = jax.lax.dynamic_slice_in_dim(state.codes, i - 1, 1, axis=1)
        # Both rows of a pair get the code that was drawn, and stay adjacent.
        x = jnp.repeat(run(model, params, "embed_codes", last), pair, axis=0)
        hidden, cache = run(model, params, "decode", x, state.cache)
        logits = guide(_image_logits(model, params, hidden, pair), guidance)
        code = sampler(step_keys(keys, i), logits)
        failed = note_failure(state.failed, logits, i)
        codes = jax.lax.dynamic_update_slice(state.codes, code[:, None], (0, i))
        kept = state.logits
        if kept is not None:
            kept = jax.lax.dynamic_update_slice(kept, logits[:, None], (0, i, 0))
        return ImageState(cache, constrain(codes, "batch", "length"), constrain(failed, "batch"), kept)

    return jax.lax.fori_loop(start, stop, step, state)


def begin_windows(model: Janus, state: ImageState, num_tokens: int, window: int) -> Speculation:
    """The state of the loop over windows, behind the first code, from the one that `start_image` has made."""
    return behind_first(model, state.cache, state.codes[:, 0], state.failed, num_tokens, window)


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
    speculate: Speculate = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Draws image codes (reference: generation_inference.py).

    Args:
      ids: [B, P, T] int32, left-padded prompts ending in begin_of_image. P is 2 (conditional, unconditional row) or 1
        (no guidance: without the unconditional row). [1, P, T] is one prompt for all images, prefilled once.
      mask: bool, same shape as ids; False on left padding only.
      keys: [B] random keys, one per image.
      guidance: weight of classifier-free guidance; ignored when P is 1.
      sampler: see `make_sampler`; default temperature 1.
      num_tokens: codes to draw; default the whole grid.
      keep_logits: also return the guided logits of every step.
      progress: called with the number of new codes (steps, not codes times images) as they are done.
      speculate: see `speculative.window_of`; the codes are the same up to the rounding of another order of sums.
    Returns: codes [B, num_tokens] int32, and logits [B, num_tokens, codebook_size] float32 or None.
    Raises: `finite.NotFinite`, a ValueError, if logits are not finite; ValueError if guidance or `speculate` is out of
        range.
    """
    check_guidance(guidance)
    sampler = make_sampler() if sampler is None else sampler
    num_tokens = num_tokens or model.config.gen_vision.num_tokens
    weight = jnp.float32(guidance)
    pair, length = ids.shape[1:]
    window = window_of(speculate, num_tokens, len(keys), pair, keep_logits)
    if window:
        slots = [slots_of(length, num_tokens, window)]
    else:
        slots = cache_sizes(model, params, pair * len(keys), length, num_tokens)
    state = start_image(model, params, ids, mask, keys, weight, sampler, num_tokens, keep_logits, slots[0])
    refuse = functools.partial(refuse_failed, model, params, unit="image", drawn="code", guidance=guidance)
    if progress is not None:
        refuse(state.failed)  # which waits for the step
        progress(1)
    piece = num_tokens if progress is None else max(1, num_tokens // 24)
    if window:

        def report(images: Guesses, more: int):
            if progress is not None:
                refuse(images.failed)
                progress(more)

        begun = begin_windows(model, state, num_tokens, window)
        images = draw_windows(model, params, begun, keys, weight, sampler, window, piece=piece, report=report)
        refuse(images.failed)
        return images.codes[:, :num_tokens], None
    for size, start, stop in pieces(slots, length, piece, num_tokens):
        state = dataclasses.replace(state, cache=grow_cache(state.cache, size))
        state = continue_image(model, params, state, keys, weight, sampler, jnp.int32(start), jnp.int32(stop))
        if progress is not None:
            refuse(state.failed)
            progress(stop - start)
    refuse(state.failed)
    return state.codes, state.logits


def compile_codes(
    model: Janus,
    params: Any,
    ids: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    guidance: float,
    sampler: Sampler,
    speculate: Speculate = False,
):
    """Compiles the programs of `generate_codes` for such arguments; `params` may be shapes."""
    num_tokens, one = model.config.gen_vision.num_tokens, jnp.int32(1)
    drawing = (keys, jnp.float32(guidance), sampler)
    if window := window_of(speculate, num_tokens, len(keys), ids.shape[1], False):
        room = slots_of(ids.shape[2], num_tokens, window)
        start_image.lower(model, params, ids, mask, *drawing, num_tokens, False, room).compile()
        first = start_image.eval_shape(model, params, ids, mask, *drawing, num_tokens, False, room)
        state = jax.eval_shape(functools.partial(begin_windows, model, num_tokens=num_tokens, window=window), first)
        # The arguments that `draw_windows` gives, by name: left to their defaults it would be another program.
        continue_windows.lower(
            model, params, state, *drawing, one, window=window, coupling="same", fresh="left"
        ).compile()
        return
    slots = cache_sizes(model, params, ids.shape[1] * len(keys), ids.shape[2], num_tokens)
    start_image.lower(model, params, ids, mask, *drawing, num_tokens, False, slots[0]).compile()
    first = start_image.eval_shape(model, params, ids, mask, *drawing, num_tokens, False, slots[0])
    for state in grown_shapes(model, first, slots):
        continue_image.lower(model, params, state, *drawing, one, one).compile()


def compile_decoding(model: Janus, params: Any, batch: int):
    """Compiles `decode_images` for `batch` images; `params` may be shapes."""
    codes = jax.ShapeDtypeStruct((batch, model.config.gen_vision.num_tokens), jnp.int32)
    decode_images.lower(model, params, codes).compile()


def checked_codes(config: VQConfig, codes: np.ndarray) -> np.ndarray:
    """`codes` as an array; ValueError if they are not codes [B, num_tokens]."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != config.num_tokens or not len(codes):
        raise ValueError(f"codes must have shape [B, {config.num_tokens}], got {list(codes.shape)}")
    # XLA clamps an index that is out of range, which would give another image.
    if not np.issubdtype(codes.dtype, np.integer) or codes.min() < 0 or codes.max() >= config.codebook_size:
        raise ValueError(f"codes must be integers from 0 to {config.codebook_size - 1}")
    return codes


@functools.partial(jax.jit, static_argnames=("model",))
def decode_images(model: Janus, params: Params, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes [B, grid * grid] to uint8 images [B, h, w, 3], clipped and truncated as in the reference.

    Also returns [B] bool, whether all values of an image were finite; others become black in `uint8`.
    """
    x = run(model, params, "decode_codes", codes).astype(jnp.float32)
    return jnp.clip((x + 1) / 2 * 255, 0, 255).astype(jnp.uint8), jnp.isfinite(x).all((1, 2, 3))


@functools.partial(jax.jit, static_argnames=("model",))
def encode_codes(model: Janus, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Codes [B, num_tokens] of images [B, h, w, 3] in [-1, 1]; -1 where the encoder's values are not finite."""
    return model.apply({"params": params}, images, method="encode_codes")
