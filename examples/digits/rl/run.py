"""Reinforcement learning on handwritten digits: a judge's verdict as the reward, pairs that it made, and a bad reward.

Pictures are drawn without guidance, of wordings that were not rewarded. And questions about dark pictures, with right
answers as the reward. A part that is finished is not done again.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

import janus_jax
from examples.digits.data import CAPTIONS, captions, png
from examples.digits.rl.answers import right_answers, write_questions
from examples.digits.rl.config import DigitsRlConfig
from examples.digits.rl.judges import Network, Recognized
from examples.digits.trained import trained
from janus_jax.hub import resolve
from janus_jax.io.stores import local_only
from janus_jax.io.whole.files import write_file
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import contact_sheet
from janus_jax.weights.checkpoint import write_json
from train.config import PREFERENCE
from train.prepare import prepare, vq_encoder
from train.raw.sources import open_source
from train.run.loop import train
from train.run.metrics import FILE, read_metrics

_PAIRS = "pairs.jsonl"
_DRAWN_AT_ONCE = 200
_MOST_DRAWS = 24  # of all prompts, for pairs
_SHOWN = 8  # pictures of each digit in a grid
_TOLD = ("reward", "kl", "entropy", "preferred")


def run(config: DigitsRlConfig, steal: bool = False) -> dict[str, Any]:
    """Runs the parts of `config` and prints a table; returns its figures.

    In the workdir: a folder for each part with its run, results.json, and pictures: before.png, after_PART.png, and
    curves_PART.png.
    """
    local_only(config.workdir)
    if jax.process_count() > 1:
        raise ValueError("grpo_digits is a demonstration for one process; start it without other processes")
    folder = pathlib.Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    model = resolve(config.model) if config.model else trained()
    judges = Recognized(), Network()
    figures: dict[str, Any] = {"model": str(model), "seed": config.seed, "images": config.images}
    if set(config.parts) - {"answers"}:
        figures["base"] = measure(config, model, judges, folder / "before.png")
        write_prompts(config)
    for part, run_config in config.runs(str(model)).items():
        began = time.monotonic()
        if part == "dpo":
            prepare_pairs(config, model, judges[0])
        if part == "answers":
            write_questions(config)
            before = right_answers(model, config.dark)
            exported = train(run_config, steal)
            figures[part] = {"before": before, "after": right_answers(exported, config.dark)}
        else:
            exported = train(run_config, steal)
            figures[part] = measure(config, exported, judges, folder / f"after_{part}.png")
        figures[part]["seconds"] = round(time.monotonic() - began, 1)
        metrics = pathlib.Path(run_config.workdir) / FILE
        last = [line for line in read_metrics(metrics) if "train/finite" in line][-1]
        figures[part] |= {name: last[f"train/{name}"] for name in _TOLD if f"train/{name}" in last}
        shutil.copy(metrics.with_name("curves.png"), folder / f"curves_{part}.png")
        write_json(folder / "results.json", figures)
    print(table(figures))
    return figures


# ---------------------------------------------------------------- the parts


def write_prompts(config: DigitsRlConfig) -> None:
    """Writes the wordings that are rewarded, with the digit that each asks for."""
    records = [
        {"prompt": caption, "digit": digit} for digit in range(10) for caption in captions(digit)[: config.rewarded]
    ]
    config.prompts.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def prepare_pairs(config: DigitsRlConfig, model: pathlib.Path, judge: Recognized) -> None:
    """Draws, judges and prepares the pairs for DPO, unless that is done."""
    source = config.folder("dpo") / "source"
    if not (source / _PAIRS).exists():
        write_pairs(config, model, judge, source)
    encode, fingerprint = vq_encoder(model)
    processor, context = Processor.from_folder(model, config.dpo.model), config.dpo.data.context
    # Of what is complete, nothing is prepared again.
    prepare(
        open_source(source / _PAIRS), config.pairs_folder, PREFERENCE, processor, context=context, batch_size=256,
        encode=encode, vq_fingerprint=fingerprint,
    )  # fmt: skip


def write_pairs(config: DigitsRlConfig, model: pathlib.Path, judge: Recognized, folder: pathlib.Path) -> int:
    """Writes pairs.jsonl: of pictures of the same prompt, one that the judge recognizes and one that it does not.

    Returns: how many pairs there are.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    janus = janus_jax.load(model, dtype="float32", progress=False)
    lines, draws = [], 0
    prompts = [(digit, caption) for digit in range(10) for caption in captions(digit)[: config.rewarded]]
    while len(lines) < config.pairs and draws < _MOST_DRAWS:
        # Seeds that nothing else is drawn with.
        drawn = draw(janus, [text for _, text in prompts for _ in range(40)], config, 10_000_000 * (draws + 1))
        draws += 1
        for number, (digit, text) in enumerate(prompts):
            own = drawn[number * 40 : (number + 1) * 40]
            right = judge.right(own, [digit] * len(own)) > 0
            for index, (good, bad) in enumerate(zip(own[right], own[~right], strict=False)):
                names = [f"images/{draws}_{number}_{index}_{which}.png" for which in ("chosen", "rejected")]
                for name, image in zip(names, (good, bad), strict=True):
                    (folder / name).write_bytes(png(image))
                lines.append({"prompt": text, "chosen": names[0], "rejected": names[1]})
    order = np.random.default_rng(config.seed).permutation(len(lines))[: config.pairs]
    text = "".join(json.dumps(lines[i]) + "\n" for i in order)
    write_file(folder / _PAIRS, text.encode())
    return len(order)


