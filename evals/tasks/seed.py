"""SEED-Bench's questions about images: multiple choice."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from evals.intervals import Figures
from evals.items import ImageRef, Item, Judgements, JudgeRequest, Loaded, Predictions, Scores, Task
from evals.prompts import LETTER_DIRECTLY, LONGEST_REPLY, lettered, multiple_choice
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.pictures import FilePicture
from evals.read.tsv import read_tsv
from evals.rules import letters
from evals.tasks import choices
from evals.tasks.common import Question, make_items, order_of, published
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line

TYPES = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting"),
    *("Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding"),
)
_NAMES = ("seedbench", "seed")
_EXPECTED = (
    "SEEDBench_IMG.tsv (VLMEvalKit: opencompass.openxlab.space/utils/benchmarks/SEEDBench/SEEDBench_IMG.tsv)",
    "SEED-Bench.json with SEED-Bench-image beside it (github.com/AILab-CVC/SEED-Bench)",
    "the data set lmms-lab/SEED-Bench in a folder of that name",
)
_CHOICES = {"A": "choice_a", "B": "choice_b", "C": "choice_c", "D": "choice_d"}
_REPORTED = published(63.7, 68.3, 72.1)
_PUBLISHED = {
    "report": _REPORTED,
    "vlmevalkit": {"Janus (VLMEvalKit #541)": 63.8, "Janus-Pro-1B (VLMEvalKit #1570)": 67.28},
}


class Seed(Task):
    """Accuracy over all questions, and by the dimension that a question is about."""

    name, title, metric = "seed", "SEED-Bench (images)", "accuracy in percent"
    protocols = ("report", "vlmevalkit", "lmms-eval")
    absent: ClassVar[dict[str, str]] = {
        "official": "SEED-Bench's own evaluation compares likelihoods of the choices, not replies"
    }

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        if protocol == "lmms-eval":  # which reads the first character of a reply alone
            return make_items(questions, _lmms_text, 16, source)
        return make_items(questions, _text, LONGEST_REPLY, source)

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        verdicts = {}
        for item in items:
            reply = predictions[item.id]
            if protocol == "lmms-eval" and reply is not None:
                said = letters.first_character(reply)
                verdicts[item.id] = choices.plain_verdict(said, item.fields["answer"])
            else:
                verdicts[item.id] = choices.verdict(item, reply, judged)
        right = [verdicts[item.id].score for item in items]
        categories = np.array([item.fields["category"] for item in items], object)
        figures = Figures(len(items))
        figures.mean("accuracy", right)
        for name in order_of(filter(None, categories), TYPES):
            figures.mean(name, right, categories == name)
        return Scores(figures.numbers(), verdicts, "accuracy", _PUBLISHED.get(protocol, {}))

    def judge_requests(
        self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
    ) -> list[JudgeRequest]:
        return [] if protocol == "lmms-eval" else choices.requests(items, predictions)

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        return choices.parse(request, reply)


def _text(each: Question) -> str:
    return multiple_choice(each.question, each.fields["options"])


def _lmms_text(each: Question) -> str:
    return f"\n{each.question}\n{lettered(each.fields['options'])}\n{LETTER_DIRECTLY}"


# ---------------------------------------------------------------- the data's three formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, _NAMES)
    if table := places.first_file(where, places.tables(["SEEDBench_IMG"])):
        rows = read_tsv(table, ("question", "answer", "A", "B", "C", "D"), "SEEDBench_IMG")
        found = [
            _question(
                row.index, row.cells.get("question", ""), row.cells.get("answer", ""), row.images,
                choices.options_of(row.cells), row.cells.get("category", ""), row.problem,
            )
            for row in rows
        ]  # fmt: skip
        return found, one_line(table)
    if path := places.first_file(where, ["SEED-Bench.json"]):
        return _official(path, where)
    if files := places.parquet_files(where, _NAMES, "test"):
        columns = ("question", "answer", "data_type", "question_id", *_CHOICES.values())
        rows = read_parquet(files, columns, ("image",), ("question_type_id",))
        found = [_from_record(row, row["image"]) for row in rows if row["data_type"] == "image"]
        return found, f"{len(files)} parquet files in {one_line(files[0].parent)}{_videos(len(rows) - len(found))}"
    raise places.missing("SEED-Bench", data, _EXPECTED)


def _videos(count: int) -> str:
    return f" (without {count:,} questions about videos)" if count else ""


def _question(
    identity: str,
    question: str,
    answer: str,
    images: tuple[ImageRef, ...],
    options: dict[str, str],
    category: str,
    problem: str = "",
) -> Question:
    answer = answer.strip().upper()
    fields = {"options": options, "category": category}
    return Question(identity, question, answer, images, problem, "", fields, choices.no_option(answer, options))


def _from_record(row: Mapping[str, Any], images: tuple[ImageRef, ...], problem: str = "") -> Question:
    options = {letter: str(row[name]) for letter, name in _CHOICES.items() if row.get(name) is not None}
    kind = row.get("question_type_id")
    category = TYPES[kind - 1] if isinstance(kind, int) and 1 <= kind <= len(TYPES) else ""
    return _question(
        str(row["question_id"]), str(row["question"]), str(row["answer"]), images, options, category, problem
    )


def _official(path: pathlib.Path, where: Sequence[pathlib.Path]) -> tuple[list[Question], str]:
    rows = read_json_object(path, 1 << 30).get("questions")
    if not isinstance(rows, list):
        raise ValueError(f"{one_line(path)} has no list of questions")
    pictures = next((place / "SEED-Bench-image" for place in where if (place / "SEED-Bench-image").is_dir()), None)
    pictures = pictures or path.parent / "SEED-Bench-image"
    found = []
    for number, row in enumerate(rows):
        place = f"{one_line(path)}: question {number}"
        wanted = ("answer", "choice_a", "data_id", "data_type", "question", "question_id")
        absent = [key for key in wanted if not isinstance(row, dict) or key not in row]
        if absent:
            raise ValueError(f"{place} has no {', '.join(absent)}")
        if row["data_type"] != "image":
            continue
        name = str(row["data_id"])
        file = places.first_file([pictures], [name + suffix for suffix in ("", ".jpg", ".png")])
        problem = "" if file else f"the picture {one_line(pictures / name, 500)} is missing"
        found.append(_from_record(row, (FilePicture(file),) if file else (), problem))
    return found, f"{one_line(path)}{_videos(len(rows) - len(found))}"
