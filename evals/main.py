"""Benchmarks: `python -m evals.main --model DIR --tasks pope,mme,geneval --data FOLDER --out DIR`.

Replies are kept in `--out` as they come: started again, an evaluation goes on where it was. What it writes there, and
what protocols are, is in docs/evals.md. Exit codes: 0 when all is done, 2 for bad input, 3 if a judge left replies
unjudged.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from evals import drawn, hosts, model
from evals.asking.identity import difference
from evals.evaluate import Evaluation, Settings, chosen, evaluate
from evals.generation.task import DrawnTask
from evals.items import Loaded
from evals.judging import Judge
from evals.reports.page import write_page
from evals.reports.results import result, summary, write_results
from evals.tasks import TASKS
from janus_jax.io import commands
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line, print_any_text, print_error, print_note
from janus_jax.io.stores import local_only
from janus_jax.io.whole.files import write_file
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import check_count

MODEL = "model.json"
UNJUDGED = 3


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, with one line on standard error for bad input."""
    print_any_text()
    args = _parser().parse_args(argv)
    codes: list[int] = []
    try:
        ended = commands.run(lambda: codes.append(_run(args)))
    except OutOfMemory as error:
        print_error(error)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not OutOfMemory.says(error):
            raise
        print_error(
            "the model and its questions do not fit in the device's memory; try --batch-size, --weights, --mesh"
        )
        return 2
    return ended or codes[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.main", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--tasks", required=True, help=f"one or more of {', '.join(TASKS)}, with commas between")
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="FOLDER", help="where the data are")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for replies and reports")
    parser.add_argument("--protocol", metavar="NAME", help="how it is asked and scored (default: each task's first)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask only about so many items of each task")
    parser.add_argument(
        "--unreadable", choices=("skip", "wrong"), default="skip",
        help="items that cannot be asked are left out of the figures, or count as wrong (default skip)",
    )  # fmt: skip
    parser.add_argument("--rescore", action="store_true", help="score the replies that are there, without the model")
    how = parser.add_argument_group("the model")
    model.add_options(how)
    how.add_argument("--batch-size", type=int, metavar="N", help="questions at a time, a shard (default: what fits)")
    judge = parser.add_argument_group("a judge", "of replies that the rules do not decide, and of MM-Vet")
    judge.add_argument("--judge", metavar="URL", help="an endpoint with OpenAI's chat completions; the key is in "
                       "JUDGE_API_KEY or OPENAI_API_KEY")  # fmt: skip
    judge.add_argument("--judge-model", metavar="NAME", help="the model to ask there")
    drawn.add_options(parser)
    hosts.add_options(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    tasks = chosen(args.tasks, args.protocol)
    settings = _settings(args)
    drawn.check_options(args, [task for task, _ in tasks])
    if args.model is None and not args.rescore and args.pictures is None:
        raise ValueError("--model is missing; only --rescore and --pictures work without one")
    hosts.start(args.coordinator, args.processes, args.process)
    if not args.rescore:
        hosts.check_mesh(args.mesh)
    asked = model.Asked(args)
    stages: list[drawn.Stage | Loaded] = []
    with hosts.together():  # before minutes of loading
        identity = _identity(args, settings.out)
        for task, protocol in tasks:
            if isinstance(task, DrawnTask):
                stages.append(drawn.prepare(task, protocol, args, settings, identity, asked))
            else:
                stages.append(task.load(args.data, protocol))
        _settle(settings.out, identity)
        for stage in stages:
            if isinstance(stage, drawn.Stage):
                stage.settle()
    done = []
    for (task, protocol), stage in zip(tasks, stages, strict=True):
        if isinstance(stage, drawn.Stage):
            evaluation = drawn.run(stage, settings)
        else:
            ask = None if args.rescore else asked.respondent.ask
            evaluation = evaluate(task, protocol, stage, settings, identity, ask)
        found = result(evaluation, settings.unreadable_wrong)
        done.append(evaluation)
        if hosts.is_first():
            write_results(settings.out, identity, {task.name: {protocol: found}})
            print(summary(task.name, protocol, found), flush=True)
    if hosts.is_first():
        write_page(settings.out, identity, done)
        print(f"written to {one_line(settings.out)}: results.json, report.md, report.html", flush=True)
    return UNJUDGED if _unjudged(done) else 0


def _settings(args: argparse.Namespace) -> Settings:
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None:
            check_count("--" + name.replace("_", "-"), getattr(args, name))
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge and --judge-model go together; give both, or none")
    judge = None if args.judge is None else Judge(args.judge, args.judge_model)
    return Settings(local_only(args.out), args.limit, args.unreadable == "wrong", judge)


def _identity(args: argparse.Namespace, out: pathlib.Path) -> Mapping[str, Any]:
    """What tells the model, or the --pictures, from others; with --rescore alone what an earlier start has written.

    The folder of replies is of one of them; replies of another are refused.
    """
    path = out / MODEL
    if args.rescore and not path.exists():
        raise ValueError(f"{one_line(path)} is missing: there is nothing to score; leave out --rescore")
    if args.pictures is not None:
        ours = drawn.pictures_identity(args.pictures)
    elif args.model is None:
        return read_json_object(path)
    else:
        ours = model.asked_identity(args)
    if hosts.is_first():
        there = read_json_object(path, missing_ok=True)
        if there and (said := difference(there, ours)):
            raise ValueError(f"{one_line(out)} holds replies of another model: {said}; choose another --out")
    return ours


def _settle(out: pathlib.Path, identity: Mapping[str, Any]) -> None:
    if hosts.is_first() and not (out / MODEL).exists():
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / MODEL, (json.dumps(identity, indent=1) + "\n").encode())


def _unjudged(done: Sequence[Evaluation]) -> bool:
    for evaluation in done:
        if evaluation.unjudged:
            print_note(
                f"{evaluation.task.name}: {len(evaluation.unjudged)} replies are unjudged; the same command asks the "
                "judge for them again"
            )
    return any(evaluation.unjudged for evaluation in done)


if __name__ == "__main__":
    commands.leave(main())
