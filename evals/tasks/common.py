"""What the benchmarks' modules share: items from rows, replies that are there, published figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.items import ImageRef, Item, Loaded, Problem
from evals.prompts import conversation

JANUS, PRO_1B, PRO_7B = "Janus", "Janus-Pro-1B", "Janus-Pro-7B"


def published(janus: float, pro_1b: float, pro_7b: float) -> dict[str, float]:
    """Figures of the reports."""
    return {JANUS: janus, PRO_1B: pro_1b, PRO_7B: pro_7b}


@dataclass
class Question:
    """A question of a benchmark in any of its formats, before a protocol makes a prompt of it."""

    id: str
    question: str
    answer: str
    images: tuple[ImageRef, ...]
    problem: str = ""  # why it cannot be asked
    group: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    flaw: str = ""  # why no reply to it could be scored


def make_items(
    questions: Iterable[Question],
    text: Callable[[Question], str],
    tokens: int,
    source: str,
    system: str = "",
    needs_picture: bool = True,
) -> Loaded:
    """Items whose prompts have the user's text `text(question)`; ValueError if there are none at all."""
    items, problems, seen = [], [], set()
    for each in questions:
        if each.id in seen:
            raise ValueError(f"{source}: the question {each.id} is there twice")
        seen.add(each.id)
        reason = each.flaw or each.problem or ("" if each.images or not needs_picture else "it has no picture")
        fields = {"question": each.question, "answer": each.answer, **each.fields}
        try:
            prompt = conversation(text(each), len(each.images), system)
        except ValueError as error:
            prompt, reason = "", reason or str(error)
        item = Item(each.id, prompt, each.images, tokens, fields, each.group or each.id)
        if reason:
            problems.append(Problem(each.id, reason, None if each.flaw else item))
        else:
            items.append(item)
    if not items and not problems:
        raise ValueError(f"{source}: there are no questions in it")
    found = f"{len(items):,} questions"
    if problems:
        found += f", {len(problems):,} more cannot be asked"
    return Loaded(items, problems, f"{source}: {found}")


def order_of(values: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """The distinct `values`: those in `known` in its order, then the others sorted."""
    there = set(values)
    return [value for value in known if value in there] + sorted(there - set(known))
