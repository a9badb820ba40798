"""Predicted seconds of an image on accelerators, from the bytes and FLOPs of a pass and published counts of passes.

Nothing here is measured. A pass takes the longer of two times: its bytes (all weights of decoder and image head once,
half an image's cache once) at the memory's rate, and its products at the peak rate; both are upper bounds of what
a device does. Passes an image are those that papers report for Janus-Pro-7B with top-k 1000: 318 with plain drafts and
154 with coupled ones, of 576 (arXiv 2510.24211, L = 32); they say nothing of other windows, and were not reproduced.
"""

from __future__ import annotations

import argparse
import functools

import jax.numpy as jnp

from benchmarks.sampling import step_bytes

_BANDWIDTH = {"v5e": 0.819e12, "v6e": 1.64e12}  # bytes/s of a TPU's memory (Google's pages on each)
_REPORTED = {"plain drafts": 318, "coupled drafts": 154}
_PROMPT, _WINDOW = 32, 32


@functools.cache
def _sizes(preset: str) -> tuple[float, float, float, float]:
    """Bytes of weights and of an image's cache, and FLOPs of a token in products and attention, half-way."""
    from janus_jax.config import get_preset
    from janus_jax.model.janus import Janus
    from janus_jax.weights.torch_weights import abstract_params
    from train.plan.flops import parameter_counts

    config = get_preset(preset)
    context, c = _PROMPT + config.gen_vision.num_tokens // 2, config.language
    counts, abstract = parameter_counts(config), abstract_params(config, dtype="bfloat16")
    products = counts["language_model"] - 2 * c.vocab_size * c.width + counts["gen_head"] + counts["gen_aligner"]
    model = Janus(config, dtype=jnp.bfloat16)
    weights, with_cache = (step_bytes(model, abstract, rows, context) for rows in (0, 2))
    return weights, with_cache - weights, 2.0 * products, 4.0 * c.layers * c.heads * c.head_dim * context


def pass_cost(preset: str, images: int, window: int) -> tuple[float, float]:
    """Bytes that a pass with guidance reads in bfloat16, and FLOPs of its products, half an image drawn."""
    weights, cache, products, attention = _sizes(preset)
    return weights + images * cache, 2 * images * window * (products + attention)


def predicted_table(args: argparse.Namespace) -> str:
    """A Markdown table for `args` of `benchmarks.speculation`: milliseconds a pass by window, and seconds an image."""
    from train.plan.flops import peak_flops
    from train.plan.topologies import GPUS, topology

    lines = [
        f"{args.preset}, bfloat16, **predicted**: ms a pass by window; seconds of {'/'.join(_REPORTED)} at "
        f"{_WINDOW} beside one code a pass",
        "",
        f"| device | images | GiB read | {' | '.join(map(str, args.windows))} | one by one | "
        + " | ".join(_REPORTED) + " |",
        "|---|" + "---|" * (len(args.windows) + 3 + len(_REPORTED)),
    ]  # fmt: skip
    for name in args.topology:
        place = topology(name)
        gpu = GPUS.get(place.generation)
        bandwidth = (gpu.bandwidth if gpu else _BANDWIDTH[place.generation]) * place.chips
        peak = (peak_flops(place.device_kind) or 0.0) * place.chips

        def seconds(images: int, window: int, bandwidth: float = bandwidth, peak: float = peak) -> float:
            read, flops = pass_cost(args.preset, images, window)
            return max(read / bandwidth, flops / peak)

        for images in args.images:
            costs = [f"{1000 * seconds(images, window):.2f}" for window in args.windows]
            plain = 576 * seconds(images, 1) / images
            ours = [passes * seconds(images, _WINDOW) / images for passes in _REPORTED.values()]
            read = pass_cost(args.preset, images, 1)[0] / 2**30
            cells = [name, images, f"{read:.1f}", *costs, f"{plain:.2f}", *(f"{own:.2f}" for own in ours)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        for how, passes in _REPORTED.items():
            pays = [n for n in range(1, 257) if passes * seconds(n, _WINDOW) < 576 * seconds(n, 1)]
            lines.append(f"| {name} | {how} pay up to {max(pays, default=0)} images |")
    return "\n".join(lines)
