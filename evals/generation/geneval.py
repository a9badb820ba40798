"""GenEval: whether a picture shows the objects of its prompt, by what a detector finds in it.

Rules of the original (evaluate_images.py and summary_scores.py of djghosh13/geneval). The detector and the classifier
of colors are whoever's: this module decides on what they found. Which ones it was belongs beside every figure, since
the thresholds were chosen for the original's.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from evals.intervals import Figures, Ratio
from evals.items import Number
from janus_jax.io.files import parse_json, read_text
from janus_jax.io.messages import one_line

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# GenEval's names of COCO's 80 classes, by their number.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck"),
    *("boat", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard"),
    *("sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle"),
    *("wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
RELATIONS = ("left of", "right of", "above", "below")
# Figures of the reports; the settings they were drawn with are not published.
PUBLISHED = {
    "Janus": {"overall": 61.0, **dict(zip(TAGS, (97.0, 68.0, 30.0, 84.0, 46.0, 42.0), strict=True))},
    "Janus-Pro-1B": {"overall": 73.0, **dict(zip(TAGS, (98.0, 82.0, 51.0, 89.0, 65.0, 56.0), strict=True))},
    "Janus-Pro-7B": {"overall": 80.0, **dict(zip(TAGS, (99.0, 89.0, 59.0, 90.0, 79.0, 66.0), strict=True))},
}
_BACKGROUND = "#999"


@dataclass(frozen=True)
class Thresholds:
    """The original's options: a score must exceed `score` (for counting `counting`), `most` objects of a class count.

    `overlap` drops an object whose overlap with a better one of its class is at least that; 1 drops none. `position`
    is how much of the two objects' sizes their distance must exceed.
    """

    score: float = 0.3
    counting: float = 0.9
    most: int = 16
    overlap: float = 1.0
    position: float = 0.1


@dataclass(frozen=True)
class Detection:
    """An object: `box` is (left, top, right, bottom) in pixels, `mask` an array [H, W] of bool, if there is one."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


# For a class and some of its objects, the color of each.
ColorsOf = Callable[[str, Sequence[Detection]], Sequence[str]]


def read_prompts(path: pathlib.Path) -> list[dict[str, Any]]:
    """The prompts of evaluation_metadata.jsonl: an object on each line, checked. ValueError names a bad line."""
    found = []
    for number, line in enumerate(read_text(path).splitlines()):
        if line.strip():
            place = f"{one_line(path)}:{number + 1}"
            row = parse_json(line, place)
            check_prompt(row, place)
            found.append(row)
    if not found:
        raise ValueError(f"{one_line(path)} has no prompts")
    return found


def check_prompt(row: Any, place: str) -> None:
    """ValueError, which names `place`, if `row` is not one of GenEval's prompts."""
    if problem := _problem(row):
        raise ValueError(f"{place}: {problem}")


def _problem(row: Any) -> str:
    if not isinstance(row, dict):
        return "not a JSON object"
    if absent := [key for key in ("tag", "prompt", "include") if key not in row]:
        return f"it has no {', '.join(absent)}"
    if not isinstance(row["prompt"], str) or not isinstance(row["tag"], str):
        return "tag and prompt must be texts"
    for name in ("include", "exclude"):
        clauses = row.get(name, [])
        if not isinstance(clauses, list):
            return f"{name} must be a list"
        for number, clause in enumerate(clauses):
            known = isinstance(clause, dict) and isinstance(clause.get("class"), str)
            if not known or type(clause.get("count")) is not int:
                return f"{name} {number} must have a class and a count"
            if "color" in clause and clause["color"] not in COLORS:
                return f"{name} {number} has the color {one_line(clause['color'])!r}; known: {', '.join(COLORS)}"
            if "position" in clause and not _is_position(clause["position"], number):
                known_ones = ", ".join(RELATIONS)
                return f"{name} {number} must have as position one of {known_ones} and the number of an earlier object"
    return ""


def _is_position(position: Any, number: int) -> bool:
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and type(target) is int and 0 <= target < number


# ---------------------------------------------------------------- one picture


def kept(
    found: Mapping[str, Sequence[Detection]], tag: str, thresholds: Thresholds | None = None
) -> dict[str, list[Detection]]:
    """The objects that count, best first, by class; classes without any are left out."""
    thresholds = thresholds or Thresholds()
    least = thresholds.counting if tag == "counting" else thresholds.score
    chosen = {}
    for name, objects in found.items():
        # Of equal scores the later one is first, as in the original.
        order = np.argsort([each.score for each in objects], kind="stable")[::-1]
        left = [objects[position] for position in order if objects[position].score > least][: thresholds.most]
        best: list[Detection] = []
        while left:
            best.append(left.pop(0))
            if thresholds.overlap != 1:
                left = [each for each in left if overlap(best[-1].box, each.box) < thresholds.overlap]
        if best:
            chosen[name] = best
    return chosen


