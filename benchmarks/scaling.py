"""Seconds and memory of a decoding step by batch size and by context, compared with a model of both.

`python -m benchmarks.scaling --preset janus_pro_1b --layers 4` times the text loop (`text.continue_text`) over a
cache that is as long as the context and full except for the steps taken: with 1 to 32 rows of one context, and with one
row of 64 to 4096 tokens. In the model, a step reads every weight of the decoder once and the whole cache once, and then
computes, at the rates of a 1 GiB matrix times a vector, and of square matrices, on the same device. Memory is XLA's
analysis of the program. Weights are random; all points are measured in turn in one process, and again in the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from typing import Any

from benchmarks.common import device as _device
from benchmarks.common import runs as common
from janus_jax.config import PRESETS, JanusConfig
from janus_jax.io.messages import print_any_text

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
PLOT = pathlib.Path(__file__).with_name("scaling.png")
VARIANTS = ("text loop",)
_MEASURED = ("step", "memory", "temporaries")
_SPARE = 0.9  # of the free memory, that a point may take

Figures = dict[tuple[int, int], dict[str, float]]  # of each (rows, context)


def points(context: int) -> list[tuple[int, int]]:
    """(rows, tokens of the cache) of all points: first all batches, then all contexts."""
    return list(dict.fromkeys([*((batch, context) for batch in BATCHES), *((1, length) for length in CONTEXTS)]))


def shortened(preset: str, layers: int | None) -> JanusConfig:
    """The preset with at most so many decoder layers."""
    config = PRESETS[preset]
    fewer = min(layers or config.language.layers, config.language.layers)
    return dataclasses.replace(config, language=dataclasses.replace(config.language, layers=fewer))


def step_bytes(config: JanusConfig, batch: int, context: int, dtype: Any) -> int:
    """Bytes that a step has to read: the layers, the final norm and the head once, and the cache once."""
    import jax.numpy as jnp

    from janus_jax.model.kv_cache import cache_bytes
    from janus_jax.sharding import flatten
    from janus_jax.weights.torch_weights import abstract_params

    leaves = flatten(abstract_params(config)["language_model"])
    read = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if not path.startswith("embed_tokens"))
    return read * jnp.dtype(dtype).itemsize + cache_bytes(config.language, batch, context, dtype)


def step_flops(config: JanusConfig, batch: int, context: int) -> int:
    """FLOPs of a step: the products of `step_bytes`' weights, and the scores and values of attention."""
    c = config.language
    attention = 4 * c.layers * c.heads * c.head_dim * context
    return batch * (2 * step_bytes(config, 0, 0, "int8") + attention)


def measure(args: argparse.Namespace) -> common.Run:
    """Seconds a step, bytes of memory and of temporaries of every point, in this process."""
    import jax
    import jax.numpy as jnp

    from janus_jax.model.kv_cache import cache_bytes
    from janus_jax.sampling.memory import available_bytes
    from janus_jax.sampling.sampler import make_sampler
    from janus_jax.sampling.text import TextState, continue_text

    config, dtype = shortened(args.preset, args.layers), _device.default_dtype()
    run: common.Run = dict(zip(("bandwidth", "rate"), _device.product_rates(dtype), strict=True)) | {"dtype": dtype}
    model, params = _device.random_model(config, dtype, parts=["language_model"])
    sampler, first, never = make_sampler(0), jnp.int32(1), jnp.int32(-1)

    def state(batch: int, context: int) -> TextState:
        cache = _device.filled_cache(model, batch, context, context - 2 * args.steps)
        tokens = jax.random.randint(jax.random.key(0), (batch, 2 * args.steps + 1), 0, config.language.vocab_size)
        return TextState(cache, tokens, jnp.zeros(batch, bool), jnp.full((batch,), -1, jnp.int32))

    for batch, context in points(args.context):
        # The compiler may keep a second cache.
        free = available_bytes(jax.devices()[0])
        if free is not None and 2 * cache_bytes(config.language, batch, context, dtype) > _SPARE * free:
            continue
        now = state(batch, context)
        rest = (jax.random.split(jax.random.key(0), batch), never, sampler)
        half, end = jnp.int32(1 + args.steps), jnp.int32(1 + 2 * args.steps)
        step = continue_text.lower(model, params, now, *rest, first, half).compile()
        now = jax.block_until_ready(step(params, now, *rest, first, half))
        seconds, now = _device.timed(step, params, now, *rest, half, end)
        memory, name = step.memory_analysis(), f"{batch} {context}"
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        run[f"{name} step"] = seconds / args.steps
        run[f"{name} memory"] = used + memory.temp_size_in_bytes
        run[f"{name} temporaries"] = memory.temp_size_in_bytes
        del now
    return run


