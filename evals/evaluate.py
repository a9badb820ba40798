"""One benchmark from its data to its scores: asked, stored as it goes, judged, scored, exported."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from evals.asking.answers import Replies
from evals.asking.identity import difference, prompts_identity
from evals.asking.store import Lines, read_lines
from evals.hosts import is_first, together
from evals.items import Item, Loaded, Problem, Scores, Task
from evals.judging import Judge, judgements
from evals.progress import Progress
from evals.tasks import TASKS
from janus_jax.io.messages import did_you_mean, one_line
from janus_jax.io.whole.files import write_file
from janus_jax.processes import from_first

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """How benchmarks are evaluated.

    Attributes:
      out: the folder of replies and reports.
      limit: the most items to ask, in whole groups; None for all.
      unreadable_wrong: whether items that cannot be asked count as wrong, instead of being left out.
      judge: who judges what the rules cannot decide; None for nobody.
      progress: whether to show a bar; None in a terminal.
    """

    out: pathlib.Path
    limit: int | None = None
    unreadable_wrong: bool = False
    judge: Judge | None = None
    progress: bool | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a benchmark came to.

    Attributes:
      items: those that were to be asked.
      replies: by item id; those without one have not been asked.
      problems: items that could not be asked, from the data or while asking.
      unjudged: ids of judgements, or of items, that a judge was asked for and has not given.
    """

    task: Task
    protocol: str
    loaded: Loaded
    items: list[Item]
    replies: dict[str, str | None]
    problems: list[Problem]
    scores: Scores
    unjudged: list[str]
    judge: str | None


def chosen(names: str, protocol: str | None) -> list[tuple[Task, str]]:
    """The tasks of a comma-separated list, each with its protocol: the one that is named, or its own default.

    Raises: ValueError in one line for an unknown task or protocol, with the nearest known.
    """
    found: dict[str, tuple[Task, str]] = {}
    for name in (name.strip() for name in names.split(",")):
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise ValueError(f"unknown task {one_line(name) or '(empty)'}{did_you_mean(name, TASKS)}; known: {known}")
        task = TASKS[name]
        if protocol is not None:
            task.check_protocol(protocol)
        found[name] = (task, protocol or task.protocols[0])
    return list(found.values())


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first groups of `items` with at most `limit` of them (but at least one group), in their order."""
    if limit is None:
        return list(items)
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.group] = sizes.get(item.group, 0) + 1
    kept, total = set(), 0
    for group, size in sizes.items():
        if kept and total + size > limit:
            break
        kept.add(group)
        total += size
    return [item for item in items if item.group in kept]


def evaluate(
    task: Task,
    protocol: str,
    loaded: Loaded,
    settings: Settings,
    identity: Mapping[str, Any],
    ask: Callable[[Sequence[Item]], Iterator[Replies]] | None,
) -> Evaluation:
    """Asks what has no reply yet, and scores all replies.

    On several processes all of them call this; the first one reads and writes the files in `settings.out`.

    Args:
      loaded: `task.load` of the data and the protocol.
      identity: what tells the model from others, see `identity.model_identity`.
      ask: `Respondent.ask` of the model; None scores the replies that are there.
    Raises: ValueError or OSError in one line: for data that is missing or damaged, replies of another model or other
      prompts, a file that cannot be written.
    """
    items = limited(loaded.items, settings.limit)
    folder = settings.out / task.name
    path = predictions_path(settings.out, task, protocol)
    header = {"format": FORMAT, "task": task.name, "protocol": protocol, "prompts": prompts_identity(loaded)}
    problems = list(loaded.problems)
    if ask is None:
        replies, more, unjudged = _stored(path, header, identity), [], []
    else:
        replies, more, unjudged = _asked(path, {**header, **identity}, task, items, ask, settings)
    problems += more
    replies = {item.id: replies[item.id] for item in items if item.id in replies}
    if settings.unreadable_wrong:
        groups = {item.group for item in items}
        lacking = [problem.item for problem in loaded.problems if problem.item is not None]
        items = items + [item for item in lacking if settings.limit is None or item.group in groups]
        wanted = {item.id for item in items}
        replies |= {problem.id: None for problem in problems if problem.id in wanted}
    if not replies and not unjudged:
        first = f"; the first: {problems[0].id}: {problems[0].reason}" if problems else ""
        raise ValueError(f"{task.name}: there is nothing to score, {len(problems):,} items could not be asked{first}")
    judged = None
    if settings.judge is not None and is_first():
        requests = task.judge_requests(items, replies, protocol)
        where = folder / f"judgements-{protocol}.jsonl"
        about = {**header, "judge": settings.judge.model}
        judged, more_unjudged = judgements(task, requests, settings.judge, where, about, settings.progress)
        unjudged += more_unjudged
    scores = task.score(items, replies, protocol, judged)
    if is_first():
        for name, text in task.export(items, replies, protocol).items():
            place = folder / f"export-{protocol}" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, text.encode("utf-8", "backslashreplace"))
    judge = None if settings.judge is None else settings.judge.model
    return Evaluation(task, protocol, loaded, items, replies, problems, scores, unjudged, judge)


def predictions_path(out: pathlib.Path, task: Task, protocol: str) -> pathlib.Path:
    """The file of a benchmark's replies in the folder `out`."""
    return out / task.name / f"predictions-{protocol}.jsonl"


def _stored(path: pathlib.Path, header: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, str | None]:
    """Replies that an earlier evaluation has left."""
    if not path.exists():
        raise ValueError(f"{one_line(path)} is missing: there are no predictions to score; leave out --rescore")
    there, lines = read_lines(path)
    check_header(path, there, {**header, **identity}, "score it with the data and protocol that it was made with")
    return {name: line["reply"] for name, line in lines.items()}


def check_header(path: pathlib.Path, there: Mapping[str, Any], wanted: Mapping[str, Any], cure: str) -> None:
    if said := difference({name: value for name, value in there.items() if name in wanted}, wanted):
        raise ValueError(f"{one_line(path)} holds replies of another evaluation: {said}; {cure}")


def _asked(
    path: pathlib.Path,
    header: Mapping[str, Any],
    task: Task,
    items: Sequence[Item],
    ask: Callable[[Sequence[Item]], Iterator[Replies]],
    settings: Settings,
) -> tuple[dict[str, str | None], list[Problem], list[str]]:
    lines, known = None, None
    with together():
        if is_first():
            lines = Lines(path, header, "choose another --out, or remove that file")
            known = {name: line["reply"] for name, line in lines.known.items()}
    replies: dict[str, str | None] = from_first(known)
    left = [item for item in items if item.id not in replies]
    problems: list[Problem] = []
    unjudged: list[str] = []
    try:
        with Progress(task.name, len(items), len(items) - len(left), settings.progress and is_first()) as progress:
            for batch in ask(left):
                with together():
                    if lines is not None:
                        lines.append({"id": name, "reply": text} for name, text in batch.texts.items())
                replies |= batch.texts
                problems += batch.problems
                unjudged += batch.unjudged
                progress.add(len(batch.texts) + len(batch.problems) + len(batch.unjudged))
    finally:
        if lines is not None:
            lines.__exit__()
    return replies, problems, unjudged
