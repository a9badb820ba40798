"""A small benchmark for tests of the command: six questions about each of a few pictures, some without any.

Run as a program it is `python -m evals.main` with this benchmark; TOY_KILL_AFTER ends it by SIGKILL after so many
batches of replies, in the middle of a line.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evals.tasks
from evals.asking import store
from evals.items import Attempt, Item, JudgeRequest, Loaded, Number, Problem, Scores, Task, Verdict

WORDS = ("cat", "house", "river", "snow", "boats and birds", "yellow flowers on every roof of our village")


@dataclasses.dataclass(frozen=True)
class File:
    path: pathlib.Path

    @property
    def key(self) -> str:
        return str(self.path)

    name = key

    def read(self) -> bytes:
        return self.path.read_bytes()


class Toy(Task):
    """A reply is right if its first character is the one that the data want; those with a Z need a judge."""

    name, title, metric = "toy", "Toy", "accuracy"
    protocols = ("report", "terse")

    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        self.check_protocol(protocol)
        rows = json.loads((data / "toy.json").read_text())
        items, problems = [], []
        for row in rows:
            images = tuple(File(data / name) for name in row["images"])
            tags = "<image_placeholder>" * len(images)
            # The question is last, since a small random model hears little else.
            start = "Answer with one word.\n" if protocol == "terse" else ""
            prompt = f"User: {tags}\n{start}{row['question']}"
            item = Item(row["id"], prompt, images, row.get("most", 12), row, row["group"])
            if row.get("problem"):
                problems.append(Problem(item.id, row["problem"], item))
            else:
                items.append(item)
        return Loaded(items, problems, f"{data / 'toy.json'}: {len(rows)} questions")

    def score(
        self,
        items: Sequence[Item],
        predictions: Mapping[str, str | None],
        protocol: str,
        judged: Mapping[str, Any] | None = None,
    ) -> Scores:
        verdicts = {}
        for item in items:
            reply = predictions.get(item.id, "")
            if item.id not in predictions:
                continue
            if item.fields["answer"] == "judge" and judged is not None:
                outcome = "unjudged" if item.id not in judged else "right" if judged[item.id] else "wrong"
            else:
                outcome = "right" if reply is not None and reply[:1] == item.fields["answer"] else "wrong"
            verdicts[item.id] = Verdict((reply or "")[:1], outcome, float(outcome == "right"))
        value = 100 * float(np.mean([verdict.score for verdict in verdicts.values()]))
        numbers = {"accuracy": Number(value, len(verdicts), max(value - 5, 0), min(value + 5, 100))}
        return Scores(numbers, verdicts, "accuracy", {"Janus-Pro-1B": 86.2}, len(items) - len(verdicts), ["a | toy"])

    def judge_requests(self, items, predictions, protocol) -> list[JudgeRequest]:
        asked = [item for item in items if item.fields["answer"] == "judge" and predictions.get(item.id) is not None]
        return [
            JudgeRequest(
                item.id,
                item,
                [
                    Attempt([{"role": "user", "content": f"{item.id}: {predictions[item.id]}"}], t, 3)
                    for t in (0.0, 0.5)
                ],
                fallback=0,
            )
            for item in asked
        ]

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        return {"good": 1, "bad": 0}.get(reply)

    def export(self, items, predictions, protocol) -> dict[str, str]:
        return {"answers.txt": "".join(f"{item.id}\n" for item in items)}


def write_data(folder: pathlib.Path, pictures: int = 3, two: bool = False) -> pathlib.Path:
    """Pictures with six questions each, two questions about none, and with `two` one about two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    rows = []
    for number in range(pictures):
        base = rng.integers(0, 200, (3,))
        pixels = np.clip(base + rng.integers(-40, 40, (40, 60, 3)), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        (folder / f"{number}.png").write_bytes(encoded.getvalue())
        for index, word in enumerate(WORDS):
            text = f"Is there in it {word}"
            rows.append(
                {"id": f"{number}-{index}", "group": str(number), "images": [f"{number}.png"], "question": text}
            )
    if two:
        rows.append({"id": "two", "group": "two", "images": ["1.png", "0.png"], "question": "Which is brighter"})
    rows += [{"id": f"none{i}", "group": "none", "images": [], "question": f"Why {w}"} for i, w in enumerate(WORDS[:2])]
    for row in rows:
        row["answer"] = "A"
    (folder / "toy.json").write_text(json.dumps(rows))
    return folder


def without_model(patch: pytest.MonkeyPatch) -> None:
    """Replies are made of what the model would be given, so that nothing is compiled."""

    def embed(model, params, pixels):
        shade = np.asarray(pixels).mean((1, 2, 3), keepdims=True)[..., 0]
        return np.tile(shade, (1, model.config.vision.num_patches, model.config.language.width))

    def answer(model, params, asked, eos_id, max_new_tokens, mesh):
        groups = asked.picks + np.arange(len(asked.picks))[:, None] * (len(asked.prefix_ids) // len(asked.picks))
        seen = np.zeros(len(asked.prefix_ids)) if asked.features is None else asked.features[:, ::16, 0].sum(1)
        words = (asked.ids * asked.mask).sum(1) % 200
        rows = [words + 50, (np.abs(seen[groups.ravel()]) * 1000).astype(int) % 200 + 50, np.full(len(words), eos_id)]
        return np.stack(rows, 1)

    patch.setattr("evals.asking.answers.embed_pictures", embed)
    patch.setattr("evals.asking.answers.answer", answer)


def kill_after(batches: int) -> None:
    """This process ends by SIGKILL in the middle of the writing that follows `batches` of replies."""
    left = [batches + 1]  # the header is written too
    real = store.Lines._append

    def append(self: store.Lines, lines: list[dict[str, Any]]) -> None:
        if left[0] == 0:
            os.write(self._file.fileno(), b'{"id": "torn", "rep')
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        real(self, lines)

    store.Lines._append = append


if __name__ == "__main__":
    from evals import main

    evals.tasks.TASKS["toy"] = Toy()
    if "TOY_KILL_AFTER" in os.environ:
        kill_after(int(os.environ["TOY_KILL_AFTER"]))
    sys.exit(main.main())
