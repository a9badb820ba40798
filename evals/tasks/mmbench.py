"""MMBench dev in English: multiple choice, each question once for each rotation of its options."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from evals.intervals import Figures, Ratio
from evals.items import Item, Judgements, JudgeRequest, Loaded, Predictions, Scores, Task, Verdict
from evals.prompts import LETTER_DIRECTLY, LONGEST_REPLY, lettered, multiple_choice
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.tsv import read_tsv
from evals.rules import letters
from evals.tasks import choices
from evals.tasks.common import Question, make_items, order_of, published
from janus_jax.io.messages import one_line

ROTATION = 10**6  # a rotated copy's index is its question's plus a multiple of this
_ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_TABLES = ("MMBench_DEV_EN", "MMBench_DEV_EN_V11", "mmbench_dev_en_20231003", "mmbench_dev_20230712")
_NAMES = ("mmbench", "mmbenchen")
_EXPECTED = (
    "MMBench_DEV_EN.tsv (VLMEvalKit: opencompass.openxlab.space/utils/benchmarks/MMBench/MMBench_DEV_EN.tsv)",
    "the data set lmms-lab/MMBench in a folder of that name",
)
_VARIANTS = ("vanilla-first", "vanilla-all", "circular")
# The authors: without circular mode (VLMEvalKit's pull request 541), which is over every row of the table.
_HEADLINES = {
    "report": ("vanilla-all", published(69.4, 75.5, 79.2)),
    "vlmevalkit": ("circular", {}),
    "lmms-eval": ("circular", {"Janus-Pro-7B (Janus #205)": 65.81}),
}
_LMMS_SEED, _LMMS_CHOICES = 2680, "ABCDE"


class MmBench(Task):
    """`vanilla-first` is over the questions, `vanilla-all` over all rotations, `circular` needs all rotations right."""

    name, title, metric = "mmbench", "MMBench dev (English)", "accuracy in percent"
    protocols = ("report", "vlmevalkit", "lmms-eval")
    absent: ClassVar[dict[str, str]] = {"official": "MMBench's own evaluation is VLMEvalKit's; take vlmevalkit"}

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        if protocol == "lmms-eval":
            return make_items(questions, _lmms_text, 1024, source)
        return make_items(questions, _text, LONGEST_REPLY, source)

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        notes: list[str] = []
        if protocol == "lmms-eval":
            verdicts, drawn = _lmms_verdicts(items, predictions)
            if drawn:
                notes.append(f"{drawn} letters are drawn by chance, as lmms-eval does where its judge fails")
        else:
            verdicts = {item.id: choices.verdict(item, predictions[item.id], judged) for item in items}
        groups: dict[str, list[Item]] = {}
        for item in items:
            groups.setdefault(item.group, []).append(item)
        scores = [[verdicts[item.id].score for item in group] for group in groups.values()]
        first = [next((item for item in group if item.id == item.group), None) for group in groups.values()]
        based = np.array([each is not None for each in first], float)
        if rootless := int((based == 0).sum()):
            notes.append(f"{rootless} groups of rotations lack their question, and are in vanilla-all alone")
        right = {
            "vanilla-first": np.array([verdicts[each.id].score if each else 0.0 for each in first]),
            "vanilla-all": np.array([sum(group) for group in scores]),
            "circular": based * np.array([all(group) for group in scores]),
        }
        asked = {"vanilla-first": based, "vanilla-all": np.array([len(g) for g in scores], float), "circular": based}
        figures = Figures(len(groups))
        for name in _VARIANTS:
            figures.add(name, Ratio(right[name], asked[name]), int(asked[name].sum()))
        headline, reported = _HEADLINES[protocol]
        heads = [group[0].fields for group in groups.values()]
        abilities = np.array([_ABILITIES.get(each["ability"], each["ability"]) for each in heads], object)
        categories = np.array([each["category"] for each in heads], object)
        for variant in _VARIANTS:
            for name in order_of(filter(None, abilities), tuple(_ABILITIES.values())):
                _part(figures, f"{variant} {name}", right[variant], asked[variant], abilities == name)
        for name in order_of(filter(None, categories)):
            _part(figures, f"{headline} {name}", right[headline], asked[headline], categories == name)
        return Scores(figures.numbers(), verdicts, headline, reported, notes=notes)

    def judge_requests(
        self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
    ) -> list[JudgeRequest]:
        return [] if protocol == "lmms-eval" else choices.requests(items, predictions)

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        return choices.parse(request, reply)


def _part(figures: Figures, name: str, right: np.ndarray, asked: np.ndarray, where: np.ndarray) -> None:
    figures.add(name, Ratio(right * where, asked * where), int(asked[where].sum()))


def _lmms_verdicts(items: Sequence[Item], predictions: Mapping[str, str | None]) -> tuple[dict[str, Verdict], int]:
    """Where no letter is found and the group is not lost yet, one by chance, in the order of the indices."""
    said = {}
    groups: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda each: int(each.id) if each.id.isdigit() else 0):
        reply = predictions[item.id]
        said[item.id] = "" if reply is None else letters.lmms_mmbench(reply.strip(), item.fields["options"])
        groups.setdefault(item.group, []).append(item)
    chance, drawn = random.Random(_LMMS_SEED), 0
    for group in groups.values():
        if any(said[item.id] not in ("", item.fields["answer"]) for item in group):
            continue
        for item in group:
            if said[item.id] or predictions[item.id] is None:
                continue
            said[item.id] = _LMMS_CHOICES[chance.randint(0, len(_LMMS_CHOICES) - 1)]
            drawn += 1
            if said[item.id] != item.fields["answer"]:
                break
    return {item.id: choices.plain_verdict(said[item.id], item.fields["answer"]) for item in items}, drawn


def _text(each: Question) -> str:
    return multiple_choice(each.question, each.fields["options"], each.fields["hint"])


def _lmms_text(each: Question) -> str:
    start = f"{each.fields['hint']} " if each.fields["hint"] else ""
    options = lettered({letter: text for letter, text in each.fields["options"].items() if letter in _LMMS_CHOICES})
    return f"\n{start}{each.question} There are several options:\n{options}\n\n{LETTER_DIRECTLY}"


# ---------------------------------------------------------------- the data's two formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, _NAMES)
    if table := places.first_file(where, places.tables(_TABLES)):
        rows = read_tsv(table, ("question", "answer", "A", "B", "category"), "MMBench")
        return [_question(row.index, row.cells, row.images, row.problem) for row in rows], one_line(table)
    if files := places.parquet_files(where, _NAMES, "dev", "en"):
        columns = ("index", "question", "answer", "A", "B", "category")
        rows = read_parquet(files, columns, ("image",), ("hint", "C", "D", "E", "L2-category"))
        found = []
        for row in rows:
            # Missing texts are there as the word.
            cells = {name: str(cell) for name, cell in row.items() if cell is not None and str(cell) not in ("", "nan")}
            cells["l2-category"] = cells.get("L2-category", "")
            found.append(_question(str(row["index"]), cells, row["image"]))
        return found, f"{len(files)} parquet files in {one_line(files[0].parent)}"
    raise places.missing("MMBench", data, _EXPECTED)


def _question(index: str, cells: Mapping[str, str], images: Any, problem: str = "") -> Question:
    answer = cells.get("answer", "").strip()
    options = choices.options_of(cells)
    fields = {
        "options": options,
        "hint": cells.get("hint", ""),
        "category": cells.get("category", ""),
        "ability": cells.get("l2-category", ""),
    }
    group = str(int(index) % ROTATION) if index.isdigit() else index
    flaw = choices.no_option(answer, options)
    return Question(index, cells.get("question", ""), answer, images, problem, group, fields, flaw)
