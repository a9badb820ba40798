"""What speculative drawing brings, and what its passes cost.

    python -m benchmarks.speculation drawing --model runs/digits_large/stage3/export/2000 --plot passes.png
    python -m benchmarks.speculation served --model runs/digits_large/stage3/export/2000
    python -m benchmarks.speculation agreement --model runs/digits/stage3/export/850
    python -m benchmarks.speculation passes --preset janus_pro_1b --layers 4 --images 1 4 16
    python -m benchmarks.speculation predicted --topology h100-1 v5e-8 v6e-1

The first three draw the images of a trained model of digits with and without guessed codes: how fast, alone and in a
server's engine, and whether they have one distribution. `passes` times passes with random weights, and `predicted`
predicts seconds from bytes and FLOPs.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from benchmarks.common.runs import count
from janus_jax.config import PRESETS
from janus_jax.io.messages import print_any_text, print_error


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def add(name: str, windows: Sequence[int], images: Sequence[int], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about)
        command.add_argument("--windows", type=count, nargs="+", default=windows, help="codes a pass is given")
        command.add_argument("--images", type=count, nargs="+", default=images, help="images at a time")
        command.set_defaults(what=name)
        return command

    drawing = add("drawing", (2, 4, 8, 16, 32), (4,), "passes and seconds of a trained model's images")
    drawing.add_argument("--model", required=True, help="the export of a run of digits_large")
    drawing.add_argument("--repeats", type=count, default=3)
    drawing.add_argument("--short", action="store_true", help="windows and temperatures alone")
    drawing.add_argument("--plot", type=pathlib.Path, metavar="FILE")
    served = add("served", (4, 8, 16), (16,), "steps and seconds of a trained model's images in a server's engine")
    served.add_argument("--model", required=True, help="the export of a run of digits_large")
    served.add_argument("--slots", type=count, default=16)
    served.add_argument("--temperature", type=float, default=1.0)
    served.add_argument("--guidance", type=float, default=3.0)
    agreement = add("agreement", (8,), (20_000,), "whether a trained model's images have the plain loop's distribution")
    agreement.add_argument("--model", required=True, help="the export of a run of digits or digits_large")
    agreement.add_argument("--batch-size", type=count, default=500)
    agreement.add_argument("--temperature", type=float, default=1.0)
    agreement.add_argument("--guidance", type=float, default=2.25)
    passes = add("passes", (1, 2, 4, 8, 16, 32, 64), (1, 4, 16), "milliseconds a pass, with random weights")
    passes.add_argument("--preset", default="janus_pro_1b", choices=sorted(PRESETS))
    passes.add_argument("--layers", type=count, help="of the decoder (default: the preset's)")
    passes.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as janus_jax.load")
    passes.add_argument("--passes", type=count, default=8, help="timed together (default %(default)s)")
    passes.add_argument("--threads", type=count, default=1, help="programs compiled side by side")
    passes.add_argument("--seconds", type=float, default=float("inf"), help="print what was measured by then")
    passes.add_argument("--whole", action="store_true", help="also whole images, plain and with windows of 16")
    ahead = add("predicted", (1, 2, 4, 8, 16, 32, 64), (1, 4, 16), "seconds on accelerators, from bytes and FLOPs")
    ahead.add_argument("--preset", default="janus_pro_7b", choices=sorted(PRESETS))
    ahead.add_argument("--topology", nargs="+", default=("h100-1", "v5e-8", "v6e-1"))
    args = parser.parse_args(argv)
    try:
        print(_measured(args))
    except (OSError, ValueError) as error:
        print_error(error)
        return 2
    return 0


def _measured(args: argparse.Namespace) -> str:
    if args.what == "drawing":
        from benchmarks.speculation.drawing import drawing_table

        return drawing_table(args)
    if args.what == "served":
        from benchmarks.speculation.served import served_table

        return served_table(args)
    if args.what == "agreement":
        from benchmarks.speculation.agreement import agreement_table

        return agreement_table(args)
    if args.what == "passes":
        from benchmarks.speculation.passes import cost_table

        return cost_table(args)
    from benchmarks.speculation.predicted import predicted_table

    return predicted_table(args)


if __name__ == "__main__":
    sys.exit(main())
