"""MME: two questions about each picture, one of which is answered with yes."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.intervals import Figures, Ratio
from evals.items import Item, Judgements, Loaded, Predictions, Scores
from evals.prompts import LONGEST_REPLY, SINGLE_WORD, YES_OR_NO, yes_no
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.pictures import FilePicture
from evals.read.tsv import read_tsv
from evals.rules import yes_no as rules
from evals.tasks.common import Question, make_items, order_of, published
from evals.tasks.yes_no import JUDGED, YesNo, gold, no_gold, verdict
from janus_jax.io.files import read_text
from janus_jax.io.messages import one_line

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_NAMES = ("mme", "mmebenchmarkreleaseversion", "mmebenchmark")
_SUFFIXES = (".jpg", ".png", ".jpeg")
_EXPECTED = (
    "MME.tsv (VLMEvalKit: opencompass.openxlab.space/utils/VLMEval/MME.tsv)",
    "the folder MME_Benchmark_release_version (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models)",
    "the data set lmms-lab/MME in a folder of that name",
)
_RULES = {
    "report": rules.vlmevalkit,
    "vlmevalkit": rules.vlmevalkit,
    "lmms-eval": rules.first_characters,
    "official": rules.first_characters,
}
_TEXTS = {
    "report": lambda each: yes_no(each.question),
    "vlmevalkit": lambda each: yes_no(each.question),
    "lmms-eval": lambda each: f"\n{each.question.strip().replace(YES_OR_NO, '')}\n{SINGLE_WORD}",
    "official": lambda each: f"\n{each.question}",
}
_REPORTED = published(1338.0, 1444.0, 1567.1)
_PUBLISHED = {"report": _REPORTED, "vlmevalkit": {**_REPORTED, "Janus (VLMEvalKit #541)": 1342.4}}


class Mme(YesNo):
    """Fourteen categories, each with a score of at most 200: percent of questions, and of pictures with both right."""

    name, title, metric = "mme", "MME", "perception, of 2000"

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        tokens = {"lmms-eval": 16}.get(protocol, LONGEST_REPLY)
        return make_items(questions, _TEXTS[protocol], tokens, source)

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        judged = judged if protocol in JUDGED else None
        verdicts = {item.id: verdict(item, predictions[item.id], _RULES[protocol], judged) for item in items}
        groups: dict[tuple[str, str], list[float]] = {}
        for item in items:
            groups.setdefault((item.fields["category"], item.group), []).append(verdicts[item.id].score)
        figures, notes = Figures(len(groups)), []
        right = np.array([sum(scores) for scores in groups.values()])
        asked = np.array([len(scores) for scores in groups.values()], float)
        # As VLMEvalKit: the first two of a group.
        both = np.array([len(scores) > 1 and all(scores[:2]) for scores in groups.values()], float)
        pairs = (asked > 1).astype(float)
        if odd := int((asked != 2).sum()):
            notes.append(f"{odd} of {len(groups)} pictures do not have two questions")
        category = np.array([name for name, _ in groups], object)
        parts: dict[str, list[Ratio]] = {}
        for name in order_of(category, (*PERCEPTION, *COGNITION)):
            here = (category == name).astype(float)
            parts[name] = [Ratio(right * here, asked * here), Ratio(both * here, pairs * here)]
        for title, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
            there = [name for name in names if name in parts]
            where = np.isin(category, there)
            figures.add(title, [term for name in there for term in parts[name]], int(asked[where].sum()))
            if there and len(there) < len(names):
                notes.append(f"{title} is of {len(there)} categories of {len(names)}")
        for name, terms in parts.items():
            figures.add(name, terms, int(asked[category == name].sum()))
        figures.add("accuracy", Ratio(right, asked), int(asked.sum()))
        figures.add("accuracy+ (both questions of a picture)", Ratio(both, pairs), int(pairs.sum()))
        return Scores(figures.numbers(), verdicts, "perception", _PUBLISHED.get(protocol, {}), notes=notes)

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """The result files of MME's script: picture, question, answer and reply with tabs between, by category."""
        files: dict[str, str] = {}
        for item in items:
            row = [item.fields["picture"], item.fields["question"], item.fields["answer"].capitalize()]
            row.append(predictions.get(item.id) or "")
            name = f"{item.fields['category']}.txt"
            files[name] = files.get(name, "") + "\t".join(" ".join(cell.split()) for cell in row) + "\n"
        return files


# ---------------------------------------------------------------- the data's three formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, _NAMES)
    if table := places.first_file(where, places.tables(["MME"])):
        return [_from_row(row) for row in read_tsv(table, ("question", "answer", "category"), "MME")], one_line(table)
    for folder in where:
        if found := _official(folder):
            return found, one_line(folder)
    if files := places.parquet_files(where, _NAMES, "test"):
        columns = ("question_id", "question", "answer", "category")
        rows = read_parquet(files, columns, ("image",))
        return [
            _from_hub(row, number) for number, row in enumerate(rows)
        ], f"{len(files)} parquet files in {one_line(files[0].parent)}"
    raise places.missing("MME", data, _EXPECTED)


def _question(
    number: str, question: str, answer: str, images: Any, category: str, picture: str, group: str, problem: str = ""
) -> Question:
    fields = {"category": category, "picture": picture}
    return Question(number, question, gold(answer), images, problem, f"{category}/{group}", fields, no_gold(answer))


def _from_row(row: Any) -> Question:
    cells = row.cells
    # VLMEvalKit's scorer groups by image_path; a table without it has the same picture's key.
    picture = cells.get("image_path") or (row.images[0].key if row.images else row.index)
    texts = (cells.get(name, "") for name in ("question", "answer"))
    return _question(row.index, *texts, row.images, cells.get("category", ""), picture, picture, row.problem)


def _from_hub(row: dict[str, Any], number: int) -> Question:
    identity = str(row["question_id"])
    texts = (str(row[name]) for name in ("question", "answer"))
    picture = identity.rsplit("/", 1)[-1]
    return _question(str(number), *texts, row["image"], str(row["category"]), picture, identity)


def _official(folder: pathlib.Path) -> list[Question]:
    """A folder for each category, with a text beside each picture or in folders of their own."""
    found = []
    for category in (*PERCEPTION, *COGNITION):
        texts = folder / category / "questions_answers_YN"
        pictures = folder / category / "images"
        if not texts.is_dir():
            texts = pictures = folder / category
        for path in sorted(texts.glob("*.txt")):
            picture = places.first_file([pictures], [path.stem + suffix for suffix in _SUFFIXES])
            images = (FilePicture(picture),) if picture else ()
            problem = "" if picture else f"the picture of {one_line(path, 500)} is missing"
            for number, line in enumerate(read_text(path).splitlines()):
                question, tab, answer = line.rpartition("\t")
                if line.strip() and not tab:
                    raise ValueError(f"{one_line(path)}:{number + 1} has no tab between question and answer")
                if tab:
                    name = picture.name if picture else path.stem
                    identity = f"{category}/{path.stem}/{number + 1}"
                    found.append(_question(identity, question, answer, images, category, name, path.stem, problem))
    return found
