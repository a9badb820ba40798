"""MMMU, its validation split: questions of 30 subjects, multiple choice and open, with several pictures."""

from __future__ import annotations

import ast
import json
import pathlib
import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.intervals import Figures
from evals.items import ImageRef, Item, Judgements, JudgeRequest, Loaded, Predictions, Scores, Task, Verdict
from evals.prompts import LETTER_DIRECTLY, LONGEST_REPLY, SINGLE_WORD, lettered, multiple_choice
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.tsv import read_tsv
from evals.rules import mmmu as rules
from evals.tasks import choices
from evals.tasks.common import Question, make_items, order_of, published
from janus_jax.io.messages import one_line

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"),
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
        *("Materials", "Mechanical_Engineering"),
    ),
}
_SUBJECTS = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
_SPLIT = "validation"
_NAMES = ("mmmu",)
_EXPECTED = (
    "MMMU_DEV_VAL.tsv (VLMEvalKit: opencompass.openxlab.space/utils/VLMEval/MMMU_DEV_VAL.tsv)",
    "the data set MMMU/MMMU or lmms-lab/MMMU in a folder of that name",
)
_MARKER = re.compile(r"<image (\d+)>")
_IDENTITY = re.compile(r"^[a-z]+_(.+?)_\d+$")  # validation_Accounting_1
_OTHER = "Other Answers"
_PUBLISHED = {
    "report": published(30.5, 36.3, 41.0),
    "vlmevalkit": {"Janus (VLMEvalKit #541)": 31.2, "Janus-Pro-1B (VLMEvalKit #1570)": 34.89},
}
# MMMU's own script sets its seed once; lmms-eval's chance is the process's, whose seed is 0.
_CHANCE = {"official": 42, "lmms-eval": 0}


class Mmmu(Task):
    """Accuracy over the questions of the validation split, by discipline and by subject, each question alike."""

    name, title, metric = "mmmu", "MMMU (validation)", "accuracy in percent"
    protocols = ("report", "vlmevalkit", "lmms-eval", "official")

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        if protocol != "vlmevalkit":
            left_out = sum(each.fields["split"] != _SPLIT for each in questions)
            questions = [each for each in questions if each.fields["split"] == _SPLIT]
            source += f" (without {left_out} of other splits)" if left_out else ""
        if protocol in ("lmms-eval", "official"):
            for each in questions:
                each.images = _mentioned(each)
        tokens = {"lmms-eval": 128, "official": 128}.get(protocol, LONGEST_REPLY)
        return make_items(questions, _TEXTS[protocol], tokens, source)

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        if protocol in _CHANCE:
            verdicts, drawn = _official_verdicts(items, predictions, protocol)
            notes = [f"{drawn} letters are drawn by chance, with seed {_CHANCE[protocol]}"] if drawn else []
        else:
            verdicts = {item.id: choices.verdict(item, predictions[item.id], judged) for item in items}
            notes = []
        right = np.array([verdicts[item.id].score for item in items])
        figures = Figures(len(items))
        kinds = np.array([item.fields["kind"] for item in items], object)
        splits = np.array([item.fields["split"] for item in items], object)
        subjects = np.array([item.fields["category"] for item in items], object)
        disciplines = np.array([item.fields["discipline"] for item in items], object)
        for split in order_of(splits, (_SPLIT,)):
            figures.mean(split, right, splits == split)
        here = splits == _SPLIT
        parts = ((kinds, ("multiple-choice", "open")), (disciplines, tuple(DISCIPLINES)), (subjects, tuple(_SUBJECTS)))
        for values, known in parts:
            for name in order_of(filter(None, values), known):
                figures.mean(name, right, here & (values == name))
        return Scores(figures.numbers(), verdicts, _SPLIT, _PUBLISHED.get(protocol, {}), notes=notes)

    def judge_requests(
        self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
    ) -> list[JudgeRequest]:
        return [] if protocol in _CHANCE else choices.requests(items, predictions)

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        return choices.parse(request, reply)

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """What MMMU's main_eval_only.py reads: a letter, or an open reply as it is, by the question's id."""
        chosen, _ = _official_verdicts(items, {item.id: predictions.get(item.id) for item in items}, "official")
        made = {
            item.fields["identity"]: predictions.get(item.id) or ""
            if item.fields["kind"] == "open"
            else chosen[item.id].extracted
            for item in items
        }
        return {"total_val_output.json": json.dumps(made, ensure_ascii=False, indent=1)}


def _official_verdicts(
    items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
) -> tuple[dict[str, Verdict], int]:
    """By MMMU's rules, and how many letters were drawn by chance."""
    chance, drawn, verdicts = random.Random(_CHANCE[protocol]), 0, {}
    for item in items:
        reply = predictions[item.id]
        if reply is None:
            verdicts[item.id] = Verdict("", "wrong", 0.0)
        elif item.fields["kind"] == "open":
            right = rules.open_answer_is_right(reply, _golds(item.fields["answer"]))
            said = " | ".join(map(str, rules.open_answers(reply)))
            verdicts[item.id] = Verdict(said, "right" if right else "wrong", float(right))
        else:
            said, by_chance = rules.letter(reply, item.fields["options"], chance, lmms=protocol == "lmms-eval")
            drawn += by_chance
            verdicts[item.id] = choices.plain_verdict(said, item.fields["answer"])
    return verdicts, drawn