def verdict(
    objects: Mapping[str, Sequence[Detection]],
    prompt: Mapping[str, Any],
    colors_of: ColorsOf,
    thresholds: Thresholds | None = None,
) -> tuple[bool, str]:
    """Whether `objects`, as `kept` gives them, are what `prompt` asks for, and why not, a reason on each line.

    Colors and positions are those of the best objects, as many as the prompt asks for.
    """
    thresholds, reasons = thresholds or Thresholds(), []
    groups: list[Sequence[Detection] | None] = []
    for clause in prompt.get("include", []):
        name, count = clause["class"], clause["count"]
        there = list(objects.get(name, []))[:count]
        reason = ""
        if len(there) < count:
            reason = f"expected {name}>={count}, found {len(there)}"
        elif "color" in clause:
            reason = _wrong_color(clause, list(colors_of(name, there)))
        if not reason and "position" in clause:
            reason = _wrong_position(clause, there, groups, thresholds)
        groups.append(None if reason else there)
        reasons += [reason] if reason else []
    for clause in prompt.get("exclude", []):
        name, count = clause["class"], clause["count"]
        if (number := len(objects.get(name, []))) >= count:
            reasons.append(f"expected {name}<{count}, found {number}")
    return not reasons, "\n".join(reasons)


def _wrong_color(clause: Mapping[str, Any], colors: Sequence[str]) -> str:
    color, count = clause["color"], clause["count"]
    if (right := colors.count(color)) >= count:
        return ""
    others = ", ".join(f"{colors.count(each)} {each}" for each in COLORS if each in colors)
    return f"expected {color} {clause['class']}>={count}, found {right} {color}; and {others}"


def _wrong_position(
    clause: Mapping[str, Any],
    there: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    thresholds: Thresholds,
) -> str:
    relation, target = clause["position"]
    if (targets := groups[target]) is None:
        return f"no target for {clause['class']} to be {relation}"
    for one in there:
        for other in targets:
            true = relations(one.box, other.box, thresholds.position)
            if relation not in true:
                told = " and ".join(each for each in RELATIONS if each in true)
                return f"expected {clause['class']} {relation} target, found {told} target"
    return ""


def relations(one: Sequence[float], other: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Where the box `one` is relative to `other`: none, one or two of `RELATIONS`.

    On each axis, the distance of the centers less `threshold` of both sizes; what is left must be more than half of the
    whole distance.
    """
    first, second = (np.asarray(box[:4], float).reshape(2, 2) for box in (one, other))
    offset = first.mean(axis=0) - second.mean(axis=0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    rest = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(rest) < 1e-3):
        return set()
    x, y = rest / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes whose right and bottom pixels belong to them."""
    inner = (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    shared = _area(inner)
    union = _area(one) + _area(other) - shared
    return shared / union if union else 0.0


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


# ---------------------------------------------------------------- what detector and classifier need


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The tight box of a mask [H, W]; right and bottom are behind the last pixel. All 0 for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def color_crop(image: Image.Image, found: Detection) -> Image.Image:
    """What the classifier of colors sees: the object on plain gray, cut out at its box.

    ValueError if the mask is not of the image's size.
    """
    image = image.convert("RGB")
    if found.mask is not None:
        if found.mask.shape != image.size[::-1]:
            raise ValueError(f"a mask of {found.mask.shape} for an image of {image.size[::-1]} rows and columns")
        plain = Image.new("RGB", image.size, color=_BACKGROUND)
        image = Image.composite(image, plain, Image.fromarray(found.mask.astype(bool)))
    return image.crop(found.box)


def color_texts(name: str) -> list[list[str]]:
    """For each of `COLORS`, the texts whose mean is its classifier for objects of the class `name`."""
    forms = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
    return [[form.format(color) for form in forms] for color in COLORS]


# ---------------------------------------------------------------- all pictures


@dataclass(frozen=True)
class Result:
    """The verdict on one picture of a prompt."""

    filename: str
    prompt: Mapping[str, Any]
    correct: bool
    reason: str
    objects: Mapping[str, Sequence[Detection]]

    def line(self) -> str:
        """As a line of the original's results, which its summary_scores.py reads."""
        details = {name: [[*each.box, each.score] for each in there] for name, there in self.objects.items()}
        row = {
            "filename": self.filename,
            "tag": self.prompt["tag"],
            "prompt": self.prompt["prompt"],
            "correct": self.correct,
            "reason": self.reason,
            "metadata": json.dumps(self.prompt),
            "details": json.dumps(details),
        }
        return json.dumps(row)


def summarize(results: Sequence[Result]) -> dict[str, Number]:
    """Percent by tag, their unweighted mean `overall`, percent of pictures and of prompts; intervals over prompts."""
    prompts: dict[str, list[Result]] = {}
    for each in results:
        prompts.setdefault(json.dumps(each.prompt), []).append(each)
    groups = list(prompts.values())
    right = np.array([sum(each.correct for each in group) for group in groups], float)
    drawn = np.array([len(group) for group in groups], float)
    tags = np.array([group[0].prompt["tag"] for group in groups], object)
    figures = Figures(len(groups))
    there = [tag for tag in TAGS if tag in tags] + sorted(set(tags) - set(TAGS))
    parts = {tag: (right * (tags == tag), drawn * (tags == tag)) for tag in there}
    figures.add("overall", [Ratio(*part, 100 / len(there)) for part in parts.values()], len(results))
    for tag, part in parts.items():
        figures.add(tag, Ratio(*part), int(part[1].sum()))
    figures.add("correct pictures", Ratio(right, drawn), len(results))
    figures.mean("prompts with a correct picture", right > 0)
    return figures.numbers()
