"""Benchmarks of understanding: `python -m evals.main --model DIR --tasks pope,mme --data FOLDER --out DIR`.

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

from evals import hosts
from evals.asking.answers import Respondent
from evals.asking.identity import difference, model_identity
from evals.evaluate import Evaluation, Settings, chosen, evaluate
from evals.judging import Judge
from evals.reports.page import write_page
from evals.reports.results import result, summary, write_results
from evals.tasks import TASKS
from janus_jax import compilation_cache
from janus_jax.__main__ import mesh_of
from janus_jax.hub import resolve
from janus_jax.io import commands
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line, print_any_text, print_error, print_note
from janus_jax.io.stores import local_only
from janus_jax.io.whole.files import write_file
from janus_jax.loading import default_dtype, first_device, load
from janus_jax.pipeline import JanusPipeline
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import check_count
from janus_jax.sharding import MESH_AXES
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.quantize import FORMS
from janus_jax.weights.torch_weights import DTYPES

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
    how.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on CPU")
    how.add_argument("--weights", choices=FORMS, help="quantized weights in the decoder (default: as --dtype)")
    how.add_argument("--adapter", metavar="DIR", help="a low-rank adapter in PEFT's files")
    how.add_argument("--mesh", metavar="AXIS=N,...", help=f"device mesh over {', '.join(MESH_AXES)}")
    how.add_argument("--batch-size", type=int, metavar="N", help="questions at a time, a shard (default: what fits)")
    judge = parser.add_argument_group("a judge", "of replies that the rules do not decide, and of MM-Vet")
    judge.add_argument("--judge", metavar="URL", help="an endpoint with OpenAI's chat completions; the key is in "
                       "JUDGE_API_KEY or OPENAI_API_KEY")  # fmt: skip
    judge.add_argument("--judge-model", metavar="NAME", help="the model to ask there")
    several = parser.add_argument_group("several processes", "with --mesh over all their devices")
    several.add_argument("--coordinator", metavar="HOST:PORT", default="", help="host of process 0, and a free port")
    several.add_argument("--processes", metavar="N", type=int, help="number of processes")
    several.add_argument("--process", metavar="I", type=int, help="index of this process, from 0")
    return parser


def _run(args: argparse.Namespace) -> int:
    tasks = chosen(args.tasks, args.protocol)
    settings = _settings(args)
    if args.model is None and not args.rescore:
        raise ValueError("--model is missing; only --rescore works without one")
    hosts.start(args.coordinator, args.processes, args.process)
    if jax.process_count() > 1 and args.mesh is None and not args.rescore:
        raise ValueError(f"several processes need --mesh over all of their devices, such as data={jax.device_count()}")
    with hosts.together():  # before minutes of loading
        data = [task.load(args.data, protocol) for task, protocol in tasks]
        identity = _identity(args, settings.out)
    respondent = None if args.rescore else Respondent(_load(args), args.batch_size)
    done = []
    for (task, protocol), loaded in zip(tasks, data, strict=True):
        ask = None if respondent is None else respondent.ask
        evaluation = evaluate(task, protocol, loaded, settings, identity, ask)
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
    """What tells the model from others: of --model, or with --rescore what an earlier start has written.

    The folder of replies is of one model; replies of another are refused.
    """
    path = out / MODEL
    if args.rescore and not path.exists():
        raise ValueError(f"{one_line(path)} is missing: there is nothing to score; leave out --rescore")
    if args.model is None:
        return read_json_object(path)
    folder = resolve(args.model)
    weights = args.weights or open_checkpoint(folder, quantized=True).weights
    # A mesh is asked for its first device only when it is made, and its devices are alike.
    dtype = args.dtype or default_dtype(first_device(None))
    ours = model_identity(args.model, folder, dtype=dtype, weights=weights, adapter=args.adapter)
    if hosts.is_first():
        there = read_json_object(path, missing_ok=True)
        if there and (said := difference(there, ours)):
            raise ValueError(f"{one_line(out)} holds replies of another model: {said}; choose another --out")
        if not there:
            out.mkdir(parents=True, exist_ok=True)
            write_file(path, (json.dumps(ours, indent=1) + "\n").encode())
    return ours


def _load(args: argparse.Namespace) -> JanusPipeline:
    compilation_cache.enable()
    given = {name: getattr(args, name) for name in ("dtype", "weights", "adapter")}
    return load(args.model, mesh=mesh_of(args.mesh), **given)


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
