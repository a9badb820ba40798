"""Seconds to trace and compile the programs for drawing and answering, with and without a compilation cache.

`python -m benchmarks.compile --preset janus_pro_1b` lowers four programs from shapes alone (no weights are made):
SigLIP with its adapter (`embed_prompt`), the prefill of an image's prompt (`start_image`), the loop over its codes
(`continue_image`) and the VQ decoder (`decode_images`). Each process compiles them once: without a cache, with an empty
cache folder, and with the filled one.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import device as _device
from benchmarks.common import runs as common

PROGRAMS = ("SigLIP", "prefill", "loop", "VQ decode")
CACHES = ("no cache", "cache filled", "cache found")
_PROMPT, _QUESTION = 32, 62  # tokens of text


def cache_environment(folder: pathlib.Path, number: int, variant: str) -> dict[str, str]:
    """Where the process of a variant of CACHES has its compilation cache: a folder for each round."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": str(variant != "no cache").lower(),
        "JAX_COMPILATION_CACHE_DIR": str(folder / str(number)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def compile_programs(model: Any, params: Any, names: Sequence[str] = PROGRAMS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compiles the programs `names` for one image, two rows with guidance, in the dtype of `model`.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s.
    Returns: by name the compiled program and its arguments, `params` and those that an earlier program returns left
      out; and {name: {"trace": seconds, "compile": seconds}}.
    """
    import jax
    import jax.numpy as jnp

    from janus_jax.processing.chat import bucket
    from janus_jax.sampling.images import continue_image, decode_images, start_image
    from janus_jax.sampling.sampler import make_sampler
    from janus_jax.sampling.text import embed_prompt

    config = model.config
    patches, size, codes = config.vision.num_patches, config.vision.image_size, config.gen_vision.num_tokens
    ids = jax.random.randint(jax.random.key(1), (1, 2, _PROMPT), 0, config.language.vocab_size)
    mask, keys = jnp.ones(ids.shape, bool), jax.random.split(jax.random.key(0), 1)
    drawing = (keys, jnp.float32(5), make_sampler())
    question = jnp.zeros((1, bucket(patches + 2 + _QUESTION)), jnp.int32)
    arguments = {
        "SigLIP": (question, jnp.arange(question.shape[1])[None] < patches, jnp.ones((1, 1, size, size, 3))),
        "prefill": (ids, mask, *drawing),
        "loop": (*drawing, jnp.int32(1), jnp.int32(2)),
        "VQ decode": (jnp.zeros((1, codes), jnp.int32),),
    }

    def lower(name: str) -> Any:
        own = arguments[name]
        if name == "SigLIP":
            return embed_prompt.lower(model, params, *own)
        if name == "prefill":
            return start_image.lower(model, params, *own, codes)
        if name == "loop":
            return continue_image.lower(model, params, state, *own)
        return decode_images.lower(model, params, *own)

    programs, seconds = {}, {}
    for name in names:
        if name == "loop":
            state = jax.eval_shape(lambda p: start_image(model, p, *arguments["prefill"], num_tokens=codes), params)
        began = time.perf_counter()
        lowered = lower(name)
        traced = time.perf_counter()
        programs[name] = lowered.compile(), arguments[name]
        seconds[name] = {"trace": traced - began, "compile": time.perf_counter() - traced}
    return programs, seconds


def measure(preset: str) -> common.Run:
    """Compiles all programs of this device's default dtype and layout once, in this process."""
    import jax
    import jax.numpy as jnp

    from janus_jax.config import get_preset
    from janus_jax.loading import layout
    from janus_jax.model.janus import Janus
    from janus_jax.weights.fuse import fuse
    from janus_jax.weights.torch_weights import abstract_params

    config, dtype = get_preset(preset), _device.default_dtype()
    model = Janus(config, jnp.dtype(dtype), jnp.dtype(dtype), **layout(config, jax.default_backend()))
    params = abstract_params(config, model.scan_layers, dtype)
    _, seconds = compile_programs(model, jax.eval_shape(fuse, params) if model.fused else params)
    flat = {f"{name} {what}": value for name, own in seconds.items() for what, value in own.items()}
    return flat | {"dtype": dtype}


def table(runs: common.Runs) -> common.Table:
    """A row for each program: seconds to trace and lower it, to compile it, and how many times a cache helps."""
    good = common.done(runs)
    rows = [("program", "trace s", *(f"compile s, {variant}" for variant in good), "x, cache found")]
    for name in PROGRAMS:
        compiled = [common.median(own, f"{name} compile") for own in good.values()]
        traced = common.median([run for own in good.values() for run in own], f"{name} trace")
        pair = [good.get(variant, []) for variant in ("no cache", "cache found")]
        cells = [traced, *compiled, common.ratio(*pair, f"{name} compile")]
        rows.append((name, *(common.cell(value) for value in cells)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("compile", __doc__)
    args = parser.parse_args(arguments)
    if args.json:
        return _device.answer(measure(args.preset))
    variants = common.chosen(parser, args, CACHES)
    with tempfile.TemporaryDirectory(prefix="janus_compile_") as folder:
        environment = functools.partial(cache_environment, pathlib.Path(folder))
        runs = common.run_rounds("compile", arguments, variants, args.rounds, environment)
    about = f"{args.preset}, {common.dtype_of(runs)}, one image with guidance; median of {args.rounds} rounds."
    return common.publish("compile", "Compilation", about, table(runs), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
