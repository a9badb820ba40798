"""DPG-Bench: questions about a picture, each of which counts only if those it depends on are answered with yes.

A reply is that of a model that looks at the picture: the evaluated one, another one, or an endpoint's. The published
figures are mPLUG's judgements: no other judge's belong beside them.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from evals.generation import dpg, layouts
from evals.generation.prompts import BENCHMARKS, Drawing
from evals.generation.task import DrawnTask
from evals.items import Item, Loaded, Scores, Verdict, answered
from evals.read.places import first_file, folders, missing
from evals.rules import yes_no as rules
from evals.tasks.common import Question, make_items
from janus_jax.io.messages import one_line
from janus_jax.processing.image_files import open_image

_TOKENS = 16
_MOST_NOTES = 20  # on pictures that are left out
_CSV = "dpg_bench.csv"
_QUESTIONS = f"{_CSV} (github.com/TencentQQGYLab/ELLA, dpg_bench)"
_PROMPTS = "prompts/partiprompts0.txt and so on (github.com/TencentQQGYLab/ELLA, dpg_bench)"


@dataclass(frozen=True)
class Tile:
    """One of the four pictures in a square."""

    path: pathlib.Path
    number: int

    @property
    def key(self) -> str:
        return f"{self.path}#{self.number}"

    @property
    def name(self) -> str:
        return f"tile {self.number + 1} of {one_line(self.path, 500)}"

    def read(self) -> bytes:
        picture = open_image(self.path)
        if picture.width != picture.height or picture.width % 2:
            size = f"{picture.width} x {picture.height}"
            raise ValueError(f"{one_line(self.path)} is {size}, not a square of four pictures")
        data = io.BytesIO()
        layouts.dpg_tiles(picture, picture.width // 2)[self.number].save(data, "PNG")
        return data.getvalue()


class Dpg(DrawnTask):
    """A reply is yes if VLMEvalKit's rule finds yes in it, and counts if the questions that it depends on are yes too.

    The protocol `quirks` makes the two mistakes of the original's script: it drops the first row of the questions, and
    counts categories from the last tile of a picture alone.
    """

    name, title, metric = "dpg", "DPG-Bench, by another judge than mPLUG", "score in percent"
    protocols = ("plain", "quirks")
    absent: ClassVar[dict[str, str]] = {
        "report": "the report's judge is mPLUG; take plain or quirks, which ask the judge that is given",
    }

    def drawings(self, data: pathlib.Path) -> list[Drawing]:
        # GenEval has a folder of that name too: the one beside the questions comes first.
        places = [self._questions(data).parent, *_places(data)]
        prompts = next((each / "prompts" for each in places if any((each / "prompts").glob("*.txt"))), None)
        if prompts is None:
            raise missing(self.title, data, (_PROMPTS,))
        return BENCHMARKS[self.name][0](prompts, self.pictures, self.samples)

    def _questions(self, data: pathlib.Path) -> pathlib.Path:
        found = first_file(_places(data), (_CSV,))
        if found is None:
            raise missing(self.title, data, (_QUESTIONS,))
        return found

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        place = self._questions(data)
        known = dpg.read_questions(place, protocol == "quirks")
        if self.given:
            paths = sorted(self.pictures.glob("*.png"))
            if not paths:
                raise ValueError(f"{one_line(self.pictures)} has no pictures such as partiprompts0.png")
        else:
            paths = [each.last for each in self.drawings(data)]
        strange = [path.name for path in paths if path.stem not in known]
        found = [
            Question(
                f"{path.stem}/{tile + 1}/{each.number}", each.text, "yes", (Tile(path, tile),), "", path.stem,
                {"item": path.stem, "tile": tile, "asked": each, "category": each.category},
            )
            for path in paths
            for tile in range(self.samples)
            for each in known.get(path.stem, [])
        ]  # fmt: skip
        source = f"{one_line(place)}, {len(paths):,} pictures"
        if strange:
            source += f" ({len(strange):,} without questions, such as {one_line(strange[0])})"
        return make_items(found, _text, _TOKENS, source)

    def score(
        self,
        items: Sequence[Item],
        predictions: Mapping[str, str | None],
        protocol: str,
        judged: Mapping[str, Any] | None = None,
    ) -> Scores:
        self.check_protocol(protocol)
        there, unanswered = answered(items, predictions)
        begun = {item.group for item in there}
        questions: dict[str, dict[int, dpg.Question]] = {}
        # All of a picture's: one without a reply leaves the picture out, instead of changing its score.
        for item in (item for item in items if item.group in begun):
            questions.setdefault(item.group, {})[item.fields["asked"].number] = item.fields["asked"]
        verdicts: dict[str, Verdict] = {}
        tiles: dict[str, dict[int, dict[int, str]]] = {}
        for item in there:
            said = rules.vlmevalkit(predictions[item.id] or "")
            verdicts[item.id] = Verdict(said, "right" if said == "yes" else "wrong", float(said == "yes"))
            asked, name, tile = item.fields["asked"], item.fields["item"], item.fields["tile"]
            tiles.setdefault(name, {}).setdefault(tile, {})[asked.number] = said
        drawn = [dpg.Picture(name, [own.get(tile, {}) for tile in range(self.samples)]) for name, own in tiles.items()]
        asked_of = {name: list(own.values()) for name, own in questions.items()}
        numbers, failed = dpg.summarize(asked_of, drawn, protocol == "quirks")
        theirs = ", ".join(f"{name} {figures['overall']:.1f}" for name, figures in dpg.PUBLISHED.items())
        notes = [f"published, by mPLUG: {theirs}"]
        notes += [f"{name} is left out: {reason}" for name, reason in list(failed.items())[:_MOST_NOTES]]
        notes += [f"{len(failed):,} pictures are left out"] if len(failed) > _MOST_NOTES else []
        return Scores(numbers, verdicts, "overall", {}, unanswered, notes)


def _places(data: pathlib.Path) -> list[pathlib.Path]:
    return folders(data, ("dpg", "dpgbench", "ella"))


def _text(each: Question) -> str:
    return f"\n{each.question}\nPlease answer yes or no."
