"""Two adapters for the trained digits: `python -m examples.digits.tune --model runs/digits/stage3/export/850`.

One teaches a look that the model never draws, mirrored digits, where the prompt says so; the other a question that it
was never asked, whether a digit is even. Both learn from files as a user has them, by `train.finetune`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

import janus_jax
from examples.digits.data import SHIFTS, captions, load_split, questions, shifted, to_rgb
from examples.digits.judge import Judge
from janus_jax.hub import resolve
from janus_jax.io.messages import print_any_text, print_error
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.images import contact_sheet
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.weights.adapters.peft_files import read_adapter
from janus_jax.weights.checkpoint import open_checkpoint, write_json
from train.finetune import finetune

MIRRORED = "{caption}, mirrored"
EVEN = "Is this digit even or odd?"
_MIRRORED = 3  # mirrored pictures of each digit, for each that is not
_SETTINGS: dict[str, Any] = {
    "rank": 8, "alpha": 16.0, "batch_size": 40, "learning_rate": 4e-3, "dtype": "float32",
    # Mirrored strokes are codes that the model has hardly drawn: its image head and embedding change too.
    "targets": ("decoder", "heads", "aligners"), "save": ("gen_embed",),
}  # fmt: skip
STEPS = {"mirrored": 550, "even": 120}
_GUIDANCE, _TEMPERATURE = 2.25, 0.8  # of `configs/digits.py`


def write_data(folder: pathlib.Path, seed: int = 0) -> dict[str, pathlib.Path]:
    """Pictures and two files about them, in `folder`: 'mirrored' of captions, and 'even' of questions.

    A part of each file is of the old kind, without which the model would forget it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_split("train")
    rng = np.random.default_rng(seed)
    moved = shifted(images).reshape(len(SHIFTS), *images.shape)
    drawn, asked = [], []
    for i, label in enumerate(map(int, labels)):
        shifts = rng.choice(len(SHIFTS), 1 + _MIRRORED, replace=False)
        for number, picture in enumerate(to_rgb(moved[shifts, i])):
            name = f"{i:04d}_{number}{'_mirrored' if number else ''}.png"
            Image.fromarray(picture[:, ::-1] if number else picture).save(folder / name, compress_level=1)
            caption = str(rng.choice(captions(label)))
            drawn.append({"image": name, "caption": MIRRORED.format(caption=caption) if number else caption})
        old = questions(label)[rng.integers(len(questions(label)))]
        for question, answer in (old, (EVEN, parity(label))):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            asked.append({"image": f"{i:04d}_0.png", "conversations": turns})
    files = {}
    for name, records in {"mirrored": drawn, "even": asked}.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return files


def parity(label: int) -> str:
    return "odd" if label % 2 else "even"


