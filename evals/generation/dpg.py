"""DPG-Bench: questions about a drawn picture, each of which counts only if those it depends on are answered with yes.

Rules of the original (compute_dpg_bench.py of TencentQQGYLab/ELLA), with its two quirks as a switch. Who answers the
questions belongs beside every figure: the published ones are mPLUG's.
"""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.intervals import Figures, Ratio
from evals.items import Number
from janus_jax.io.files import read_text
from janus_jax.io.messages import did_you_mean, one_line

BROAD = ("global", "entity", "attribute", "relation", "other")
PUBLISHED = {
    "Janus": dict(zip(("overall", *BROAD), (79.68, 82.33, 87.38, 87.70, 85.46, 86.41), strict=True)),
    "Janus-Pro-1B": dict(zip(("overall", *BROAD), (82.63, 87.58, 88.63, 88.17, 88.98, 88.30), strict=True)),
    "Janus-Pro-7B": dict(zip(("overall", *BROAD), (84.19, 86.90, 88.90, 89.40, 89.32, 89.48), strict=True)),
}
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
_MAX_CSV = 256 << 20


@dataclass(frozen=True)
class Question:
    """A question about a picture; `parents` are the numbers of those it depends on."""

    number: int
    text: str
    parents: tuple[int, ...]
    category: str  # "entity - whole"


def read_questions(path: pathlib.Path, quirks: bool = False) -> dict[str, list[Question]]:
    """The questions of dpg_bench.csv by item, whose rows follow each other.

    With `quirks` the first row is skipped, as the original does by mistake; its item then lacks a question that others
    depend on, and fails in `score`. ValueError names the line of a row that cannot be used.
    """
    reader = csv.reader(io.StringIO(read_text(path, _MAX_CSV), newline=""))
    header = next(reader, [])
    if absent := [name for name in _COLUMNS if name not in header]:
        hints = "".join(did_you_mean(name, header) for name in absent)
        raise ValueError(f"{one_line(path)} has no column {', '.join(absent)}{hints}")
    found: dict[str, list[Question]] = {}
    last, first = None, True
    for cells in reader:
        if not any(cells):
            continue
        place = f"{one_line(path)}:{reader.line_num}"
        row = dict(zip(header, cells, strict=False))
        if quirks and first:
            first = False
            continue
        first = False
        try:
            number = int(row["proposition_id"])
            parents = tuple(int(each) for each in row["dependency"].split(","))
        except (KeyError, ValueError):
            raise ValueError(f"{place}: proposition_id and dependency must be whole numbers") from None
        category = row.get("tuple", "").split("(")[0].strip()
        question = Question(number, row.get("question_natural_language", ""), parents, category)
        item = row["item_id"]
        if item != last:
            found[item] = []
        last = item
        found[item] = [each for each in found[item] if each.number != number] + [question]
    return found


def score(questions: Sequence[Question], answers: Mapping[int, str]) -> tuple[float, dict[int, float]]:
    """The score of one tile, 0 to 1, and of each question by itself, whatever it depends on.

    `answers` are replies by the number of the question; only exactly "yes" is yes. A question becomes 0 if one that it
    depends on is 0, in the order of the questions, so that zeros spread to those behind. ValueError for a question that
    depends on one that is not there, or has no answer.
    """
    if absent := [each.number for each in questions if each.number not in answers]:
        raise ValueError(f"no answer to question {absent[0]}")
    alone = {each.number: float(answers[each.number] == "yes") for each in questions}
    scores = dict(alone)
    for each in questions:
        for parent in each.parents:
            if parent == 0:
                continue
            if parent not in scores:
                raise ValueError(f"question {each.number} depends on question {parent}, which is not there")
            if scores[parent] == 0:
                scores[each.number] = 0.0
                break
    return sum(scores.values()) / len(scores), alone


@dataclass(frozen=True)
class Picture:
    """The replies about a drawn item, by tile."""

    item: str
    tiles: Sequence[Mapping[int, str]]


def summarize(
    questions: Mapping[str, Sequence[Question]], pictures: Sequence[Picture], quirks: bool = False
) -> tuple[dict[str, Number], dict[str, str]]:
    """Figures in percent, and why pictures are left out, by item.

    `overall` is the mean of the pictures' scores, which are those of their tiles. Categories are means over questions
    by themselves: of all tiles, or with `quirks` of the last tile alone, as the original counts them by mistake.
    """
    scored, failed = [], {}
    for picture in pictures:
        own = questions.get(picture.item)
        try:
            if own is None:
                raise ValueError("there are no questions about it")
            if not picture.tiles:
                raise ValueError("it has no tiles")
            scored.append((own, [score(own, tile) for tile in picture.tiles]))
        except ValueError as error:
            failed[picture.item] = str(error)
    figures = Figures(len(scored))
    figures.mean("overall", [np.mean([value for value, _ in tiles]) for _, tiles in scored])
    counted = [(own, tiles[-1:] if quirks else tiles) for own, tiles in scored]
    for title, members in _categories({each.category for own, _ in scored for each in own}):
        sums, counts = np.zeros(len(scored)), np.zeros(len(scored))
        for position, (own, tiles) in enumerate(counted):
            chosen = [each.number for each in own if each.category in members]
            sums[position] = sum(alone[number] for _, alone in tiles for number in chosen)
            counts[position] = len(chosen) * len(tiles)
        figures.add(title, Ratio(sums, counts), int(counts.sum()))
    return figures.numbers(), failed


def _categories(names: set[str]) -> list[tuple[str, set[str]]]:
    """Titles and what belongs to them: the parts before the hyphen, then the whole names ("entity - whole")."""
    broad: dict[str, set[str]] = {}
    for name in names:
        broad.setdefault(name.split("-")[0].strip(), set()).add(name)
    order = [name for name in BROAD if name in broad] + sorted(broad.keys() - set(BROAD))
    return [(name, broad[name]) for name in order] + [(name, {name}) for name in sorted(names - broad.keys())]
