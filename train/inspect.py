"""Prepared samples as the model sees them: `python -m train.inspect FOLDER [--n 5] [--json] [--html FILE]`.

The text has one mark for each image, `<image>`, and one for the codes of an image to be drawn, `<codes>`; a mark also
stands for the tokens around it (begin and end of image). Text that is trained on is marked.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from janus_jax.hub import resolve
from janus_jax.io.messages import one_line, print_any_text, print_error
from janus_jax.io.stores import as_path
from janus_jax.io.whole.files import write_file
from janus_jax.processing.images import open_image
from train.config import ENCODED
from train.data.prepared import Prepared, open_prepared
from train.data.views import View, Viewer, stored_codes
from train.fleet.encoder import vq_decoder
from train.inspect_page import Decode, page

_LINE = 2000  # characters of a line in the terminal


# ---------------------------------------------------------------- for a terminal


def describe(view: View) -> str:
    """The view as lines; text that is trained on is in [[ ]]."""
    sample = view.sample
    head = f"sample {view.index}: {sample.kind}, {sample.length:,} tokens, {view.trained_tokens:,} of them trained on"
    lines = [head, f"  place: {one_line(sample.place) or 'not kept'}"]
    lines += [f"  image {number}: {picture(image)}" for number, image in enumerate(sample.images, 1)]
    for name, codes in stored_codes(sample).items():
        lines.append(f"  {name}: {len(codes)}, {len(np.unique(codes))} of them distinct")
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
    parser.add_argument("--vq", metavar="DIR", help="checkpoint that shows codes as images on the page")
    args = parser.parse_args(argv)
    # Text may contain characters that the terminal or the output file cannot represent.
    sys.stdout.reconfigure(errors="backslashreplace")
    failed = False
    try:
        if args.n < 1:
            raise ValueError(f"--n must be at least 1, got {args.n}")
        if args.vq and not args.html:
            raise ValueError("--vq shows codes as images on a page; add --html FILE")
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
            decode = None if args.vq is None else _decoder(args.vq, folder)
            write_file(as_path(args.html), page(folder, views, decode).encode(errors="replace"))
            if not args.json:
                print(f"{one_line(args.html)}: {len(views)} of {len(folder):,} samples")
    except BrokenPipeError:
        sys.stderr.close()  # the reader has closed the pipe, and the interpreter would complain at exit
        return 0
    except (OSError, ValueError) as error:
        print_error(error)
        return 2
    return 2 if failed else 0


def _decoder(model: str, folder: Prepared) -> Decode:
    decode, ours = vq_decoder(resolve(model))
    theirs = folder.meta["settings"].get("vq")
    if folder.kind not in ENCODED:
        raise ValueError(f"{one_line(folder.folder)} has {folder.kind} samples, which are no codes; leave out --vq")
    if theirs and theirs != ours:
        raise ValueError(f"{one_line(folder.folder)} was encoded by another VQ model than that of {one_line(model)}")
    return decode


def _chosen(count: int, n: int, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(min(n, count)))
    return sorted(np.random.default_rng(seed).choice(count, min(n, count), replace=False).tolist())


if __name__ == "__main__":
    sys.exit(main())