# ---------------------------------------------------------------- what came of it


def draw(janus: JanusPipeline, prompts: Sequence[str], config: DigitsRlConfig, seed: int) -> np.ndarray:
    """Pictures [N, 16, 16, 3], each of its own seed, without guidance."""
    drawn = janus.generate_images(
        prompts, cfg_weight=1.0, temperature=config.temperature, progress=False, batch_size=_DRAWN_AT_ONCE,
        seed=[seed + number for number in range(len(prompts))],
    )  # fmt: skip
    return np.stack([np.asarray(image) for image in drawn])


def measure(
    config: DigitsRlConfig, model: pathlib.Path, judges: tuple[Recognized, Network], picture: pathlib.Path
) -> dict[str, Any]:
    """Shares of pictures of wordings that are not rewarded: recognized by either judge, and distinct."""
    janus = janus_jax.load(model, dtype="float32", progress=False)
    count = config.images // 10
    wordings = range(config.rewarded, len(CAPTIONS))
    prompts = [captions(digit)[wordings[i % len(wordings)]] for digit in range(10) for i in range(count)]
    digits = np.repeat(np.arange(10), count)
    drawn = draw(janus, prompts, config, 1_000_000 * config.seed)
    shown = [
        drawn[digit * count + i].repeat(4, 0).repeat(4, 1) for digit in range(10) for i in range(min(count, _SHOWN))
    ]
    contact_sheet([Image.fromarray(image) for image in shown], columns=min(count, _SHOWN), gap=2).save(picture)
    return {
        "recognized": float(judges[0].right(drawn, digits).mean()),
        "other_judge": float(judges[1].right(drawn, digits).mean()),
        "distinct": len({image.tobytes() for image in drawn}) / len(drawn),
        "brightness": float(drawn.mean() / 255),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of `run` for a reader."""
    lines = _of_answers(figures["answers"]) if "answers" in figures else []
    return "\n".join((_of_drawing(figures) if "base" in figures else []) + lines)


def _of_answers(f: dict[str, Any]) -> list[str]:
    lines = [f"right answers about dark pictures{'rewarded wordings':>20}{'another':>9}{'bright':>8}"]
    for name in ("before", "after"):
        g = f[name]
        lines.append(f"{name:33}{g['rewarded']:>20.1%}{g['other_wording']:>9.1%}{g['bright']:>8.1%}")
    return [*lines, f"kl {f['kl']:.3f}, {f['seconds']:.0f} seconds"]


def _of_drawing(figures: dict[str, Any]) -> list[str]:
    rows = [name for name in ("base", "grpo", "dpo", "brightness") if name in figures]
    lines = [
        f"{figures['images']} digits of wordings not rewarded, drawn without guidance, seed {figures['seed']}",
        f"{'':12}{'recognized':>12}{'other judge':>13}{'distinct':>10}{'brightness':>12}{'kl':>8}{'seconds':>9}",
    ]
    for name in rows:
        f = figures[name]
        kl, seconds = (f"{f[key]:.3f}" if key in f else "" for key in ("kl", "seconds"))
        lines.append(
            f"{name:12}{f['recognized']:>12.1%}{f['other_judge']:>13.1%}{f['distinct']:>10.1%}"
            f"{f['brightness']:>12.3f}{kl:>8}{seconds.partition('.')[0]:>9}"
        )
    return lines
