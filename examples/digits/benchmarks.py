"""Digits judged by `evals`: `python -m examples.digits.benchmarks --model runs/digits/stage3/export/850`.

The model answers benchmarks in the formats of POPE, MME and MMBench about digits that it has not seen, as it is and
with an adapter that learns from such questions about others; the run asks them on its way. What it draws for prompts in
GenEval's format is judged by the rules of GenEval, with the classifier of digits as the detector.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import janus_jax
from evals.asking.answers import Replies, Respondent
from evals.asking.identity import model_identity
from evals.evaluate import Settings, chosen, evaluate
from evals.generation.drawing import How, brush, draw_all, drawn_with, settle
from evals.items import Item, Number, Scores
from evals.reports.results import interval, result, write_results
from evals.tasks.geneval import seen
from examples.digits.judge import Judge
from examples.digits.tasks import ASKED, DigitsGenEval, write_lessons, write_tasks
from janus_jax.hub import resolve
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import print_any_text, print_error
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.image_files import open_image
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.weights.checkpoint import open_checkpoint, write_json
from train.finetune import finetune
from train.run.figures import benchmark_curves

STEPS, EVERY = 600, 60
_SETTINGS: dict[str, Any] = {
    "rank": 16, "batch_size": 40, "learning_rate": 4e-3, "dtype": "float32", "targets": ("decoder", "aligners"),
    "save": ("embed_tokens",), "context": 160,
}  # fmt: skip
_GUIDANCE, _TEMPERATURE = 2.25, 0.8  # of `configs/digits.py`
_TITLES = {
    "pope": "POPE-like: F1 random, %",
    "mme": "MME-like: perception, of 400",
    "mmbench": "MMBench-like: vanilla-all, %",
}


def judge(
    model: str, out: pathlib.Path, split: str = "held_out", seed: int = 0, steps: int = STEPS, every: int = EVERY,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Everything of the module's docstring in the folder `out`; returns the figures, which are in results.json too.

    Args:
      split: whose pictures are asked about; settings were chosen on 'validation'.
      seed: of questions, training and drawing.
      steps, every: of the adapter's run, and between two times that it asks.
      settings: changes of `finetune`'s arguments.
    """
    folder = resolve(model)
    open_checkpoint(folder, quantized=True)  # before anything is written for nothing
    data, own = out / "tasks", out / "model"
    if not data.exists():
        write_tasks(data, split, seed)
    if not (out / "lessons").exists():
        write_lessons(out / "lessons", seed)
    if not own.exists():
        with_old_roles(pathlib.Path(folder), own)
    figures: dict[str, Any] = {"split": split, "seed": seed}
    janus = janus_jax.load(own, dtype="float32", progress=False)
    identity, classifier = model_identity(model, folder, dtype="float32"), Judge(("train", "validation"))
    drawn = judge_drawing(janus, data, out / "base", classifier, identity, seed)
    figures["geneval"] = {name: interval(number) for name, number in drawn.numbers.items()}
    figures["base"] = ask(janus, data, out / "base", identity)
    began, cpu = time.monotonic(), time.process_time()
    finetune(
        str(own), out / "lessons" / "lessons.jsonl", "understanding", out / "tuned", steps=steps, seed=seed,
        tasks=ASKED, tasks_data=data, tasks_every=every, **(_SETTINGS | settings),
    )  # fmt: skip
    figures["seconds"], figures["cpu_seconds"] = time.monotonic() - began, time.process_time() - cpu
    run = out / "tuned" / "run"
    benchmark_curves(run, out / "evals.png", titles=_TITLES)
    figures["tuned"] = figures_of(run / "evals" / f"{steps:07d}")
    write_json(out / "results.json", figures)
    return figures


def with_old_roles(model: pathlib.Path, folder: pathlib.Path) -> None:
    """A copy whose conversations have the roles User and Assistant, which `evals` writes for every model."""
    shutil.copytree(model, folder)
    path = folder / "processor_config.json"
    write_json(path, read_json_object(path) | {"sft_format": "deepseek_old"})


def ask(janus: JanusPipeline, data: pathlib.Path, out: pathlib.Path, identity: Mapping[str, Any]) -> dict[str, str]:
    """The main figure of each benchmark, in words; all of them are in `out`, as `evals.main` writes them."""
    respondent = Respondent(janus)
    for task, protocol in chosen(",".join(ASKED), None):
        loaded = task.load(data, protocol)
        found = evaluate(task, protocol, loaded, Settings(out, progress=False), identity, respondent.ask)
        write_results(out, identity, {task.name: {protocol: result(found, False)}})
    return figures_of(out)


def figures_of(out: pathlib.Path) -> dict[str, str]:
    """The main figure of each benchmark in a folder of `evals.main`, with its interval."""
    figures = {}
    for task, protocols in read_json_object(out / "results.json")["tasks"].items():
        for found in protocols.values() if task in ASKED else ():
            figures[f"{task}, {found['headline']}"] = interval(Number(**found["numbers"][found["headline"]]))
    return figures


def judge_drawing(
    janus: JanusPipeline,
    data: pathlib.Path,
    out: pathlib.Path,
    classifier: Judge,
    identity: Mapping[str, Any],
    seed: int = 0,
) -> Scores:
    """Draws GenEval's prompts in `data`, and judges the pictures by its rules; what is there already is kept."""
    task, how = DigitsGenEval(out / "geneval" / "pictures"), How(seed, _GUIDANCE, _TEMPERATURE)
    protocol, drawings = task.protocols[0], task.drawings(data)
    settle(task.pictures, drawn_with(identity, task.name, task.samples, how, drawings))
    draw_all(drawings, brush(lambda: janus, how), task.name, progress=False)

    def look(items: Sequence[Item]) -> Iterator[Replies]:
        for item in items:
            found = classifier.detect(open_image(item.images[0].read()))
            yield Replies({item.id: seen(item.fields["row"], found, lambda name, there: ["white"] * len(there))}, [])

    about = {**identity, "detector": "classifier of digits", "drawn": how.about()}
    found = evaluate(task, protocol, task.load(data, protocol), Settings(out, progress=False), about, look)
    write_results(out, identity, {task.name: {protocol: result(found, False)}})
    return found.scores


def table(figures: Mapping[str, Any]) -> str:
    """The figures of `judge` in Markdown."""
    lines = [f"| split {figures['split']}, seed {figures['seed']} | as it is | with the adapter |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {figures['tuned'][name]} |" for name, value in figures["base"].items()]
    lines += [f"| geneval, {name} | {value} | |" for name, value in figures["geneval"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m examples.digits.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the export of `python -m train.main --config digits`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/digits_judged"), help="folder")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the adapter (default {STEPS})")
    parser.add_argument("--every", type=int, default=EVERY, help=f"steps between benchmarks (default {EVERY})")
    parser.add_argument("--split", default="held_out", choices=("held_out", "validation"), help="images asked about")
    parser.add_argument("--seed", type=int, default=0, help="of questions, training and drawing")
    args = parser.parse_args(argv)
    try:
        figures = judge(args.model, args.out, args.split, args.seed, args.steps, args.every)
    except (OSError, ValueError, OutOfMemory) as error:
        print_error(error)
        return 2
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
