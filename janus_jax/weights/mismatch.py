"""Summarizes how two lists of tensors differ, in one line; names that differ only in numbers are grouped."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

from janus_jax.io.messages import one_line

_SHOWN = 12  # patterns in a message
_FIRST = 4  # patterns of each kind that come before the rest
_NUMBER = re.compile(r"(?<![0-9A-Za-z])\d{1,9}(?![0-9A-Za-z])|(?<=_)\d{1,9}(?=[./]|$)")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with the tensor `name`: a `kind` ('missing', 'unexpected', ...) and further detail."""

    kind: str
    name: str
    detail: str = ""


def summary(problems: Iterable[Problem]) -> str:
    """`problems` by pattern: 'missing: layers.{0..29}.q_proj.weight [4096, 4096] (30); unexpected: ...'."""
    groups: dict[tuple[str, str, str], list[list[int]]] = {}
    for problem in problems:
        pattern = _NUMBER.sub("\0", problem.name)
        numbers = [int(text) for text in _NUMBER.findall(problem.name)]
        groups.setdefault((problem.kind, pattern, problem.detail), []).append(numbers)
    # A few of each kind come first, so that missing names do not crowd out the unexpected ones.
    seen = collections.Counter()
    ranks = {}
    for group in groups:
        ranks[group] = seen[group[0]] // _FIRST
        seen[group[0]] += 1
    order = sorted(groups, key=ranks.get)
    lines = [_described(*group, groups[group]) for group in order[:_SHOWN]]
    more = sum(len(groups[group]) for group in order[_SHOWN:])
    return "; ".join(lines) + (f"; and {more:,} more" if more else "")


def _described(kind: str, pattern: str, detail: str, found: list[list[int]]) -> str:
    name, *rest = pattern.split("\0")
    for position, text in enumerate(rest):
        name += _range(sorted({numbers[position] for numbers in found})) + text
    count = f" ({len(found)})" if len(found) > 1 else ""
    return f"{kind}: {one_line(name)}{' ' if detail else ''}{detail}{count}"


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers[:6]))}{',...' if len(numbers) > 6 else ''}}}"