def _golds(answer: str) -> list[str]:
    """Gold answers of an open question: a text, or a list of them as Python writes it."""
    return _literal_list(answer) or [answer]


def _literal_list(text: str) -> list[str]:
    if not text.startswith("["):
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(each) for each in value] if isinstance(value, list) else []


def _mentioned(each: Question) -> tuple[ImageRef, ...]:
    """The pictures that question and options mention, each once, in order; all of them if none is mentioned."""
    text = " ".join((each.question, *each.fields["options"].values()))
    mentioned = {int(number) for number in _MARKER.findall(text)}
    chosen = tuple(image for number, image in zip(_numbers(each), each.images, strict=True) if number in mentioned)
    return chosen or each.images


def _numbers(each: Question) -> list[int]:
    """The numbers by which a question's pictures are mentioned."""
    return each.fields.get("numbers") or list(range(1, len(each.images) + 1))


def _text(each: Question) -> str:
    return multiple_choice(each.question, each.fields["options"], each.fields["hint"])


def _lmms_text(each: Question) -> str:
    if each.fields["kind"] == "open":
        return f"\n{each.question}\n\n{SINGLE_WORD}"
    return f"\n{each.question}\n{lettered(each.fields['options'])}\n\n{LETTER_DIRECTLY}"


def _official_text(each: Question) -> str:
    if each.fields["kind"] == "open":
        return f"\n{each.question}\n\n{SINGLE_WORD}"
    return f"\n{each.question}\n\n{lettered(each.fields['options'], '({}) {}')}\n\n{LETTER_DIRECTLY}"


_TEXTS = {"report": _text, "vlmevalkit": _text, "lmms-eval": _lmms_text, "official": _official_text}


# ---------------------------------------------------------------- the data's two formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, _NAMES)
    if table := places.first_file(where, places.tables(["MMMU_DEV_VAL"])):
        rows = read_tsv(table, ("question", "answer", "A", "B", "category", "split"), "MMMU_DEV_VAL")
        found = []
        for row in rows:
            cells = row.cells
            options = choices.options_of(cells)
            fields = _fields(cells.get("id", row.index), options, cells.get("category", ""), cells.get("split", ""))
            fields |= {"hint": cells.get("hint", ""), "discipline": cells.get("l2-category") or fields["discipline"]}
            texts = cells.get("question", ""), cells.get("answer", "")
            found.append(_question(row.index, *texts, row.images, fields, row.problem))
        return found, one_line(table)
    if files := places.parquet_files(where, _NAMES, _SPLIT):
        columns = ("id", "question", "options", "answer", "question_type")
        pictures = [f"image_{number}" for number in range(1, 8)]
        found = []
        for row in read_parquet(files, columns, pictures):
            identity, kind = str(row["id"]), str(row["question_type"])
            raw = row["options"]
            listed = raw if isinstance(raw, list) else _literal_list(str(raw))
            options = dict(zip(string.ascii_uppercase, map(str, listed), strict=False)) if kind != "open" else {}
            subject = _IDENTITY.match(identity)
            fields = _fields(identity, options, subject[1] if subject else "", _SPLIT)
            there = [name for name in pictures if row.get(name)]
            fields["numbers"] = [int(name[-1]) for name in there]
            images = tuple(row[name][0] for name in there)
            found.append(_question(identity, str(row["question"]), str(row["answer"]), images, fields))
        return found, f"{len(files)} parquet files in {one_line(files[0].parent)}"
    raise places.missing("MMMU", data, _EXPECTED)


def _fields(identity: str, options: dict[str, str], subject: str, split: str) -> dict[str, Any]:
    kind = "multiple-choice" if options else "open"
    discipline = _SUBJECTS.get(subject.replace(" ", "_"), "")
    return {
        **{"identity": identity, "options": options, "category": subject, "split": split, "kind": kind},
        **{"discipline": discipline, "hint": ""},
    }


def _question(
    index: str, question: str, answer: str, images: Any, fields: dict[str, Any], problem: str = ""
) -> Question:
    options = fields["options"]
    flaw = "" if answer.strip() else "it has no answer"
    if not flaw and "A" in options:
        flaw = choices.no_option(answer, options)
    # VLMEvalKit scores a question without a first option as a choice between its answer and any other.
    if "A" not in options:
        fields["scored_options"] = dict(sorted({**options, "A": answer, "B": _OTHER}.items()))
        fields["scored_answer"] = answer if answer in [*string.ascii_uppercase] else "A"
    return Question(index, question, answer, images, problem, fields=fields, flaw=flaw)
