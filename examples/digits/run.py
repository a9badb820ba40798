"""The whole recipe on handwritten digits: a VQ tokenizer, data, three stages, and what came of it.

The same code as for 7B runs here from nothing in minutes on two cores. Whatever is finished already is not done again.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

import janus_jax
from examples.digits.config import DigitsConfig
from examples.digits.data import (
    captions,
    load_split,
    questions,
    shifted,
    to_float,
    to_rgb,
    write_sources,
    write_tokenizer,
)
from examples.digits.judge import Judge
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import contact_sheet
from janus_jax.weights.checkpoint import write_json
from train.prepare import prepare, vq_encoder
from train.raw.sources import open_source
from train.run.distributed import barrier, from_first
from train.run.figures import loss_curves
from train.run.loop import train
from train.run.metrics import FILE
from train.vq import save_vq, train_vq

_ENCODED_AT_ONCE = 256
_ASKED_AT_ONCE = 120
_SHOWN = 8  # images a row of the pictures
_ZOOM = 4


def run(config: DigitsConfig, steal: bool = False) -> dict[str, Any]:
    """Runs everything that `config` describes and prints a table; returns its figures, to process 0 alone.

    In the workdir: the folders of `DigitsConfig`, results.json, and the pictures reconstructions.png, generated.png,
    answers.png and curves.png.

    Args:
      steal: as for `train.run.loop.train`, of every stage.
    """
    clock = _Clock()
    # In every process alike, and saved together: orbax has no way to save in one of them alone.
    train_tokenizer(config)
    clock.lap("VQ tokenizer")
    if jax.process_index() == 0:
        prepare_data(config)
        clock.lap("data")
    barrier()
    exported = None
    for stage in config.run_stages:
        exported = train(stage, steal)
        clock.lap(stage.name)
    figures = _finish(config, exported, clock) if jax.process_index() == 0 else {}
    barrier()  # who leaves earlier waits at JAX's own door, which does not stay open for long
    return figures


def _finish(config: DigitsConfig, exported: pathlib.Path, clock: _Clock) -> dict[str, Any]:
    folder = pathlib.Path(config.workdir)
    janus = janus_jax.load(exported, dtype="float32", progress=False)
    figures = evaluate(janus, config, folder)
    loss_curves([pathlib.Path(s.workdir) / FILE for s in config.run_stages], folder / "curves.png", "digits")
    clock.lap("evaluation")
    figures |= {"seed": config.seed, "seconds": clock.seconds, "model": str(exported)}
    # Of all threads of this process: unlike the clock, it says little of what else the machine had to do.
    figures["cpu_seconds"] = round(time.process_time(), 1)
    write_json(folder / "results.json", figures)
    print(table(figures))
    print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    ask = f"--prompt 'a handwritten 7' --guidance {config.guidance:g} --temperature {config.temperature:g}"
    print(f"try: python -m janus_jax generate --model {exported} {ask} --out drawn")
    return figures


class _Clock:
    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str):
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 1), now
        if jax.process_index() == 0:
            print(f"{name}: {self.seconds[name]:.0f} s", flush=True)


# ---------------------------------------------------------------- what the stages need


def train_tokenizer(config: DigitsConfig):
    """Trains the VQ tokenizer of images, unless `config.vq_folder` holds it already."""
    if from_first((config.vq_folder / "config.json").exists()):
        return
    images = to_float(to_rgb(shifted(load_split(*config.training_splits)[0])))
    params, history = train_vq(config.run_vq, images)
    save_vq(config.vq_folder, config.vq.model, jax.device_get(params))
    last = {name: float(values[-20:].mean()) for name, values in history.items()}
    if jax.process_index() == 0:
        print("VQ tokenizer: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()), flush=True)


def prepare_data(config: DigitsConfig):
    """Writes the digits as sources, the tokenizer of their texts, and the prepared folders that the stages read."""
    model = config.stages[0].model
    if not (config.tokenizer / "tokenizer.json").exists():
        vision = model.vision
        write_tokenizer(config.tokenizer, model.language.vocab_size, vision.image_size, vision.num_patches)
    processor = Processor.from_folder(config.tokenizer, model)
    encode, fingerprint = vq_encoder(config.vq_folder)
    context = config.stages[0].data.context
    for split in ("train", "validation"):
        if not config.sources.joinpath(split, "done").exists():
            splits = config.training_splits if split == "train" else (split,)
            write_sources(config.sources / split, splits, config.seed, split == "train", config.noise)
            config.sources.joinpath(split, "done").touch()
        paths = {
            "understanding": "understanding/llava.jsonl",
            "text": "text/text.jsonl",
            "generation": "generation/digits.tar",
        }
        for kind, name in paths.items():
            source = open_source(config.sources / split / name)
            out = config.prepared(split, kind)
            options = {"encode": encode, "vq_fingerprint": fingerprint} if kind == "generation" else {}
            prepare(source, out, kind, processor, context=context, batch_size=_ENCODED_AT_ONCE, **options)


# ---------------------------------------------------------------- what came of it


def evaluate(janus: JanusPipeline, config: DigitsConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Judges a trained model on `config.split` and writes the pictures into `folder`."""
    judge = Judge(config.training_splits)
    images, labels = load_split(config.split)
    shown = to_rgb(images)
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
