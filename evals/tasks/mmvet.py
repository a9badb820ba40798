"""MM-Vet: open questions, whose replies a judge compares with the answers."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.intervals import Figures
from evals.items import Attempt, Item, Judgements, JudgeRequest, Loaded, Number, Predictions, Scores, Task, Verdict
from evals.prompts import LONGEST_REPLY, THINK_STEP_BY_STEP
from evals.read import places
from evals.read.parquet import read_parquet
from evals.read.pictures import FilePicture, ZipPicture, read_member, zip_members
from evals.read.tsv import read_tsv
from evals.tasks.common import Question, make_items, order_of, published
from janus_jax.io.files import MAX_JSON, parse_json, read_json_object
from janus_jax.io.messages import one_line

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_NAMES = ("mmvet",)
_EXPECTED = (
    "MMVet.tsv (VLMEvalKit: opencompass.openxlab.space/utils/VLMEval/MMVet.tsv)",
    "mm-vet.zip, or the folder mm-vet of it (github.com/yuweihao/MM-Vet)",
    "the data set lmms-lab/MMVet in a folder of that name",
)
_LMMS_START = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
_RUNS = {"official": 5}
_AGAIN = "\nPredict the correctness of the answer (digit): "
_MEME = (
    "This meme is poking fun at the fact that the names of the countries{n}Iceland and Greenland are misleading. "
    "Despite its name, Iceland is known for its beautiful green landscapes,{n}while Greenland is mostly covered in ice "
    "and snow. The meme is saying that the person has trust issues{n}because the names of these countries do not "
    "accurately represent their landscapes. |{n}"
)
# `{n}` is where VLMEvalKit's copy breaks lines.
_JUDGE = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction.{n}"
    "<AND> in the ground truth means it is totally right{n}only when all elements in the ground truth are present in "
    "the prediction,{n}and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction.{n}The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right).{n}Just complete the last space of the correctness score.\n{head} | Ground truth | Prediction | "
    "Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"Can you explain this meme? | {_MEME}"
    "The meme talks about Iceland and Greenland. It's pointing out that despite their names,{n}Iceland is not very icy "
    "and Greenland isn't very green. | 0.4\n"
    f"Can you explain this meme? | {_MEME}"
    "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names.{n}Iceland, despite "
    "its name, has lush green landscapes while Greenland is mostly covered in ice and snow.{n}The text 'This is why I "
    "have trust issues' is a playful way to suggest{n}that these contradictions can lead to distrust or confusion.{n}"
    "The humor in this meme is derived from the unexpected contrast between the names of the countries{n}and their "
    "actual physical characteristics. | 1.0\n"
)
_PUBLISHED = {
    "report": published(34.3, 39.8, 50.0),
    "vlmevalkit": {"Janus (VLMEvalKit #541)": 36.8, "Janus-Pro-1B (VLMEvalKit #1570, GPT-4.1)": 36.7},
}


class MmVet(Task):
    """Mean score of the replies that are judged, by capability and by each set of capabilities.

    The judges of protocols differ: `report` and `official` ask as MM-Vet's evaluator does (gpt-4-0613; the paper five
    times), `vlmevalkit` and `lmms-eval` as those tools do.
    """

    name, title, metric = "mmvet", "MM-Vet", "judged score in percent"
    protocols = ("report", "vlmevalkit", "lmms-eval", "official")
    needs_judge = True

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        questions, source = _questions(data)
        start = _LMMS_START if protocol == "lmms-eval" else ""
        return make_items(
            questions,
            lambda each: f"\n{start}{each.question}",
            1024 if protocol == "lmms-eval" else LONGEST_REPLY,
            source,
            THINK_STEP_BY_STEP if protocol in ("report", "vlmevalkit") else "",
        )

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        judged, runs = judged or {}, _RUNS.get(protocol, 1)
        verdicts, scored, each_run = {}, [], []
        for item in items:
            keys = [_key(item, run) for run in range(runs)]
            if predictions[item.id] is None:
                scores = [0.0] * runs
            elif all(key in judged for key in keys):
                scores = [float(judged[key]) for key in keys]
            else:
                verdicts[item.id] = Verdict("", "unjudged", 0.0)
                continue
            mean = sum(scores) / runs
            said = ", ".join(f"{score:g}" for score in scores)
            verdicts[item.id] = Verdict("" if predictions[item.id] is None else said, "scored", mean)
            scored.append(item)
            each_run.append(scores)
        numbers = _numbers(scored, [verdicts[item.id].score for item in scored])
        if runs > 1 and scored:
            totals = 100 * np.array(each_run).mean(axis=0)
            numbers["standard deviation of the total over runs"] = Number(float(totals.std()), runs)
        notes = []
        if left := len(items) - len(scored):
            notes.append(f"{left} of {len(items)} replies are not judged, and are left out of the figures")
        return Scores(numbers, verdicts, "total", _PUBLISHED.get(protocol, {}), notes=notes)

    def judge_requests(
        self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
    ) -> list[JudgeRequest]:
        return [
            JudgeRequest(_key(item, run), item, _attempts(item, reply, protocol), 0.0, protocol)
            for run in range(_RUNS.get(protocol, 1))
            for item in items
            if (reply := predictions.get(item.id)) is not None
        ]

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        # VLMEvalKit takes a reply that is a number and nothing else; the others its first word.
        try:
            score = float(reply if request.form == "vlmevalkit" else reply.split(" ")[0].strip())
        except ValueError:
            return None
        return score if 0 <= score <= 1 and not math.isnan(score) else None

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """The results file of the official evaluator (whyu/MM-Vet_Evaluator): replies by the question's id."""
        made = {item.fields["identity"]: predictions.get(item.id) or "" for item in items}
        return {"mm-vet-results.json": json.dumps(made, ensure_ascii=False, indent=1)}