def figures(own: list[common.Run], config: JanusConfig, context: int) -> Figures:
    """Medians of each point in seconds and bytes, with the model's seconds; NaN where a point did not fit."""
    bandwidth, rate = (common.median(own, key) for key in ("bandwidth", "rate"))
    result: Figures = {}
    for point in points(context):
        values = {key: common.median(own, f"{point[0]} {point[1]} {key}") for key in _MEASURED}
        read = step_bytes(config, *point, own[0]["dtype"])
        flops = step_flops(config, *point)
        result[point] = values | {"read": read, "flops": flops, "model": read / bandwidth + flops / rate}
    return result


def table(found: Figures) -> common.Table:
    """A row for each point."""
    model = ("GB to read", "GFLOP", "model ms", "step x that")
    rows = [("rows", "context", "step ms", "tokens/s", *model, "memory GiB", "temporaries GiB")]
    for (batch, context), f in found.items():
        cells = [
            1e3 * f["step"],
            batch / f["step"],
            f["read"] / 1e9,
            f["flops"] / 1e9,
            1e3 * f["model"],
            f["step"] / f["model"],
        ]
        cells += [f[key] / 2**30 for key in ("memory", "temporaries")]
        step, *others = map(common.cell, cells)
        rows.append((str(batch), str(context), step or "does not fit", *others))
    return rows


def plot(found: Figures, title: str, path: pathlib.Path, context: int):
    """Writes a PNG: seconds and memory against rows and against context, each beside the model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", layout="constrained")
    figure.suptitle(title, fontsize="medium")
    batches = [point for point in found if point[1] == context]
    contexts = sorted(point for point in found if point[0] == 1)
    shown = {"ms a step": ("step", "model", 1e3), "GiB": ("memory", "read", 2**-30)}
    labels = {"step": ("measured", "model: reading, then computing")}
    labels["memory"] = ("the compiled program", "weights and cache")
    for column, (chosen, name) in enumerate(((batches, f"rows, context {context}"), (contexts, "context, one row"))):
        for axis, (label, (measured, model, scale)) in zip(axes[:, column], shown.items(), strict=True):
            about = labels[measured]
            x = [point[column] for point in chosen]
            axis.plot(x, [scale * found[point][measured] for point in chosen], "o-", label=about[0])
            axis.plot(x, [scale * found[point][model] for point in chosen], "--", color="gray", label=about[1])
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(value) for value in x])
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
            axis.legend()
        axes[-1, column].set_xlabel(name)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table and writes the plot; 1 where the measurement failed."""
    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("scaling", __doc__)
    parser.add_argument("--layers", type=common.count, help="of the decoder (default: all)")
    parser.add_argument("--context", type=common.count, default=512, help="of the rows of a batch (default 512)")
    parser.add_argument("--steps", type=common.count, default=8, help="timed of each point (default 8)")
    parser.add_argument("--plot", type=pathlib.Path, default=PLOT, help="PNG to write (default benchmarks/scaling.png)")
    args = parser.parse_args(arguments)
    if 2 * args.steps >= min(args.context, *CONTEXTS):
        parser.error(f"--steps {args.steps} is too many for a cache of {min(args.context, *CONTEXTS)} tokens")
    if args.json:
        return _device.answer(measure(args))
    runs = common.run_rounds("scaling", arguments, common.chosen(parser, args, VARIANTS), args.rounds)
    own = common.done(runs).get(VARIANTS[0])
    if not own:
        return 1  # the process has said why
    config = shortened(args.preset, args.layers)
    found = figures(own, config, args.context)
    bandwidth = f"{common.median(own, 'bandwidth') / 1e9:.1f} GB/s, {common.median(own, 'rate') / 1e9:.0f} GFLOP/s"
    what = f"{args.preset}, {config.language.layers} decoder layers, {own[0]['dtype']}"
    plot(found, f"{what}, {own[0]['device']}, {bandwidth}", args.plot, args.context)
    about = (
        f"{what}; a step is the mean of {args.steps}, the median "
        f"of {args.rounds} rounds. The model takes {bandwidth}: what a matrix of 1 GiB by a vector reads, and what "
        f"square matrices compute.\n\n![Scaling]({args.plot.name})"
    )
    return common.publish("scaling", "Scaling of a decoding step", about, table(found), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
