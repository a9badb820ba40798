"""Milliseconds of a pass against its window and the number of images, with random weights.

Random weights draw codes that nobody could guess, so nearly every pass yields one code: a pass is timed as it is, and
whole images show what speculation costs at its worst. Programs are compiled side by side before anything is timed, and
once the time is up the table has what was measured by then.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.common import device as _device

_PROMPT = 32  # tokens
_HEADER = "| images | plain step | {} |\n|{}"


def cost_table(args: argparse.Namespace) -> str:
    """A Markdown table of milliseconds, a row for each number of images, for `args` of `benchmarks.speculation`."""
    import jax

    from janus_jax.config import get_preset

    began = time.monotonic()
    config = get_preset(args.preset)
    layers = args.layers or config.language.layers
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, layers=layers))
    dtype = args.dtype or _device.default_dtype()
    model, params = _device.random_model(
        config, dtype, parts=("language_model", "gen_head", "gen_embed", "gen_aligner")
    )
    cells: dict[tuple[int, int], float] = {}
    jobs = [(images, window) for images in args.images for window in (0, *args.windows)]
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        made = {job: pool.submit(_program, model, params, *job) for job in jobs}
        if jax.default_backend() == "cpu":  # on which compiling would take what is being timed
            concurrent.futures.wait(made.values(), timeout=args.seconds if math.isfinite(args.seconds) else None)
        for job, program in made.items():
            if time.monotonic() - began > args.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            cells[job] = 1000 * _seconds_a_pass(program.result(), model, *job, args.passes)
    about = f"{args.preset}, {layers} layers, {dtype}, {_device.device()}: milliseconds a pass, by window"
    lines = [about, "", _HEADER.format(" | ".join(map(str, args.windows)), "---|" * (len(args.windows) + 2))]
    for images in args.images:
        row = [cells.get((images, window)) for window in (0, *args.windows)]
        lines.append(f"| {images} | " + " | ".join("" if ms is None else f"{ms:.2f}" for ms in row) + " |")
    if len(cells) < len(jobs):
        lines.append(f"\n{len(jobs) - len(cells)} of {len(jobs)} were not measured in {args.seconds:g} s.")
    if args.whole and time.monotonic() - began < args.seconds:
        lines += ["", *_whole_images(model, params, args)]
    return "\n".join(lines)


def _given(model: Any, images: int) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    from janus_jax.sampling.sampler import make_sampler

    return jax.random.split(jax.random.key(0), images), jnp.float32(5), make_sampler()


def _state(model: Any, images: int, window: int) -> Any:
    """In the middle of the images."""
    import jax.numpy as jnp

    from janus_jax.sampling.images import ImageState
    from janus_jax.sampling.speculative import behind_first, slots_of

    tokens = model.config.gen_vision.num_tokens
    slots = slots_of(_PROMPT, tokens, max(window, 1))
    filled = _PROMPT + (0 if window else tokens // 2)
    cache = _device.filled_cache(model, 2 * images, slots, filled)
    failed = jnp.full((images,), -1, jnp.int32)
    if not window:
        return ImageState(cache, jnp.zeros((images, tokens), jnp.int32), failed, None)
    state = behind_first(model, cache, jnp.zeros((images,), jnp.int32), failed, tokens, window)
    return dataclasses.replace(
        state, images=dataclasses.replace(state.images, done=jnp.full((images,), tokens // 2, jnp.int32))
    )


def _program(model: Any, params: Any, images: int, window: int) -> Any:
    """The compiled loop, as a function of a state and of how many codes to draw."""
    import jax
    import jax.numpy as jnp

    from janus_jax.sampling.images import continue_image
    from janus_jax.sampling.speculative import continue_windows

    state = jax.eval_shape(lambda: _state(model, images, window))
    given, half = _given(model, images), jnp.int32(model.config.gen_vision.num_tokens // 2)
    if not window:
        plain = continue_image.lower(model, params, state, *given, half, half).compile()
        return lambda state, count: plain(params, state, *given, half, half + count)
    windows = continue_windows.lower(model, params, state, *given, half, window=window).compile()
    return lambda state, count: windows(params, state, *given, half + count)


def _seconds_a_pass(program: Any, model: Any, images: int, window: int, passes: int) -> float:
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(program(_state(model, images, window), jnp.int32(1)))
    seconds, after = _device.timed(program, _state(model, images, window), jnp.int32(passes))
    return seconds / (int(after.images.passes.max()) - 1 if window else passes)


def _whole_images(model: Any, params: Any, args: argparse.Namespace) -> Iterator[str]:
    import jax
    import numpy as np

    from janus_jax.sampling.images import generate_codes

    ids = np.random.default_rng(0).integers(10, 90, (1, 2, _PROMPT)).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 1)
    yield "| whole images, one at a time | seconds |\n|---|---|"
    for speculate in (False, *(window for window in args.windows if window > 1)):
        if speculate not in (False, 16):
            continue

        def draw(speculate: Any = speculate) -> Any:
            return generate_codes(model, params, ids, ids > 0, keys, speculate=speculate)[0]

        jax.block_until_ready(draw())
        yield f"| {'plain' if speculate is False else f'window {speculate}'} | {_device.timed(draw)[0]:.2f} |"
