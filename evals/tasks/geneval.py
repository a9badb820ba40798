"""GenEval: pictures of objects, their number, colors and places, in which a detector looks for what was asked.

A reply is what detector and classifier of colors have seen in a picture, as `seen` writes it: the rules decide on it
anew whenever replies are scored.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from evals.generation.geneval import (
    CLASSES,
    PUBLISHED,
    ColorsOf,
    Detection,
    Result,
    check_prompt,
    kept,
    read_prompts,
    summarize,
    verdict,
)
from evals.generation.layouts import geneval_sample
from evals.generation.prompts import BENCHMARKS, Drawing
from evals.generation.task import DrawnTask
from evals.items import Item, Judgements, Loaded, Predictions, Scores, Verdict, answered
from evals.read.pictures import FilePicture
from evals.read.places import first_file, folders, missing
from janus_jax.io.files import parse_json, read_json
from janus_jax.io.messages import did_you_mean, one_line

_PROMPTS = "evaluation_metadata.jsonl"
_WHERE = f"{_PROMPTS} (github.com/djghosh13/geneval, prompts)"


class GenEval(DrawnTask):
    """Rules of the original, on what transformers' models have seen."""

    name, title, metric = "geneval", "GenEval, by transformers' models", "mean of six kinds of prompts, in percent"
    protocols = ("transformers",)
    classes: ClassVar[tuple[str, ...]] = CLASSES  # that the detector knows
    absent: ClassVar[dict[str, str]] = {
        "report": "the report's scorer is GenEval's own, with mmdet and open_clip; give it the folder of pictures",
        "official": "GenEval's own scorer has mmdet and open_clip; give it the folder of pictures",
    }

    def drawings(self, data: pathlib.Path) -> list[Drawing]:
        return BENCHMARKS[self.name][0](self._prompts(data), self.pictures, self.samples)

    def _prompts(self, data: pathlib.Path) -> pathlib.Path:
        places = [inner for place in folders(data, ("geneval",)) for inner in (place, place / "prompts")]
        found = first_file(places, (_PROMPTS,))
        if found is None:
            raise missing(self.title, data, (_WHERE,))
        return found

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        if self.given:
            rows = pictures_of(self.pictures)
            source = one_line(self.pictures)
        else:
            path = self._prompts(data)
            source = one_line(path)
            rows = [
                (geneval_sample(self.pictures, number, sample), row)
                for number, row in enumerate(read_prompts(path))
                for sample in range(self.samples)
            ]
        for path, row in rows:
            for name in {each["class"] for each in (*row["include"], *row.get("exclude", ()))} - set(self.classes):
                asked = f"{source}: the prompt of {path.parent.parent.name} asks for {one_line(name)!r}"
                raise ValueError(f"{asked}, which the detector does not know{did_you_mean(name, self.classes)}")
        items = [_item(path, row) for path, row in rows]
        prompts = len({item.group for item in items})
        return Loaded(items, [], f"{source}: {len(items):,} pictures of {prompts:,} prompts")

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        verdicts, results = {}, []
        for item in items:
            results.append(result := _result(item, predictions[item.id]))
            outcome = "right" if result.correct else "wrong"
            verdicts[item.id] = Verdict(result.reason, outcome, float(result.correct))
        theirs = ", ".join(f"{name} {figures['overall']:.0f}" for name, figures in PUBLISHED.items())
        notes = [f"published, by GenEval's own scorer: {theirs}"]
        return Scores(summarize(results), verdicts, "overall", {}, notes=notes)

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """results.jsonl, as the original's summary_scores.py reads it."""
        there, _ = answered(items, predictions)
        return {"results.jsonl": "".join(f"{_result(item, predictions[item.id]).line()}\n" for item in there)}


def _item(path: pathlib.Path, row: Mapping[str, Any]) -> Item:
    folder = path.parent.parent.name
    # The whole row: what is seen depends on it, and so replies to another one are refused.
    fields = {"question": row["prompt"], "answer": row["tag"], "row": row, "path": path}
    return Item(f"{folder}/{path.stem}", json.dumps(row), (FilePicture(path),), 0, fields, folder)


def seen(
    row: Mapping[str, Any],
    found: Mapping[str, Sequence[Detection]],
    colors_of: ColorsOf,
) -> str:
    """A reply: the objects that count in a picture, best first, and the colors of those that the prompt asks for.

    >>> seen({"tag": "x", "include": []}, {"cup": [Detection((0, 0, 4, 4), 0.5), Detection((0, 0, 4, 4), 0.2)]}, None)
    '{"objects": {"cup": [[0, 0, 4, 4, 0.5]]}, "colors": {}}'
    """
    objects = kept(found, row["tag"])
    asked = {}
    for clause in row["include"]:
        name = clause["class"]
        if "color" in clause and len(objects.get(name, ())) >= clause["count"]:
            asked[name] = max(clause["count"], asked.get(name, 0))
    colors = {name: list(colors_of(name, objects[name][:count])) for name, count in asked.items()}
    boxes = {name: [[*each.box, each.score] for each in there] for name, there in objects.items()}
    return json.dumps({"objects": boxes, "colors": colors})


def _result(item: Item, reply: str | None) -> Result:
    row, path = item.fields["row"], str(item.fields["path"])
    if reply is None:
        return Result(path, row, False, "the picture cannot be read", {})
    place = f"the reply to {item.id}"
    told = parse_json(reply, place)
    try:
        objects = {
            name: [Detection(tuple(box), score) for *box, score in there] for name, there in told["objects"].items()
        }
        correct, reason = verdict(objects, row, lambda name, there: told["colors"][name][: len(there)])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{place} is not what a detector has seen; remove the file of replies") from None
    return Result(path, row, correct, reason, objects)


def pictures_of(root: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """The pictures below `root` and their prompts, in order: `00000/metadata.jsonl`, `00000/samples/0000.png`.

    Raises: ValueError or OSError in one line for a folder without pictures, or metadata that is no prompt.
    """
    if not root.is_dir():
        raise ValueError(f"{one_line(root)} is not a folder")
    found = []
    for folder in sorted(each for each in root.iterdir() if each.is_dir() and re.fullmatch(r"\d+", each.name)):
        place = folder / "metadata.jsonl"
        prompt = read_json(place)
        check_prompt(prompt, one_line(place))
        samples = folder / "samples"
        files = [each for each in samples.iterdir() if re.fullmatch(r"\d+\.png", each.name)] if samples.is_dir() else []
        if not files:
            raise ValueError(f"{one_line(samples)} has no pictures such as 00000.png")
        found += [(each, prompt) for each in sorted(files)]
    if not found:
        raise ValueError(f"{one_line(root)} has no folders such as 00000 with GenEval's pictures")
    return found
