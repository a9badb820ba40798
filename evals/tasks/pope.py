"""POPE: is there such an object in the picture?"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.intervals import Figures, Ratio
from evals.items import Item, Judgements, Loaded, Predictions, Scores, Verdict
from evals.prompts import LONGEST_REPLY, SINGLE_WORD, YES_OR_NO, yes_no
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.pictures import FilePicture, is_file
from evals.read.tsv import read_tsv
from evals.rules import yes_no as rules
from evals.tasks.common import Question, make_items, order_of, published
from evals.tasks.yes_no import JUDGED, YesNo, gold, no_gold, verdict
from janus_jax.io.files import parse_json, read_text
from janus_jax.io.messages import one_line

SPLITS = ("random", "popular", "adversarial")
_NAMES = ("pope",)
_EXPECTED = (
    "POPE.tsv (VLMEvalKit: opencompass.openxlab.space/utils/VLMEval/POPE.tsv)",
    "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json (github.com/AoiDragon/POPE, in "
    "output/coco) with COCO's val2014 beside them (cocodataset.org)",
    "the data set lmms-lab/POPE in a folder of that name",
)
_EARLIER_RANDOM = 2910
_RULES = {
    "report": rules.vlmevalkit,
    "vlmevalkit": rules.vlmevalkit,
    "lmms-eval": rules.whole_reply,
    "official": rules.pope,
}


class Pope(YesNo):
    """Three splits of 3,000 questions. `category` of an item lists the splits that have it: they share questions."""

    name, title, metric = "pope", "POPE", "F1 in percent"

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        tokens = {"lmms-eval": 128}.get(protocol, LONGEST_REPLY)
        sizes = collections.Counter(split for each in questions for split in each.fields["category"])
        listed = ", ".join(f"{name} {sizes[name]:,}" for name in order_of(sizes, SPLITS))
        return make_items(questions, _TEXTS[protocol], tokens, f"{source} ({listed})")

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        judged = judged if protocol in JUDGED else None
        verdicts = {item.id: verdict(item, predictions[item.id], _RULES[protocol], judged) for item in items}
        figures = Figures(len(items))
        truth = np.array([item.fields["answer"] == "yes" for item in items], bool)
        said = np.array([_said(item, verdicts[item.id], predictions[item.id]) for item in items], object)
        right = np.array([verdicts[item.id].score for item in items])
        splits = order_of((name for item in items for name in item.fields["category"]), SPLITS)
        times = {name: np.array([item.fields["category"].count(name) for item in items], float) for name in splits}
        times["overall"] = sum(times.values(), np.zeros(len(items)))
        counts: dict[str, list[Ratio]] = {name: [] for name in ("F1", "accuracy", "precision", "recall", "yes")}
        for weight in times.values():
            hits, false = weight * (truth & (said == "yes")), weight * (~truth & (said == "yes"))
            # lmms-eval counts as missed only what is answered with no.
            missed = weight * truth * ((said == "no") if protocol == "lmms-eval" else (said != "yes"))
            counts["F1"].append(Ratio(2 * hits, 2 * hits + false + missed))
            counts["accuracy"].append(Ratio(weight * right, weight))
            counts["precision"].append(Ratio(hits, hits + false))
            counts["recall"].append(Ratio(hits, hits + missed))
            counts["yes"].append(Ratio(weight * (said == "yes"), weight))
        for metric, ratios in counts.items():
            for (name, weight), ratio in zip(times.items(), ratios, strict=True):
                figures.add(f"{metric} {name}", ratio, int(weight.sum()))
            if metric in ("F1", "accuracy"):
                mean = [Ratio(each.numerator, each.denominator, 100 / len(splits)) for each in ratios[:-1]]
                figures.add(f"{metric} mean of splits", mean, int(times["overall"].sum()))
        return Scores(figures.numbers(), verdicts, *_HEADLINES[protocol], notes=_notes(times))

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """The answer files of POPE's script: a JSON object on each line, in the order of the questions' numbers."""
        lines: dict[str, list[tuple[int, str]]] = {}
        for item in items:
            for split, number in item.fields["members"]:
                reply = predictions.get(item.id) or ""
                row = {"question": item.fields["question"], "answer": reply}
                lines.setdefault(split, []).append((number, json.dumps(row, ensure_ascii=False)))
        return {
            f"coco_pope_{split}_answers.json": "".join(f"{line}\n" for _, line in sorted(rows))
            for split, rows in lines.items()
        }


def _said(item: Item, found: Verdict, reply: str | None) -> str:
    # What could not be asked counts as the other answer, wrong in each figure.
    return {"yes": "no", "no": "yes"}[item.fields["answer"]] if reply is None else found.extracted


def _notes(times: Mapping[str, np.ndarray]) -> list[str]:
    notes = [f"the split {name} is not in the data" for name in SPLITS if name not in times]
    if "random" in times and times["random"].sum() == _EARLIER_RANDOM:
        notes.append("the split random is of POPE's earlier release, which LLaVA uses: 2,910 questions, now 3,000")
    return notes


_HEADLINES = {
    # The paper of Janus has the random split alone (VLMEvalKit's pull request 541); for Janus-Pro that is likely.
    "report": ("F1 random", published(87.0, 86.2, 87.4)),
    "vlmevalkit": ("F1 overall", {"Janus (VLMEvalKit #541)": 85.5, "Janus-Pro-1B (VLMEvalKit #1570)": 84.11}),
    "lmms-eval": ("F1 overall", {}),
    "official": ("F1 mean of splits", {}),
}
_TEXTS = {
    "report": lambda each: yes_no(each.question.replace(YES_OR_NO, "")),
    "vlmevalkit": lambda each: yes_no(each.question.replace(YES_OR_NO, "")),
    "lmms-eval": lambda each: f"\n{each.question.replace(YES_OR_NO, '').strip()}\n{SINGLE_WORD}",
    "official": lambda each: f"\n{each.question.replace(YES_OR_NO, '')}",
}


# ---------------------------------------------------------------- the data's three formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, (*_NAMES, "output", "coco"))
    if table := places.first_file(where, places.tables(["POPE"])):
        rows = read_tsv(table, ("question", "answer", "category"), "POPE")
        found = [
            Question(
                row.index,
                row.cells.get("question", ""),
                gold(row.cells.get("answer", "")),
                row.images,
                row.problem,
                fields=_splits([(name.strip(), position) for name in row.cells.get("category", "").split(",")]),
                flaw=no_gold(row.cells.get("answer", "")) or ("" if "category" in row.cells else "it has no category"),
            )
            for position, row in enumerate(rows)
        ]
        return found, one_line(table)
    if first := places.first_file(where, [f"coco_pope_{name}.json" for name in SPLITS]):
        return _official(data, first.parent), one_line(first.parent)
    files = [path for name in ("test", *SPLITS) for path in places.parquet_files(where, _NAMES, name)]
    if tests := [path for path in files if path.name.startswith("test")]:
        files = tests  # the same questions as in the three splits of the configuration Full
    if files:
        return _hub(files), f"{len(files)} parquet files in {one_line(files[0].parent)}"
    raise places.missing("POPE", data, _EXPECTED)


def _splits(members: list[tuple[str, int]]) -> dict[str, Any]:
    return {"category": [split for split, _ in members], "members": members}


def _official(data: pathlib.Path, folder: pathlib.Path) -> list[Question]:
    rows = []
    for split in SPLITS:
        path = folder / f"coco_pope_{split}.json"
        for number, line in enumerate(read_text(path).splitlines()):
            if not line.strip():
                continue
            place = f"{one_line(path)}:{number + 1}"
            row = parse_json(line, place)
            absent = [key for key in ("image", "text", "label") if not isinstance(row, dict) or key not in row]
            if absent:
                raise ValueError(f"{place} has no {', '.join(absent)}")
            rows.append((split, number, str(row["image"]), str(row["text"]), str(row["label"])))
    homes = (folder, *folder.parents[:3], data, data / "coco", data / "COCO", data / "coco" / "images")
    candidates = [each / inner for each in homes for inner in ("val2014", "")]
    pictures = (places.picture_folder(candidates, rows[0][2]) if rows else None) or folder / "val2014"
    absent = {name for name in {row[2] for row in rows} if not is_file(pictures / name)}
    merged: dict[tuple[str, str, str], Question] = {}
    for split, number, image, text, label in rows:
        known = merged.get((image, text, label))
        if known:
            known.fields["members"].append((split, number))
            known.fields["category"].append(split)
            continue
        problem = f"the picture {one_line(pictures / image, 500)} is missing" if image in absent else ""
        merged[image, text, label] = Question(
            f"{split}-{number + 1}", text, gold(label), (FilePicture(pictures / image),), problem,
            fields=_splits([(split, number)]), flaw=no_gold(label),
        )  # fmt: skip
    return list(merged.values())


def _hub(files: Sequence[pathlib.Path]) -> list[Question]:
    merged: dict[tuple[str, str, str], Question] = {}
    for position, row in enumerate(read_parquet(files, ("question", "answer", "category"), ("image",))):
        split, text, label = (str(row[name]) for name in ("category", "question", "answer"))
        key = (row["image"][0].key if row["image"] else "", text, label)
        if known := merged.get(key):
            known.fields["members"].append((split, position))
            known.fields["category"].append(split)
            continue
        merged[key] = Question(
            str(position), text, gold(label), row["image"], fields=_splits([(split, position)]), flaw=no_gold(label)
        )
    return list(merged.values())
