"""Drawing several codes of an image in one pass, with exactly the distribution of one code after the other.

A pass reads all weights, whether it is given one code or sixteen. So each is given a window: an image's last code, and
guesses for those behind it. It yields the law of every position, by which `acceptance` says which guesses stand and
what the others become: the next window's guesses. Both rows of guidance are in the same pass, and each image goes on by
its own count.

With the coupling 'same', which is what everyone gets who does not ask for another, the images are those of the plain
loop, so that the window is a matter of speed alone. (Where values are not finite, as with damaged parameters, a guess
spoils its pass though it is not drawn in the end, and the image fails where the plain loop might not.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.io.messages import one_line
from janus_jax.model.janus import Janus, run
from janus_jax.model.kv_cache import KVCache
from janus_jax.sampling.acceptance import Coupling, Fresh, Guesses, advanced, settled_windows
from janus_jax.sampling.sampler import Sampler, guide
from janus_jax.sharding import RULES, automatic_axes, constrain

Params = dict[str, Any]
Speculate = Literal["auto", False] | int

# What 'auto' takes, by platform: the largest window, and the most tokens of all rows in a pass, up to which it costs
# little more than a pass over one code. A platform that is not here was not measured, and draws one code at a time.
# On an H100 a pass of 7B over 16 codes costs 1.25 steps with one image, 1.44 with four, and over 8 with sixteen 1.37;
# Janus-Pro is reported to need 0.27 to 0.55 passes a code (arXiv 2510.24211).
_AUTO: dict[str, tuple[int, int]] = {"gpu": (16, 128)}
_SMALLEST_WINDOW, _FEWEST_CODES = 4, 64  # with less there is little to win, and a program more to compile


def check_speculate(speculate: Any, num_tokens: int | None = None) -> Speculate:
    """`speculate` if it is "auto", False or a window; else ValueError. `num_tokens` are an image's codes, if known."""
    if (isinstance(speculate, str) and speculate == "auto") or speculate is False:
        return speculate
    whole = isinstance(speculate, (int, np.integer)) and not isinstance(speculate, bool)
    if not whole or speculate < 2 or (num_tokens is not None and speculate > num_tokens):
        most = "an image's codes" if num_tokens is None else f"{num_tokens}, an image's codes"
        raise ValueError(f"speculate must be 'auto', False or a window from 2 to {most}, got {one_line(speculate)}")
    return int(speculate)


def window_of(speculate: Speculate, num_tokens: int, images: int, pair: int, keep_logits: bool) -> int:
    """The window to draw `images` with, each of `pair` rows, on the current platform and mesh; 0 is the plain loop.

    "auto" takes the plain loop where a window does not pay or was not measured (on meshes), and with `keep_logits`.
    Raises: ValueError for a window that is out of range, with `keep_logits`, or where the mesh would split a pair.
    """
    speculate = check_speculate(speculate, num_tokens)
    shards = math.prod(size for axis, size in automatic_axes().items() if axis in RULES["batch"])
    if speculate == "auto":
        return 0 if keep_logits else _measured(num_tokens, images * pair)
    if speculate and keep_logits:
        raise ValueError("speculate does not go with keep_logits: a pass has no logits of guesses that fell; set False")
    if speculate and images % shards:
        raise ValueError(
            f"speculate needs a number of images that is a multiple of the mesh's {shards} shards, got {images}: the "
            "two rows of an image would lie on different devices; set speculate=False"
        )
    return int(speculate)


def shared_window(speculate: Speculate, num_tokens: int, rows: int) -> int:
    """The window of a server's images, whose steps all of its `rows` share; 1 is one code after the other.

    Raises: ValueError for a window that is out of range.
    """
    speculate = check_speculate(speculate, num_tokens)
    return max(1, _measured(num_tokens, rows) if speculate == "auto" else int(speculate))


def _measured(num_tokens: int, rows: int) -> int:
    """The window that "auto" takes for `rows` rows; 0 where none pays or was measured."""
    largest, tokens = _AUTO.get(jax.default_backend(), (0, 0))
    window = min(largest, tokens // rows)
    on_mesh = math.prod(automatic_axes().values()) > 1
    return 0 if on_mesh or num_tokens < _FEWEST_CODES or window < _SMALLEST_WINDOW else window


def slots_of(length: int, num_tokens: int, window: int) -> int:
    """Slots of a cache for prompts of `length` tokens: the last window may reach beyond the image."""
    return length + num_tokens + window - 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
    """The state of the loop: the cache as prefill left it but for keys and values, and the images' codes."""

    cache: KVCache
    images: Guesses


def behind_first(
    model: Janus,
    cache: KVCache,
    first: jax.Array,
    failed: jax.Array,
    num_tokens: int,
    window: int,
    coupling: Coupling = "same",
) -> Speculation:
    """The state behind the `first` code [B] of images, from what `images.start_image` has made."""
    codebook = model.config.gen_vision.codebook_size
    return Speculation(cache, Guesses.after_first(first, failed, num_tokens, window, coupling, codebook))


@functools.partial(jax.jit, static_argnames=("model", "window", "coupling", "fresh"), donate_argnames=("state",))
def continue_windows(
    model: Janus,
    params: Params,
    state: Speculation,
    keys: jax.Array,
    guidance: jax.Array,
    sampler: Sampler,
    stop: jax.Array,
    window: int,
    coupling: Coupling = "same",
    fresh: Fresh = "left",
) -> Speculation:
    """Draws until every image has at least `stop` codes, `window` positions a pass; keys as in `generate_codes`."""
    pair = state.cache.positions.shape[0] // len(state.images.codes)
    grid = model.config.gen_vision.grid

    def one_pass(state: Speculation) -> Speculation:
        images = state.images
        # Both rows of a pair get the same codes, and stay adjacent.
        x = jnp.repeat(run(model, params, "embed_codes", images.window(window)), pair, axis=0)
        lengths = jnp.repeat(state.cache.length + images.done - 1, pair)
        hidden, cache = run(model, params, "decode_window", x, state.cache, lengths)
        logits = run(model, params, "image_logits", hidden)
        logits = guide(logits.reshape(-1, pair, *logits.shape[1:]), guidance)
        settled = settled_windows(coupling, images, keys, logits, sampler)
        images = advanced(images, settled, keys, logits, sampler, fresh, grid)
        return Speculation(cache, dataclasses.replace(images, codes=constrain(images.codes, "batch", "length")))

    return jax.lax.while_loop(lambda state: (state.images.done < stop).any(), one_pass, state)


def draw_windows(
    model: Janus,
    params: Params,
    state: Speculation,
    keys: jax.Array,
    guidance: jax.Array,
    sampler: Sampler,
    window: int,
    *,
    coupling: Coupling = "same",
    fresh: Fresh = "left",
    piece: int | None = None,
    report: Callable[[Guesses, int], None] | None = None,
) -> Guesses:
    """Draws all codes behind the first, from a state that is given away; arguments as for `continue_windows`.

    Args:
      report: called with the images so far, and how many codes more all of them have, every `piece` codes.
    """
    done, num_tokens = 1, state.images.codes.shape[1] - window
    while done < num_tokens:
        stop = min(done + (piece or num_tokens), num_tokens)
        how = {"window": window, "coupling": coupling, "fresh": fresh}
        state = continue_windows(model, params, state, keys, guidance, sampler, jnp.int32(stop), **how)
        if report is not None:
            report(state.images, stop - done)
        done = stop
    return state.images
