"""Scores a folder of GenEval's pictures: `python -m evals.generation.score --pictures DIR`.

The folder is as GenEval's own scorer reads it. With transformers' models in the places of the original's, see
`evals.generation.detector`: figures are labelled, and must not be compared with the original's.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from evals.generation.detector import CLIP, DETECTOR, LABEL, ColorClassifier, Detector
from evals.generation.geneval import Detection, Result, Thresholds, check_prompt, kept, summarize, verdict
from evals.items import Number
from evals.progress import Progress
from janus_jax.io import commands
from janus_jax.io.files import read_json
from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file
from janus_jax.processing.image_files import open_image

Detect = Callable[[Image.Image], Mapping[str, Sequence[Detection]]]
ColorsIn = Callable[[Image.Image, str, Sequence[Detection]], Sequence[str]]


def pictures_of(root: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """The pictures below `root` and their prompts, in order: `00000/metadata.jsonl`, `00000/samples/0000.png`.

    Raises: ValueError or OSError in one line for a folder without pictures, or metadata that is no prompt.
    """
    if not root.is_dir():
        raise ValueError(f"{one_line(root)} is not a folder")
    found = []
    for folder in sorted(each for each in root.iterdir() if each.is_dir() and re.fullmatch(r"\d+", each.name)):
        place = folder / "metadata.jsonl"
        prompt = read_json(place)
        check_prompt(prompt, one_line(place))
        samples = folder / "samples"
        files = [each for each in samples.iterdir() if re.fullmatch(r"\d+\.png", each.name)] if samples.is_dir() else []
        if not files:
            raise ValueError(f"{one_line(samples)} has no pictures such as 00000.png")
        found += [(each, prompt) for each in sorted(files)]
    if not found:
        raise ValueError(f"{one_line(root)} has no folders such as 00000 with GenEval's pictures")
    return found


def score(
    pictures: Sequence[tuple[pathlib.Path, Mapping[str, Any]]],
    detect: Detect,
    colors_in: ColorsIn,
    thresholds: Thresholds | None = None,
    progress: bool | None = None,
) -> list[Result]:
    """A verdict on each picture. Raises as `open_image` for one that cannot be read: all of them count."""
    results = []
    with Progress("geneval", len(pictures), 0, progress) as shown:
        for path, prompt in pictures:
            image = open_image(path)
            objects = kept(detect(image), prompt["tag"], thresholds)

            def colors_of(name: str, chosen: Sequence[Detection], image: Image.Image = image) -> Sequence[str]:
                return colors_in(image, name, chosen)

            correct, reason = verdict(objects, prompt, colors_of, thresholds)
            results.append(Result(str(path), prompt, correct, reason, objects))
            shown.add(1)
    return results


def write(out: pathlib.Path, results: Sequence[Result], models: Mapping[str, str]) -> dict[str, Number]:
    """results.jsonl, as the original's summary_scores.py reads it, and scores.json; returns the figures."""
    numbers = summarize(results)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "results.jsonl", "".join(f"{each.line()}\n" for each in results).encode())
    content = {
        "scorer": LABEL,
        **models,
        "pictures": len(results),
        "numbers": {
            name: {"value": number.value, "count": number.count, "low": number.low, "high": number.high}
            for name, number in numbers.items()
        },
    }
    write_file(out / "scores.json", (json.dumps(content, indent=1) + "\n").encode())
    return numbers


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evals.generation.score", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=pathlib.Path, required=True, metavar="DIR", help="as GenEval draws them")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="where results go (default: beside them)")
    parser.add_argument("--detector", default=DETECTOR, help=f"folder or hub id of a Mask2Former (default {DETECTOR})")
    parser.add_argument("--clip", default=CLIP, help=f"folder or hub id of a CLIP (default {CLIP})")
    args = parser.parse_args(argv)
    return commands.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    pictures = pictures_of(args.pictures)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"scoring needs {error.name}; pip install torch transformers") from None
    results = score(pictures, Detector.load(args.detector), ColorClassifier.load(args.clip))
    out = args.out or args.pictures
    numbers = write(out, results, {"detector": args.detector, "clip": args.clip})
    print(f"scored by {LABEL}")
    for name, number in numbers.items():
        ends = "" if number.low is None else f" ({number.low:.1f} to {number.high:.1f})"
        print(f"{name}: {number.value:.1f}{ends} over {number.count:,}")
    print(f"written to {one_line(out)}: results.jsonl, scores.json")


if __name__ == "__main__":
    commands.leave(main())
