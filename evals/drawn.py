"""Benchmarks of drawing in the command: their pictures are drawn, and then somebody looks at them.

With `--pictures` the pictures are somebody's, and are only looked at. With `--rescore` the model neither draws nor
looks; detectors and other judges do, where they have not yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evals.asking.answers import Replies
from evals.asking.identity import difference, fingerprint
from evals.asking.store import read_lines
from evals.evaluate import Evaluation, Settings, evaluate, limited, predictions_path
from evals.generation import scorers
from evals.generation.detector import CLIP, DETECTOR
from evals.generation.drawing import DRAWN_WITH, Draw, How, brush, draw_all, drawn_with, settle, settled
from evals.generation.prompts import Drawing
from evals.generation.scorers import ENDPOINT, SELF, Scorer
from evals.generation.task import DrawnTask
from evals.hosts import is_first
from evals.items import Item, Loaded, Task
from evals.model import Asked, asked_identity
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line

_OURS = ("pictures", *DRAWN_WITH, "pictures_at_a_time", "detector", "clip", "vqa")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmarks of drawing."""
    drawn = parser.add_argument_group("drawing", "of geneval and dpg")
    How.add_options(drawn, "--pictures-at-a-time")
    drawn.add_argument("--pictures", type=pathlib.Path, metavar="DIR", help="score these, drawn elsewhere, instead")
    drawn.add_argument("--detector", metavar="DIR", help=f"GenEval's: folder or hub id, such as {DETECTOR}")
    drawn.add_argument("--clip", metavar="DIR", help=f"GenEval's of colors: folder or hub id, such as {CLIP}")
    drawn.add_argument(
        "--vqa", metavar="NAME", help=f"who answers DPG-Bench's questions: {SELF} (the model of --model), {ENDPOINT} "
        "(of --judge), or folder or hub id of a model of transformers"
    )  # fmt: skip


