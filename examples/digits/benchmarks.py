"""Digits judged by `evals`: `python -m examples.digits.benchmarks --model runs/digits/stage3/export/850`.

What the model draws for prompts in GenEval's format is judged by the rules of GenEval, with the classifier of digits as
the detector. It answers benchmarks in the formats of POPE, MME and MMBench about digits that it has not seen: as it is,
and after a run on such questions about others, which asks them on its way.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from janus_jax.processing.chat import Processor
from janus_jax.processing.image_files import open_image
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.weights.checkpoint import open_checkpoint, write_json
from train.config import DataConfig, EvalConfig, EvalsConfig, OptimizerConfig, SampleConfig
from train.overrides import load_config
from train.prepare import prepare
from train.raw.sources import open_source
from train.run.figures import benchmark_curves
from train.run.loop import train

STEPS, EVERY = 600, 100
_CONTEXT = 192  # tokens of a row, two questions or three
_WATCHED, _AS_IT_IS = 160, 240  # items of each benchmark that are asked on the way, and of the model as it is
_GUIDANCE, _TEMPERATURE = 2.25, 0.8  # of `configs/digits.py`
_TITLES = {
    "pope": "POPE-like: F1 random, %",
    "mme": "MME-like: perception, of 400",
    "mmbench": "MMBench-like: vanilla-all, %",
}


def judge(
    model: str, out: pathlib.Path, split: str = "held_out", seed: int = 0, steps: int = STEPS, every: int = EVERY
) -> dict[str, Any]:
    """Everything of the module's docstring in the folder `out`; returns the figures, which are in results.json too.

    Args:
      split: whose pictures are asked about in the end; on the way it is 'validation'.
      seed: of questions, training and drawing.
      steps, every: of the run that teaches, and between two times that it asks.
    """
    folder = pathlib.Path(resolve(model))
    open_checkpoint(folder)  # before anything is written for nothing
    own, data = out / "model", {name: out / "tasks" / name for name in ("validation", split)}
    for name, place in data.items():
        _once(place, lambda partial, name=name: write_tasks(partial, name, seed))
    _once(own, lambda partial: with_old_roles(folder, partial))
    figures: dict[str, Any] = {"split": split, "seed": seed}
    identity, classifier = model_identity(model, folder, dtype="float32"), Judge(("train", "validation"))
    janus = janus_jax.load(folder, dtype="float32", progress=False)  # which draws in its own roles
    drawn = judge_drawing(janus, data[split], out / "as_it_is", classifier, identity, seed)
    figures["geneval"] = {name: interval(number) for name, number in drawn.numbers.items()}
    janus = janus_jax.load(own, dtype="float32", progress=False)
    figures["as it is"] = ask(janus, data[split], out / "as_it_is", identity, _AS_IT_IS)
    began, cpu = time.monotonic(), time.process_time()
    exported = teach(own, out, data["validation"], seed, steps, every)
    figures["seconds"], figures["cpu_seconds"] = time.monotonic() - began, time.process_time() - cpu
    benchmark_curves(out / "run", out / "evals.png", titles=_TITLES)
    janus = janus_jax.load(exported, dtype="float32", progress=False)
    figures["taught"] = ask(
        janus, data[split], out / "taught", model_identity(str(exported), exported, dtype="float32")
    )
    write_json(out / "results.json", figures)
    return figures


def _once(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Has `folder` written unless it is there; one that a killed start left incomplete has another name."""
    partial = folder.with_name(f"{folder.name}.partial")
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(folder)


def with_old_roles(model: pathlib.Path, folder: pathlib.Path) -> None:
    """A copy whose conversations have the roles User and Assistant, which `evals` writes for every model."""
    shutil.copytree(model, folder)
    path = folder / "processor_config.json"
    write_json(path, read_json_object(path) | {"sft_format": "deepseek_old"})


def teach(
    model: pathlib.Path, out: pathlib.Path, watched: pathlib.Path, seed: int, steps: int, every: int
) -> pathlib.Path:
    """Trains `model` on `write_lessons`, asking the benchmarks in `watched` on the way; returns the export."""
    stage, prepared = load_config("digits").stages[-1], out / "prepared"
    source = open_source(write_lessons(out / "lessons", seed))
    processor = Processor.from_folder(model, stage.model)
    prepare(source, prepared, "understanding", processor, context=_CONTEXT, batch_size=64, progress=False)
    config = dataclasses.replace(
        stage, name="lessons", workdir=str(out / "run"), init_from=str(model), tokenizer=str(model), steps=steps,
        batch_size=20, seed=seed, loss_chunk=_CONTEXT, save_every=every,
        data=DataConfig(
            understanding=(str(prepared),), ratio=(1, 0, 0), context=_CONTEXT, images_per_row=3, workers=0
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, schedule="cosine", warmup_steps=50),
        evaluation=EvalConfig(), samples=SampleConfig(),
        evals=EvalsConfig(every=every, tasks=ASKED, data=str(watched), limit=_WATCHED),
    )  # fmt: skip
    return train(config)


def ask(
    janus: JanusPipeline, data: pathlib.Path, out: pathlib.Path, identity: Mapping[str, Any], limit: int | None = None
) -> dict[str, str]:
    """The main figure of each benchmark, in words; all of them are in `out`, as `evals.main` writes them."""
    respondent = Respondent(janus)
    for task, protocol in chosen(",".join(ASKED), None):
        loaded = task.load(data, protocol)
        found = evaluate(task, protocol, loaded, Settings(out, limit, progress=False), identity, respondent.ask)
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
    lines = [f"| split {figures['split']}, seed {figures['seed']} | as it is | taught |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {figures['taught'][name]} |" for name, value in figures["as it is"].items()]
    lines += [f"| geneval, {name} | {value} | |" for name, value in figures["geneval"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m examples.digits.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the export of `python -m train.main --config digits`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/digits_judged"), help="folder")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run that teaches (default {STEPS})")
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