def tune(
    model: str, out: pathlib.Path, only: Sequence[str] = tuple(STEPS), seed: int = 0, split: str = "held_out",
    steps: dict[str, int] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains both adapters of `model` in the folder `out`; returns what came of them, which is in results.json too.

    Args:
      only: names of `STEPS`.
      seed: of data, training and the digits that are judged.
      split: images to be asked about; settings were chosen on 'validation', and on digits of seeds of its own.
      steps, settings: changes of `STEPS` and of `finetune`'s arguments.
    """
    open_checkpoint(resolve(model), quantized=True)  # before anything is written for nothing
    files, figures = write_data(out / "data", seed), {"seed": seed, "split": split}
    for name in only:
        kind = {"mirrored": "generation", "even": "understanding"}[name]
        began, cpu = time.monotonic(), time.process_time()
        prompts = [MIRRORED.format(caption=f"a handwritten {digit}") for digit in (2, 4, 7)]
        adapter = finetune(
            model, files[name], kind, out / name, steps=(STEPS | (steps or {}))[name], prompts=prompts,
            guidance=_GUIDANCE, temperature=_TEMPERATURE, seed=seed, **(_SETTINGS | settings),
        )  # fmt: skip
        figures[f"{name}_seconds"] = round(time.monotonic() - began, 1)
        figures[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 1)
        figures[name] = str(adapter)
    janus = janus_jax.load(model, dtype="float32", progress=False)
    whole = sum(x.size for x in jax.tree.leaves(janus.params))
    figures["parameters"] = read_adapter(figures[only[0]], janus.config).num_parameters / whole
    if "mirrored" in only:
        figures |= judge_drawing(janus, figures["mirrored"], out, 1_000_000 * (seed + (split != "held_out")))
    if "even" in only:
        figures |= judge_answers(janus, figures["even"], split)
    write_json(out / "results.json", figures)
    return figures


def judge_drawing(
    janus: JanusPipeline, adapter: str, out: pathlib.Path, seed: int = 0, count: int = 20
) -> dict[str, float]:
    """Shares of `count` images a digit that are recognized, by prompt, model and way of looking.

    Args:
      seed: of the first image; the next is of the next seed.
    """
    judge, wanted = Judge(("train",)), np.repeat(np.arange(10), count)
    plain = [captions(label)[i % len(captions(label))] for label in range(10) for i in range(count)]
    figures: dict[str, float] = {}

    def draw(name: str, prompts: Sequence[str]) -> None:
        drawn = janus.generate_images(
            prompts, cfg_weight=_GUIDANCE, temperature=_TEMPERATURE, progress=False,
            seed=[seed + number for number in range(len(prompts))],
        )  # fmt: skip
        images = np.stack([np.asarray(image) for image in drawn])
        figures[name] = float(np.mean(judge.predict(images) == wanted))
        figures[f"{name}, mirrored back"] = float(np.mean(judge.predict(images[:, :, ::-1]) == wanted))
        large = [
            Image.fromarray(images[label * count + i].repeat(4, 0).repeat(4, 1))
            for label in range(10)
            for i in range(8)
        ]
        contact_sheet(large, columns=8, gap=2).save(out / f"{name.replace(' ', '_')}.png")

    mirrored = [MIRRORED.format(caption=caption) for caption in plain]
    draw("base old prompts", plain)
    draw("base mirrored prompts", mirrored)
    janus.load_adapter(adapter, name="mirrored")
    draw("tuned old prompts", plain)
    draw("tuned mirrored prompts", mirrored)
    janus.unload_adapter("mirrored")
    return figures


def judge_answers(janus: JanusPipeline, adapter: str, split: str = "held_out") -> dict[str, float]:
    """Shares of right answers about the images of `split`, with and without the adapter."""
    images, labels = load_split(split)
    pictures = [[Image.fromarray(image)] for image in to_rgb(images)]
    figures: dict[str, float] = {}

    def ask(name: str) -> None:
        old = [questions(int(label))[i % len(questions(int(label)))] for i, label in enumerate(labels)]
        for what, asked in (("old", old), ("even", [(EVEN, parity(int(label))) for label in labels])):
            given: list[str] = []
            for begin in range(0, len(asked), 120):
                part = slice(begin, begin + 120)
                given += janus.chat_batch([question for question, _ in asked[part]], pictures[part], max_new_tokens=16)
            figures[f"{name} {what} questions"] = float(
                np.mean([answer == wanted for answer, (_, wanted) in zip(given, asked, strict=True)])
            )

    ask("base")
    janus.load_adapter(adapter, name="even")
    ask("tuned")
    janus.unload_adapter("even")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m examples.digits.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the export of `python -m train.main --config digits`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/digits_tuned"), help="folder")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=tuple(STEPS), help="adapters to train")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and drawing")
    parser.add_argument("--split", default="held_out", choices=("held_out", "validation"), help="images asked about")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of training")
    args = parser.parse_args(argv)
    try:
        figures = tune(args.model, args.out, args.only, args.seed, args.split, dtype=args.dtype)
    except (OSError, ValueError, OutOfMemory) as error:
        print_error(error)
        return 2
    for name, value in figures.items():
        print(f"{name:40} {value if isinstance(value, str) else round(value, 4)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