def check_options(args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """ValueError for options that these tasks have no use for."""
    drawing = [task for task in tasks if isinstance(task, DrawnTask)]
    for name in _OURS:
        if not drawing and getattr(args, name) is not None:
            raise ValueError(f"{_option(name)} is of geneval and dpg, and --tasks has neither")
    if args.pictures is None:
        return
    if others := [task.name for task in tasks if not isinstance(task, DrawnTask)]:
        raise ValueError(f"--pictures are for geneval and dpg; evaluate {', '.join(others)} without them")
    if given := [name for name in _OURS[1:5] if getattr(args, name) is not None]:
        raise ValueError(f"{_option(given[0])} is for drawing, and --pictures are drawn already; leave out one of them")
    if args.model is not None and args.vqa != SELF:
        raise ValueError(f"--model has nothing to do with --pictures but answer dpg's questions, by --vqa {SELF}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def pictures_identity(pictures: pathlib.Path) -> dict[str, Any]:
    """What tells pictures that were drawn elsewhere from others: their content, and with what they were drawn if known.

    ValueError if `pictures` is no folder.
    """
    if not pictures.is_dir():
        raise ValueError(f"{one_line(pictures)} is not a folder; --pictures names the folder of drawn pictures")
    known = read_json_object(settled(pictures), missing_ok=True)
    known.pop("prompts", None)
    return {"model": f"pictures in {pictures.name}", **known, "pictures": fingerprint(pictures)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is to be drawn and looked at.

    Attributes:
      identity: what tells the replies from others, beside the questions.
      drawn_with: what tells the pictures from others.
      drawings: what is to be there, and is drawn by `draw` if it is not; None draws nothing.
      scorer: who looks; None scores the replies that are there.
    """

    task: DrawnTask
    protocol: str
    loaded: Loaded
    identity: Mapping[str, Any]
    drawn_with: Mapping[str, Any]
    drawings: Sequence[Drawing]
    draw: Draw | None
    per_call: int
    scorer: Scorer | None

    def settle(self) -> None:
        """Writes what pictures are drawn with, before there are any; ValueError if there are some drawn otherwise."""
        if not self.task.given and is_first():
            settle(self.task.pictures, self.drawn_with)


def prepare(
    task: DrawnTask,
    protocol: str,
    args: argparse.Namespace,
    settings: Settings,
    identity: Mapping[str, Any],
    model: Asked,
) -> Stage:
    """Checks all that can be checked before minutes of drawing. Raises ValueError or OSError in one line."""
    how = How.of(args)
    scorer = _scorer(task, args, settings, model)
    if args.pictures is not None:
        inner = args.pictures / task.name
        task = task.at(inner if inner.is_dir() else args.pictures, given=True)
        about = dict(identity)
        drawings: list[Drawing] = []
    else:
        task = task.at(settings.out / task.name / "pictures")
        drawings = task.drawings(args.data)
        about = _drawn_with(task, args, how, identity, drawings)
    loaded = task.load(args.data, protocol)
    known = [f"{name} {about[name]}" for name in DRAWN_WITH if name in about]
    if known:
        loaded = dataclasses.replace(loaded, source=f"{loaded.source}; drawn with {', '.join(known)}")
    if settings.limit is not None:
        groups = {item.group for item in limited(loaded.items, settings.limit)}
        drawings = [each for each in drawings if each.key in groups]
    # The prompts that are asked about are in the replies' first line anyway.
    replies_of = {name: value for name, value in about.items() if name != "prompts"}
    if scorer is not None:
        replies_of |= scorer.identity
    draw = None if args.rescore else brush(lambda: model.janus, how)
    return Stage(task, protocol, loaded, replies_of, about, drawings, draw, how.per_call, scorer)


def _drawn_with(
    task: DrawnTask, args: argparse.Namespace, how: How, identity: Mapping[str, Any], drawings: Sequence[Drawing]
) -> dict[str, Any]:
    """What the pictures are drawn with; with --rescore as it was written when they were."""
    if not args.rescore:
        return drawn_with(identity, task.name, task.samples, how, drawings)
    path = settled(task.pictures)
    if not path.is_file():
        raise ValueError(f"{one_line(path)} is missing: there are no pictures to score; leave out --rescore")
    there, given = read_json_object(path), How.given(args)
    if said := difference({name: there.get(name) for name in given}, given):
        raise ValueError(f"{one_line(task.pictures)} holds pictures that were drawn otherwise: {said}")
    return there


def _scorer(task: DrawnTask, args: argparse.Namespace, settings: Settings, model: Asked) -> Scorer | None:
    if task.name == "geneval":
        if args.rescore and args.detector is None and args.clip is None:
            return None
        return scorers.detectors(args.detector, args.clip)
    if args.vqa is None:
        if args.rescore:
            return None
        raise ValueError(
            f"{task.name} needs --vqa, who answers its questions: {SELF} (the model of --model), {ENDPOINT} (of "
            "--judge), or folder or hub id of a model of transformers. The published figures' judge, mPLUG, is none of "
            "these (modelscope.cn, damo/mplug_visual-question-answering_coco_large_en)"
        )
    if args.vqa == ENDPOINT:
        return scorers.endpoint(settings.judge)
    if args.vqa != SELF:
        return scorers.answerer(args.vqa)
    if args.pictures is None:
        about, label = {}, "the model itself"
    elif args.model is None:
        raise ValueError(f"--vqa {SELF} needs --model, which answers the questions about --pictures")
    else:
        about = {f"vqa_{name}": value for name, value in asked_identity(args).items() if name != "model"}
        label = one_line(args.model)
    return Scorer({"vqa": SELF, **about}, label, lambda items: model.respondent.ask(items), alone=False)


def run(stage: Stage, settings: Settings) -> Evaluation:
    """Draws what is not there, has it looked at, and scores it."""
    if stage.draw is not None:
        draw_all(stage.drawings, stage.draw, f"{stage.task.name}: drawing", stage.per_call, settings.progress)
    scorer, ask = stage.scorer, None
    if scorer is not None and not scorer.alone:
        ask = None if stage.draw is None else scorer.ask
    elif scorer is not None:
        ask = scorers.only_first(lambda items: _there(scorer, items))
    settings = dataclasses.replace(settings, judge=None)
    evaluation = evaluate(stage.task, stage.protocol, stage.loaded, settings, stage.identity, ask)
    label = None if scorer is None else scorer.label
    if label is None and is_first():
        label = read_lines(predictions_path(settings.out, stage.task, stage.protocol))[0].get("scorer")
    return dataclasses.replace(evaluation, judge=label)


def _there(scorer: Scorer, items: Sequence[Item]) -> Iterator[Replies]:
    """Replies about the pictures that are there; with --rescore some may not be drawn yet."""
    there = [item for item in items if item.images[0].path.is_file()]
    return scorer.ask(there) if there else iter(())