def _key(item: Item, run: int) -> str:
    return f"{item.id} run {run + 1}" if run else item.id


def _attempts(item: Item, reply: str, protocol: str) -> list[Attempt]:
    gold = item.fields["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join((item.fields["question"], gold, reply, ""))
    if protocol == "vlmevalkit":
        text = f"\n{_JUDGE.format(n=chr(10), head=chr(10) + 'Question')}\n{row}"
        return [_attempt(text, 0.5 * number, 2048) for number in range(5)]
    if protocol == "lmms-eval":
        # Its header names a variable, and there is no blank line before it.
        text = f"{_JUDGE.format(n=' ', head='gpt_query_prompt')}\n{row.rstrip(' ')}"
        return [_attempt(text, 0.5 * number, 128) for number in range(5)]
    text = f"{_JUDGE.format(n=' ', head=chr(10) + 'Question')}\n{row}"
    again = [_attempt(text + _AGAIN, 0.5 * number, 3) for number in range(4)]
    return [_attempt(text, 0.0, 3), *again]


def _attempt(text: str, temperature: float, tokens: int) -> Attempt:
    return Attempt([{"role": "user", "content": text}], temperature, tokens)


def _numbers(items: Sequence[Item], scores: Sequence[float]) -> dict[str, Number]:
    figures = Figures(len(items))
    figures.mean("total", scores)
    sets = [item.fields["capabilities"] for item in items]
    for name in order_of((each for one in sets for each in one), CAPABILITIES):
        figures.mean(name, scores, [name in each for each in sets])
    # A set of capabilities is one whatever the order in which a question lists them.
    titles = {frozenset(each): "_".join(each) for each in reversed(sets)}
    for known, title in sorted(titles.items(), key=lambda pair: (-sum(set(one) == pair[0] for one in sets), pair[1])):
        figures.mean(f"only {title}", scores, [set(each) == known for each in sets])
    return figures.numbers()


# ---------------------------------------------------------------- the data's three formats


def _questions(data: pathlib.Path) -> tuple[list[Question], str]:
    where = places.folders(data, _NAMES)
    if table := places.first_file(where, places.tables(["MMVet"])):
        rows = read_tsv(table, ("question", "answer", "category"), "MMVet")
        found = []
        for position, row in enumerate(rows):
            texts = (row.cells.get(name, "") for name in ("question", "answer", "category"))
            # The official ids are numbered in the order of the table.
            identity = f"v1_{position}" if row.index.isdigit() else row.index
            found.append(_question(row.index, *texts, row.images, identity, row.problem))
        return found, one_line(table)
    if path := places.first_file(where, ["mm-vet.json"]):
        folder = path.parent / "images"
        there = {each.name: FilePicture(each) for each in folder.iterdir()} if folder.is_dir() else {}
        return _official(read_json_object(path), there, one_line(path)), one_line(path)
    if path := places.first_file(where, ["mm-vet.zip"]):
        members = {pathlib.PurePosixPath(name).name: name for name in zip_members(path)}
        if "mm-vet.json" not in members:
            raise ValueError(f"{one_line(path)} has no mm-vet.json in it")
        raw = parse_json(read_member(path, members["mm-vet.json"], MAX_JSON), f"mm-vet.json in {one_line(path)}")
        if not isinstance(raw, dict):
            raise ValueError(f"mm-vet.json in {one_line(path)} is not a JSON object")
        pictures = {name: ZipPicture(path, member) for name, member in members.items()}
        return _official(raw, pictures, f"mm-vet.json in {one_line(path)}"), one_line(path)
    if files := places.parquet_files(where, _NAMES, "test"):
        columns = ("question_id", "question", "answer", "capability")
        found = []
        for row in read_parquet(files, columns, ("image",)):
            texts = [str(row[name]) for name in columns]
            found.append(_question(*texts, row["image"], texts[0]))
        return found, f"{len(files)} parquet files in {one_line(files[0].parent)}"
    raise places.missing("MM-Vet", data, _EXPECTED)


def _official(raw: Mapping[str, Any], pictures: Mapping[str, Any], place: str) -> list[Question]:
    found = []
    for identity, row in raw.items():
        wanted = ("imagename", "question", "answer", "capability")
        absent = [key for key in wanted if not isinstance(row, dict) or key not in row]
        if absent:
            raise ValueError(f"{place}: the question {one_line(identity)} has no {', '.join(absent)}")
        name = str(row["imagename"])
        problem = "" if name in pictures else f"the picture images/{one_line(name)} is missing beside {place}"
        images = (pictures[name],) if name in pictures else ()
        listed = row["capability"]
        category = ",".join(map(str, listed)) if isinstance(listed, list) else str(listed)
        texts = str(row["question"]), str(row["answer"])
        found.append(_question(identity, *texts, category, images, identity, problem))
    return found


def _question(
    index: str, question: str, answer: str, category: str, images: Any, identity: str, problem: str = ""
) -> Question:
    capabilities = tuple(each.strip() for each in category.split(",") if each.strip())
    return Question(
        index, question, answer, images, problem, fields={"capabilities": capabilities, "identity": identity}
    )
