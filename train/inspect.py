"""Prepared samples as the model sees them: `python -m train.inspect FOLDER [--n 5] [--json] [--html FILE]`.

The text has one mark for each image, `<image>`, and one for the codes of an image to be drawn, `<codes>`; a mark also
stands for the tokens around it (begin and end of image). Text that is trained on is marked.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from janus_jax.io.messages import one_line, print_any_text, print_error
from janus_jax.io.stores import as_path
from janus_jax.io.whole.files import write_file
from janus_jax.processing.images import open_image
from train.data.prepared import open_prepared
from train.data.views import View, Viewer
from train.inspect_page import page

_LINE = 2000  # characters of a line in the terminal


# ---------------------------------------------------------------- for a terminal


def describe(view: View) -> str:
    """The view as lines; text that is trained on is in [[ ]]."""
    sample = view.sample
    head = f"sample {view.index}: {sample.kind}, {sample.length:,} tokens, {view.trained_tokens:,} of them trained on"
    lines = [head, f"  place: {one_line(sample.place) or 'not kept'}"]
    lines += [f"  image {number}: {picture(image)}" for number, image in enumerate(sample.images, 1)]
    if len(sample.codes):
        lines.append(f"  codes: {len(sample.codes)}, {len(np.unique(sample.codes))} of them distinct")
    shown = "".join(f"[[{piece.text}]]" if piece.trained else piece.text for piece in view.pieces)
    lines += [f"  | {one_line(line, _LINE)}" for line in shown.splitlines()]
    if view.short:
        lines += [f"  cut to its first sentence: {one_line(view.short, _LINE)}"]
    return "\n".join(lines)


def picture(image: bytes) -> str:
    """Dimensions and bytes of an image file, or what is wrong with it."""
    try:
        opened = open_image(image)
        return f"{opened.width} x {opened.height}, {len(image):,} bytes"
    except (ValueError, OSError) as error:
        return f"damaged ({one_line(error)}), {len(image):,} bytes"


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all samples were shown, 2 for bad input or damaged samples, with a line on standard error each."""
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m train.inspect", description="Shows samples of prepared data.")
    parser.add_argument("folder", help="a folder written by train.prepare")
    parser.add_argument("--n", type=int, default=5, help="number of samples (default 5)")
    parser.add_argument("--random", type=int, metavar="SEED", help="random samples instead of the first ones")
    parser.add_argument("--json", action="store_true", help="print a JSON object on each line")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page")
    parser.add_argument("--model", help="checkpoint with the tokenizer (default: the stored one)")
    args = parser.parse_args(argv)
    # Text may contain characters that the terminal or the output file cannot represent.
    sys.stdout.reconfigure(errors="backslashreplace")
    failed = False
    try:
        if args.n < 1:
            raise ValueError(f"--n must be at least 1, got {args.n}")
        folder = open_prepared(args.folder)
        viewer, views = Viewer(folder, args.model), []
        for index in _chosen(len(folder), args.n, args.random):
            try:
                view = viewer[index]
            except ValueError as error:
                print_error(error)
                failed = True
                continue
            if args.html:
                views.append(view)
            if args.json:
                print(json.dumps(view.to_json(), ensure_ascii=False))
            elif not args.html:
                print(describe(view), end="\n\n")
        if args.html:
            write_file(as_path(args.html), page(folder, views).encode(errors="replace"))
            if not args.json:
                print(f"{one_line(args.html)}: {len(views)} of {len(folder):,} samples")
    except BrokenPipeError:
        sys.stderr.close()  # the reader has closed the pipe, and the interpreter would complain at exit
        return 0
    except (OSError, ValueError) as error:
        print_error(error)
        return 2
    return 2 if failed else 0


def _chosen(count: int, n: int, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(min(n, count)))
    return sorted(np.random.default_rng(seed).choice(count, min(n, count), replace=False).tolist())


if __name__ == "__main__":
    sys.exit(main())
