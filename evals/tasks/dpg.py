"""DPG-Bench with the evaluated model as the judge: it answers the questions about pictures that another one has drawn.

`--model` is the judge here, and `--data` the folder of pictures (as `evals.generation.draw` draws them) with
dpg_bench.csv in it or beside it. The published figures are mPLUG's judgements: no other judge's belong beside them.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from evals.generation import dpg, layouts
from evals.items import Item, Loaded, Scores, Task, Verdict
from evals.read.pictures import is_file
from evals.rules import yes_no as rules
from evals.tasks.common import Question, answered, make_items
from janus_jax.io.messages import one_line
from janus_jax.processing.image_files import open_image

_TILES = 4
_TOKENS = 16
_CSV = "dpg_bench.csv"
_EXPECTED = "dpg_bench.csv and pictures such as partiprompts0.png (github.com/TencentQQGYLab/ELLA, dpg_bench)"


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


class Dpg(Task):
    """A reply is yes if VLMEvalKit's rule finds yes in it, and counts if the questions that it depends on are yes too.

    The protocol `quirks` makes the two mistakes of the original's script: it drops the first row of the questions, and
    counts categories from the last tile of a picture alone.
    """

    name, title, metric = "dpg", "DPG-Bench, judged by this model", "score in percent"
    protocols = ("plain", "quirks")
    absent: ClassVar[dict[str, str]] = {
        "report": "the report's judge is mPLUG; take plain or quirks, which ask the model that is given",
    }

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        place = next((each / _CSV for each in (data, data.parent, data / "dpg") if is_file(each / _CSV)), None)
        folder = next((each for each in (data, data / "dpg") if any(each.glob("*.png"))), None)
        if place is None or folder is None:
            raise ValueError(f"{self.title}: no data in {one_line(data)}; expected {_EXPECTED}")
        known = dpg.read_questions(place, protocol == "quirks")
        pictures = sorted(folder.glob("*.png"))
        strange = [path.name for path in pictures if path.stem not in known]
        found = [
            Question(
                f"{path.stem}/{tile + 1}/{each.number}", each.text, "yes", (Tile(path, tile),), "", path.stem,
                {"item": path.stem, "tile": tile, "asked": each, "category": each.category},
            )
            for path in pictures
            for tile in range(_TILES)
            for each in known.get(path.stem, [])
        ]  # fmt: skip
        source = f"{one_line(folder)}, {len(pictures):,} pictures"
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
        items, unanswered = answered(items, predictions)
        verdicts, tiles, questions = {}, {}, {}
        for item in items:
            said = rules.vlmevalkit(predictions[item.id] or "")
            verdicts[item.id] = Verdict(said, "right" if said == "yes" else "wrong", float(said == "yes"))
            asked, name, tile = item.fields["asked"], item.fields["item"], item.fields["tile"]
            tiles.setdefault(name, {}).setdefault(tile, {})[asked.number] = said
            questions.setdefault(name, {})[asked.number] = asked
        drawn = [dpg.Picture(name, [own[tile] for tile in sorted(own)]) for name, own in tiles.items()]
        asked_of = {name: list(own.values()) for name, own in questions.items()}
        numbers, failed = dpg.summarize(asked_of, drawn, protocol == "quirks")
        notes = [f"{name} is left out: {reason}" for name, reason in failed.items()]
        return Scores(numbers, verdicts, "overall", {}, unanswered, notes)


def _text(each: Question) -> str:
    return f"\n{each.question}\nPlease answer yes or no."
