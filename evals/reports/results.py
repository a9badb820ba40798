"""results.json and report.md: figures with their intervals, beside published ones."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from evals.evaluate import Evaluation
from evals.items import Number
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file

RESULTS, TABLE = "results.json", "report.md"
FORMAT = 1
_MOST_PROBLEMS = 100  # named; all are counted


def result(evaluation: Evaluation, wrong: bool) -> dict[str, Any]:
    """An evaluation as results.json has it; `wrong`: whether items that could not be asked count as wrong."""
    scores, task = evaluation.scores, evaluation.task
    answered = sum(reply is not None for reply in evaluation.replies.values())
    return {
        "title": task.title,
        "metric": task.metric,
        "source": evaluation.loaded.source,
        "items": len(evaluation.loaded.items) + len(evaluation.loaded.problems),
        "answered": answered,
        "problems": len(evaluation.problems),
        "problems_are": "wrong" if wrong else "left out",
        "first_problems": [
            {"id": problem.id, "reason": problem.reason} for problem in evaluation.problems[:_MOST_PROBLEMS]
        ],
        "judge": evaluation.judge,
        "unjudged": len(evaluation.unjudged),
        "silent": sum(name not in evaluation.replies for name in evaluation.unjudged),
        "headline": scores.headline,
        "numbers": {
            name: {"value": number.value, "count": number.count, "low": number.low, "high": number.high}
            for name, number in scores.numbers.items()
        },
        "published": dict(scores.published),
        "notes": list(scores.notes),
    }


def write_results(out: pathlib.Path, identity: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds `new`, results by task and protocol, to those of the same model in `out`, and writes both files."""
    path = out / RESULTS
    known = read_json_object(path, missing_ok=True).get("tasks", {})
    tasks = dict(known) if isinstance(known, dict) else {}
    for task, protocols in new.items():
        tasks[task] = {**tasks.get(task, {}), **protocols}
    content = {"format": FORMAT, "model": dict(identity), "tasks": tasks}
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode())
    write_file(out / TABLE, table(identity, tasks).encode("utf-8", "backslashreplace"))


def table(identity: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """report.md: a row for each benchmark beside the published figures, then all figures of each."""
    every = [(task, protocol, found) for task, own in tasks.items() for protocol, found in own.items()]
    others = list(dict.fromkeys(model for _, _, found in every for model in found["published"]))
    how = ", ".join(f"{name} {value}" for name, value in identity.items() if name in ("dtype", "weights", "adapter"))
    lines = [
        f"# {_cell(identity.get('model', ''))}",
        "",
        f"{how}; 95% intervals by a bootstrap over items. Figures of others are as published, each measured with its "
        "authors' settings.",
        "",
        _row("benchmark", "protocol", "figure", "here", "items", *others),
        "|" + "---|" * (5 + len(others)),
    ]
    for _, protocol, found in every:
        theirs = (_short(found["published"].get(model)) for model in others)
        here = f"{_headline(found)}{' (partial)' if partial(found) else ''}"
        lines.append(_row(found["title"], protocol, found["headline"], here, _items(found), *theirs))
    for _, protocol, found in every:
        lines += ["", f"## {_cell(found['title'])}, protocol {protocol}", "", _cell(found["source"]), ""]
        lines += [f"- {_cell(note)}" for note in (*remarks(found), *found["notes"])]
        lines += ["", _row("figure", "value", "over"), "|---|---|---|"]
        for name, values in found["numbers"].items():
            number = Number(**values)
            lines.append(_row(name, interval(number), f"{number.count:,}"))
    return "\n".join(lines) + "\n"


def partial(found: Mapping[str, Any]) -> bool:
    """Whether the figures are not over all items of the data."""
    counted = found["answered"] + (found["problems"] if found["problems_are"] == "wrong" else 0)
    return counted < found["items"] or found["unjudged"] > 0


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the figures."""
    said = []
    if found["problems"]:
        first = found["first_problems"][0]
        said.append(
            f"{found['problems']:,} items could not be asked and are {found['problems_are']}; the first is "
            f"{first['id']}: {first['reason']}"
        )
    silent = found.get("silent", 0)
    left = found["items"] - found["answered"] - found["problems"] - silent
    if left > 0:
        said.append(f"{left:,} items have not been asked")
    if found["judge"]:
        said.append(f"judged by {found['judge']}")
    if silent:
        said.append(f"{silent:,} questions have no reply of the judge; what they are about is left out")
    if unjudged := found["unjudged"] - silent:
        said.append(f"{unjudged:,} replies are unjudged, and do not count as right")
    return said


def interval(number: Number) -> str:
    """A figure with its 95% interval, such as `86.2 (85.1 to 87.0)`."""
    if number.low is None or number.high is None:
        return _short(number.value)
    return f"{_short(number.value)} ({_short(number.low)} to {_short(number.high)})"


def _headline(found: Mapping[str, Any]) -> str:
    """The figure that reports publish; there is none where nothing is judged yet."""
    values = found["numbers"].get(found["headline"])
    return interval(Number(**values)) if values else "not judged"


def summary(task: str, protocol: str, found: Mapping[str, Any]) -> str:
    """One line for the console."""
    theirs = ", ".join(f"{model} {_short(value)}" for model, value in found["published"].items())
    beside = f"; published: {theirs}" if theirs else ""
    mark = " (partial)" if partial(found) else ""
    return f"{task} ({protocol}): {found['headline']} {_headline(found)} over {_items(found)} items{mark}{beside}"


def _items(found: Mapping[str, Any]) -> str:
    return f"{found['answered']:,}" if not partial(found) else f"{found['answered']:,} of {found['items']:,}"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: Any) -> str:
    return one_line(text, 500).replace("|", "\\|")
