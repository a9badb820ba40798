"""Steps and seconds of a server's engine for the same images, with and without guessed codes."""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np

from benchmarks.common import device as _device


def served_table(args: argparse.Namespace) -> str:
    """The table for `args` of `benchmarks.speculation`: images asked for at once, more than there are rows."""
    import janus_jax
    from examples.digits.data import captions
    from janus_jax.sampling.sampler import Options
    from janus_jax.serving.engine import Engine
    from janus_jax.serving.jobs import drawings

    janus = janus_jax.load(args.model, dtype="float32", progress=False)
    options = {"temperature": args.temperature, "cfg_weight": args.guidance}
    prompts = [captions(label)[0] for label in range(10)]
    asked = list(itertools.islice(itertools.cycle(prompts), args.images[0]))
    plain = janus.generate_codes(asked, seed=list(range(len(asked))), speculate=False, **options)
    lines = ["| window | steps | s | ms a step | same images |", "|---|---|---|---|---|"]
    for window in (1, *args.windows):
        with Engine(janus, args.slots, speculate=window > 1 and window) as engine:
            engine.warm_up()
            own = [Options(seed=[seed], **options) for seed in range(len(asked))]
            jobs = [job for prompt, how in zip(asked, own, strict=True) for job in drawings(janus, prompt, 1, how)]
            began = time.perf_counter()
            engine.submit(*jobs)
            while not engine.idle:
                time.sleep(0.005)
            seconds, steps = time.perf_counter() - began, engine.counts.steps
        same = np.mean([job.tokens == codes.tolist() for job, codes in zip(jobs, plain, strict=True)])
        lines.append(f"| {window} | {steps} | {seconds:.2f} | {1000 * seconds / steps:.2f} | {same:.0%} |")
    about = f"{args.model}: {len(asked)} images, guidance {args.guidance:g}, {args.slots} slots, {_device.device()}"
    return about + "\n\n" + "\n".join(lines)
