"""The whole recipe on handwritten digits: a VQ tokenizer, data, three stages, and what came of it.

The same code as for 7B runs here from nothing in minutes on two cores. Whatever is finished already is not done again.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax

import janus_jax
from examples.digits.config import DigitsConfig
from examples.digits.data import load_split, shifted, to_float, to_rgb, write_sources, write_tokenizer
from examples.digits.evaluate import evaluate, table
from janus_jax.io.stores import local_only
from janus_jax.processes import from_first
from janus_jax.processing.chat import Processor
from janus_jax.weights.checkpoint import write_json
from train.prepare import prepare, vq_encoder
from train.raw.sources import open_source
from train.run.distributed import barrier
from train.run.figures import loss_curves
from train.run.loop import train
from train.run.metrics import FILE
from train.vq import save_vq, train_vq

_ENCODED_AT_ONCE = 256


def run(config: DigitsConfig, steal: bool = False) -> dict[str, Any]:
    """Runs everything that `config` describes and prints a table; returns its figures, to process 0 alone.

    In the workdir: the folders of `DigitsConfig`, results.json, and the pictures reconstructions.png, generated.png,
    answers.png and curves.png.

    Args:
      steal: as for `train.run.loop.train`, of every stage.
    """
    local_only(config.workdir)
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
    images = to_float(to_rgb(shifted(load_split(*config.training_splits)[0]), config.image_size))
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
            folder, augment = config.sources / split, split == "train"
            write_sources(folder, splits, config.seed, augment, config.noise, config.image_size)
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
