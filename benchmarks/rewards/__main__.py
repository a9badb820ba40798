"""Measures how far judging pictures is hidden behind drawing the next ones: in a worker process and in a thread.

    python -m benchmarks.rewards [--preset janus_pro_1b] [--layers 1] [--pictures 4] [--parts 4] [--share 0.8]

Pictures are drawn in parts by a model of random weights with few layers. Each part is judged for `share` of the time
that drawing it takes, by a reward that waits (an endpoint, or a GPU beside) and by one that computes on a core. One
after the other, drawing and judging take their sum; where judging is hidden, drawing alone and the last part's judging.
`--steps 3` runs so many steps of GRPO instead, with a reward that waits, and tells where their time goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common
from benchmarks.scaling import shortened
from janus_jax.config import PRESETS
from janus_jax.io.messages import print_any_text
from train.rl.config import RewardConfig
from train.rl.rewards import Rewards

_PROMPT = 16  # tokens
_REWARDS = ("waits", "computes")
_IN_TURN = "one after the other"
_MODES = {_IN_TURN: 1, "in a worker process": 1, "in a thread": 0}


def drawer(args: argparse.Namespace) -> Callable[[int], np.ndarray]:
    """Draws a part of the pictures, uint8 [pictures, h, w, 3]; compiled."""
    import jax
    import jax.numpy as jnp

    from janus_jax.sampling.images import decode_images, generate_codes
    from janus_jax.sampling.sampler import make_sampler

    config = shortened(args.preset, args.layers)
    model, params = _device.random_model(config, _device.default_dtype())
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 200, (args.pictures, 2, _PROMPT)), jnp.int32)
    mask, sampler = jnp.ones(ids.shape, bool), make_sampler()

    def draw(part: int) -> np.ndarray:
        keys = jax.random.split(jax.random.key(part), args.pictures)
        codes, _ = generate_codes(model, params, ids, mask, keys, guidance=5, sampler=sampler)
        return np.asarray(decode_images(model, params, codes)[0])

    draw(0)
    return draw


def judged(draw: Callable[[int], np.ndarray], rewards: Rewards, parts: int, overlapped: bool) -> float:
    """Seconds until all parts are drawn and judged."""
    began, handles = time.monotonic(), []
    for part in range(parts):
        pictures = draw(part)
        handles.append(rewards.start(pictures, ["x"] * len(pictures), [{}] * len(pictures)))
        if not overlapped:
            rewards.result(handles[-1])
    scores = [rewards.result(handle) for handle in handles]
    if any(each.failed for each in scores):
        raise SystemExit("error: some pictures have no score, see above")
    return time.monotonic() - began


def measure(args: argparse.Namespace) -> common.Table:
    """A row for each reward and each way of calling it: medians over the rounds."""
    draw = drawer(args)

    def drawn() -> float:
        began = time.monotonic()
        for part in range(args.parts):
            draw(part)
        return time.monotonic() - began

    each = args.share * drawn() / args.parts / args.pictures
    alone: list[float] = []
    taken: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in _REWARDS for mode in _MODES}
    for number in range(args.rounds):
        alone.append(drawn())
        for (name, mode), seconds in taken.items():
            print(f"round {number + 1} of {args.rounds}: {name} {mode}", file=sys.stderr, flush=True)
            function, options = f"benchmarks.rewards.judges:{name}", (f"seconds={each}",)
            workers, size = _MODES[mode], args.pictures
            with Rewards([RewardConfig(function, options=options, workers=workers, batch_size=size)]) as rewards:
                seconds.append(judged(draw, rewards, args.parts, mode != _IN_TURN))
    drawing = statistics.median(alone)
    rows: common.Table = [("reward", "called", "drawing s", "judging s", "both s", "hidden of judging")]
    for (name, mode), seconds in taken.items():
        in_turn, both = (statistics.median(own) for own in (taken[name, _IN_TURN], seconds))
        judging = in_turn - drawing
        rows.append((name, mode, *map(common.cell, (drawing, judging, both)), f"{(in_turn - both) / judging:.0%}"))
    return rows


def main(argv: list[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewards", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="janus_pro_1b", choices=sorted(PRESETS), help="(default %(default)s)")
    parser.add_argument("--layers", type=common.count, default=1, help="of the decoder (default %(default)s)")
    parser.add_argument("--pictures", type=common.count, default=4, help="in a part (default %(default)s)")
    parser.add_argument("--parts", type=common.count, default=4, help="(default %(default)s)")
    parser.add_argument("--share", type=float, default=0.8, help="judging / drawing (default %(default)s)")
    parser.add_argument("--rounds", type=common.count, default=3, help="of all, by turns (default %(default)s)")
    parser.add_argument("--steps", type=common.count, help="of GRPO, instead of drawing and judging alone")
    args = parser.parse_args(argv)
    if args.steps:
        from benchmarks.rewards.steps import step_table

        draw = drawer(args)
        began = time.monotonic()
        draw(1)
        each = args.share * (time.monotonic() - began) / args.pictures
        del draw
        print(f"on {_device.device()}; {common.versions()}; judging takes {each:.3g} s a picture\n")
        print(common.markdown(step_table(args, each)))
        return 0
    rows = measure(args)
    most = (args.parts - 1) / args.parts
    print(f"on {_device.device()}; {common.versions()}; at most {most:.0%} of judging can be hidden\n")
    print(common.markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
