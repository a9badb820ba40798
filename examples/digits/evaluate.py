"""What a trained Janus of handwritten digits can do: questions answered, digits drawn, and pictures of both.

    python -m examples.digits.evaluate --model runs/digits/stage3/export/850 --weights int8 int4

compares the model with itself in other forms of weights.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import janus_jax
from examples.digits.config import DigitsConfig
from examples.digits.data import captions, load_split, questions, to_rgb
from examples.digits.judge import Judge
from janus_jax.io.messages import print_any_text, print_error
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.images import contact_sheet
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.weights.checkpoint import write_json
from janus_jax.weights.quantize import FORMS
from train.overrides import load_config

_ASKED_AT_ONCE = 120
_SHOWN = 8  # images a row of the pictures
_ZOOM = 4


def evaluate(janus: JanusPipeline, config: DigitsConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Judges a trained model on `config.split` and writes the pictures into `folder`."""
    judge = Judge(config.training_splits, config.image_size)
    images, labels = load_split(config.split)
    shown = to_rgb(images, config.image_size)
    figures: dict[str, Any] = {"split": config.split, "judge": judge.accuracy(config.split)}

    codes = janus.encode_images([Image.fromarray(image) for image in shown])
    again = janus.decode_codes(codes)
    figures["reconstruction"] = float(np.mean(judge.predict(again) == labels))
    first = [int(np.flatnonzero(labels == label)[i]) for i in range(_SHOWN // 2) for label in range(10)]
    _picture([x for i in first for x in (shown[i], again[i])], 20, folder / "reconstructions.png")

    figures |= _understanding(janus, shown, labels, folder / "answers.png")
    figures |= _generation(janus, config, judge, folder / "generated.png")
    return figures


def _understanding(
    janus: JanusPipeline, images: np.ndarray, labels: np.ndarray, path: pathlib.Path
) -> dict[str, float]:
    """Every question about every image; an answer is right when it is the expected one, letter by letter."""
    asked = [(i, question, answer) for i, label in enumerate(labels) for question, answer in questions(int(label))]
    answers: list[str] = []
    for begin in range(0, len(asked), _ASKED_AT_ONCE):
        part = asked[begin : begin + _ASKED_AT_ONCE]
        pictures = [[Image.fromarray(images[i])] for i, _, _ in part]
        answers += janus.chat_batch([question for _, question, _ in part], pictures, max_new_tokens=16)
    right = np.array([given == wanted for given, (_, _, wanted) in zip(answers, asked, strict=True)])
    rng = np.random.default_rng(0)
    chosen = [*rng.choice(len(asked), 12, replace=False), *np.flatnonzero(~right)[:4]]
    _answers_picture([(images[asked[i][0]], asked[i][1], answers[i], bool(right[i])) for i in chosen], path)
    return {"understanding": float(right.mean()), "questions": len(asked)}


def _generation(janus: JanusPipeline, config: DigitsConfig, judge: Judge, path: pathlib.Path) -> dict[str, Any]:
    count = config.images_per_class
    # The phrasings by turns: as many of each as there are images of a class, or nearly so.
    prompts = [captions(label)[i % len(captions(label))] for label in range(10) for i in range(count)]
    seeds = [config.seed * 1_000_000 + i for i in range(len(prompts))]
    drawn = janus.generate_images(
        prompts, cfg_weight=config.guidance, temperature=config.temperature, seed=seeds, progress=False
    )
    images, wanted = np.stack([np.asarray(image) for image in drawn]), np.repeat(np.arange(10), count)
    right = judge.predict(images) == wanted
    by_class = right.reshape(10, count).mean(1)
    _picture(
        [images[label * count + i] for label in range(10) for i in range(min(count, _SHOWN))], min(count, _SHOWN), path
    )
    return {
        "generation": float(right.mean()),
        "generation_by_class": by_class.tolist(),
        "lowest_class": float(by_class.min()),
        "images_per_class": count,
        "guidance": config.guidance,
        "temperature": config.temperature,
        "distinct": len({image.tobytes() for image in images}),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of `evaluate` for a reader."""
    count = 10 * figures["images_per_class"]
    by_class = "  ".join(f"{label}: {share:.1%}" for label, share in enumerate(figures["generation_by_class"]))
    rows = [
        (f"split {figures['split']}, seed {figures['seed']}", ""),
        ("the judge on real images", f"{figures['judge']:.1%}"),
        ("reconstructions recognized", f"{figures['reconstruction']:.1%}"),
        (f"understanding, {figures['questions']} questions", f"{figures['understanding']:.1%}"),
        (f"generation, {count} images, guidance {figures['guidance']:g}", f"{figures['generation']:.1%}"),
        ("  lowest class", f"{figures['lowest_class']:.1%}"),
        ("  distinct images", f"{figures['distinct']} of {count}"),
        ("seconds", f"{sum(figures['seconds'].values()):.0f}"),
    ]
    lines = [f"{name:44} {value:>12}".rstrip() for name, value in rows]
    return "\n".join([*lines, by_class, json.dumps(figures["seconds"])])


def _picture(images: Sequence[np.ndarray], columns: int, path: pathlib.Path):
    large = [Image.fromarray(image.repeat(_ZOOM, 0).repeat(_ZOOM, 1)) for image in images]
    contact_sheet(large, columns=columns, gap=2).save(path)


def _answers_picture(asked: Sequence[tuple[np.ndarray, str, str, bool]], path: pathlib.Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(asked) // 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(10, 2.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, question, answer, right) in zip(axes.flat, asked, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"{question}\n{answer}", fontsize=9, color="black" if right else "firebrick")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


# ---------------------------------------------------------------- forms of weights, side by side


def compare(
    model: str, config: DigitsConfig, forms: Sequence[str] = (), dtype: str = "float32", out: pathlib.Path | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of `evaluate` for `model` with weights in `dtype` and in each of `forms`, by form.

    Args:
      out: folder for the pictures, a folder for each form, and results.json; default `config.workdir`.
    """
    out = pathlib.Path(config.workdir) if out is None else out
    figures = {}
    for form in (dtype, *forms):
        janus = janus_jax.load(model, dtype=dtype, weights=form if form in FORMS else None, progress=False)
        (out / form).mkdir(parents=True, exist_ok=True)
        figures[form] = evaluate(janus, config, out / form)
    write_json(out / "results.json", figures)
    return figures


def comparison(figures: dict[str, dict[str, Any]]) -> str:
    """The figures of `compare` in Markdown; in brackets, how many points fewer than the first's."""
    first = next(iter(figures.values()))
    drawn = 10 * first["images_per_class"]
    names = {
        "reconstruction": "reconstructions recognized",
        "understanding": f"understanding, {first['questions']} questions",
        "generation": f"generation, {drawn} images, guidance {first['guidance']:g}, "
        f"temperature {first['temperature']:g}",
        "lowest_class": "lowest class",
    }
    lines = [f"| split {first['split']} | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for name, what in names.items():
        shares = [100 * one[name] for one in figures.values()]
        others = [f"{share:.1f}% ({shares[0] - share:+.1f})" for share in shares[1:]]
        lines.append(f"| {what} | {' | '.join([f'{shares[0]:.1f}%', *others])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m examples.digits.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the export of `python -m train.main --config digits`")
    parser.add_argument("--weights", nargs="+", default=[], choices=FORMS, help="forms to compare with --dtype")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of computation")
    parser.add_argument("--split", default="held_out", choices=("held_out", "validation"), help="images asked about")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn images")
    parser.add_argument("--images", type=int, default=100, help="drawn of each digit")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/digits_evaluated"), help="folder")
    args = parser.parse_args(argv)
    try:
        if args.images < 1:
            raise ValueError(f"--images must be at least 1, got {args.images}")
        given = {"split": args.split, "seed": args.seed, "images_per_class": args.images}
        config = load_config("digits", [f"{name}={value}" for name, value in given.items()])
        figures = compare(args.model, config, args.weights, args.dtype, args.out)
    except (OSError, ValueError, OutOfMemory) as error:
        print_error(error)
        return 2
    print(comparison(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
