"""GQA, the balanced questions of its test-dev: answers of one word or a phrase."""

from __future__ import annotations

import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.intervals import Figures
from evals.items import Item, Judgements, Loaded, Predictions, Scores, Task, Verdict
from evals.prompts import LONGEST_REPLY, SINGLE_WORD
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.pictures import FilePicture, is_file
from evals.read.tsv import read_tsv
from evals.tasks.common import Question, make_items, order_of, published
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line

_NAMES = ("gqa", "questions", "questions12")
_EXPECTED = (
    "GQA_TestDev_Balanced.tsv (VLMEvalKit: opencompass.openxlab.space/utils/VLMEval/GQA_TestDev_Balanced.tsv)",
    "testdev_balanced_questions.json with the folder images (cs.stanford.edu/people/dorarad/gqa)",
    "the data set lmms-lab/GQA in a folder of that name",
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What is compared with the gold answer, which is treated alike except by the last.
EXACT, BARE, PERIOD = "exact match", "exact match without punctuation", "exact match without a last period"
_MADE = {
    EXACT: lambda text: text.strip().lower(),
    BARE: lambda text: text.strip().lower().translate(_NO_PUNCTUATION),
    PERIOD: lambda text: text.strip().rstrip(".").lower(),
}
_HEADLINES = {
    # How the authors ran GQA is unpublished; the wrapper of their other figures has a prompt for it.
    "report": (EXACT, published(59.1, 59.3, 62.0)),
    "vlmevalkit": (EXACT, {}),
    "lmms-eval": (BARE, {}),
    "official": (PERIOD, {}),
}
_TOKENS = {"lmms-eval": 16, "official": 128}


class Gqa(Task):
    """Exact match, without synonyms, in three tools' treatments of a reply."""

    name, title, metric = "gqa", "GQA (test-dev, balanced)", "exact match in percent"
    protocols = ("report", "vlmevalkit", "lmms-eval", "official")

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        # VLMEvalKit's prompt for this benchmark is the dataset's, which its wrapper joins to the picture as it is.
        start = "" if protocol in ("report", "vlmevalkit") else "\n"
        return make_items(
            questions,
            lambda each: f"{start}{each.question}\n{SINGLE_WORD}",
            _TOKENS.get(protocol, LONGEST_REPLY),
            source,
        )

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        headline, reported = _HEADLINES[protocol]
        right = {name: [_matches(name, item, predictions[item.id]) for item in items] for name in _MADE}
        figures = Figures(len(items))
        for name, values in right.items():
            figures.mean(name, values)
        for kind in ("structural", "semantic"):
            types = np.array([item.fields["types"].get(kind) for item in items], object)
            for name in order_of(filter(None, types)):
                figures.mean(f"{kind} {name}", right[headline], types == name)
        verdicts = {}
        for item, matched in zip(items, right[headline], strict=True):
            said = _MADE[headline](predictions[item.id] or "")
            verdicts[item.id] = Verdict(said, "right" if matched else "wrong", float(matched))
        return Scores(figures.numbers(), verdicts, headline, reported)

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """The list that GQA's eval.py reads."""
        rows = [{"questionId": item.id, "prediction": _MADE[PERIOD](predictions.get(item.id) or "")} for item in items]
        return {"testdev_balanced_predictions.json": json.dumps(rows, ensure_ascii=False, indent=1)}


def _matches(name: str, item: Item, reply: str | None) -> bool:
    gold = item.fields["answer"]
    return reply is not None and _MADE[name](reply) == (gold if name == PERIOD else _MADE[name](gold))


# ---------------------------------------------------------------- the data's three formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, _NAMES)
    if table := places.first_file(where, places.tables(["GQA_TestDev_Balanced"])):
        rows = read_tsv(table, ("question", "answer"), "GQA_TestDev_Balanced")
        found = [
            _question(row.index, row.cells.get("question", ""), row.cells.get("answer", ""), row.images, row.problem)
            for row in rows
        ]
        return found, one_line(table)
    if path := places.first_file(where, ["testdev_balanced_questions.json"]):
        return _official(path, where), one_line(path)
    if files := places.parquet_files(where, _NAMES, "testdev", "testdev_balanced_instructions"):
        pictures = places.parquet_files(where, _NAMES, "testdev", "testdev_balanced_images")
        if not pictures:
            raise ValueError(f"GQA: {one_line(files[0].parent)} has no testdev_balanced_images beside it")
        images = {str(row["id"]): row["image"] for row in read_parquet(pictures, ("id",), ("image",))}
        found = []
        for row in read_parquet(files, ("id", "imageId", "question", "answer"), (), ("types",)):
            name = str(row["imageId"])
            problem = (
                "" if name in images else f"{row['place']} refers to the picture {one_line(name)}, which is not there"
            )
            texts = (str(row[key]) for key in ("id", "question", "answer"))
            found.append(_question(*texts, images.get(name, ()), problem, row.get("types")))
        return found, f"{len(files)} parquet files in {one_line(files[0].parent)}"
    raise places.missing("GQA", data, _EXPECTED)


def _question(identity: str, question: str, answer: str, images: Any, problem: str = "", types: Any = None) -> Question:
    flaw = "" if answer.strip() else "it has no answer"
    known = {kind: name for kind, name in types.items() if isinstance(name, str)} if isinstance(types, dict) else {}
    return Question(identity, question, answer, images, problem, fields={"types": known}, flaw=flaw)


def _official(path: pathlib.Path, where: Sequence[pathlib.Path]) -> list[Question]:
    homes = [inner for place in (path.parent, path.parent.parent, *where) for inner in (place, place / "allImages")]
    pictures = next((home / "images" for home in homes if (home / "images").is_dir()), path.parent / "images")
    found, there = [], {}
    for identity, row in read_json_object(path, 1 << 30).items():
        absent = [key for key in ("question", "imageId", "answer") if not isinstance(row, dict) or key not in row]
        if absent:
            raise ValueError(f"{one_line(path)}: the question {one_line(identity)} has no {', '.join(absent)}")
        file = pictures / f"{row['imageId']}.jpg"
        if file not in there:
            there[file] = is_file(file)
        problem = "" if there[file] else f"the picture {one_line(file, 500)} is missing"
        images = (FilePicture(file),) if there[file] else ()
        found.append(_question(identity, str(row["question"]), str(row["answer"]), images, problem, row.get("types")))
    return found
