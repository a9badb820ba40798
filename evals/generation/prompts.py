"""What is drawn of each benchmark: its prompts as they are published, and the files of their pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from evals.generation import layouts
from evals.generation.geneval import read_prompts
from janus_jax.io.files import parse_json, read_json, read_text
from janus_jax.io.messages import one_line

_MAX_PROMPT = 1 << 20  # bytes of a file with one prompt


@dataclass(frozen=True)
class Drawing:
    """What is drawn of one prompt; `last` is the file that is there when all of its pictures are."""

    key: str  # its number or name in the benchmark
    prompt: str
    samples: int
    last: pathlib.Path
    write: Callable[[Sequence[Image.Image]], None]


def _geneval(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """evaluation_metadata.jsonl to folders `00000` with `samples/00000.png`."""

    def drawing(number: int, row: Mapping[str, Any]) -> Drawing:
        def write(pictures: Sequence[Image.Image]) -> None:
            layouts.write_geneval(out, number, row, pictures)

        return Drawing(f"{number:05}", row["prompt"], samples, layouts.geneval_grid(out, number), write)

    return [drawing(number, row) for number, row in enumerate(read_prompts(prompts))]


def _dpg(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """A folder of texts, `ID.txt`, to `ID.png`, four pictures in a square."""
    if samples != 4:
        raise ValueError(f"DPG-Bench takes 4 pictures of a prompt, got --samples {samples}")
    texts = sorted(prompts.glob("*.txt")) if prompts.is_dir() else []
    if not texts:
        raise ValueError(f"{one_line(prompts)} is not a folder of prompts such as partiprompts0.txt")

    def drawing(path: pathlib.Path) -> Drawing:
        def write(pictures: Sequence[Image.Image]) -> None:
            layouts.write_dpg(out, path.stem, pictures)

        prompt = read_text(path, _MAX_PROMPT).strip()
        return Drawing(path.stem, prompt, samples, out / f"{path.stem}.png", write)

    return [drawing(path) for path in texts]


def _wise(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """WISE's JSON (a file, or a folder of them) to `ID.png`, one picture each."""
    files = sorted(prompts.glob("*.json")) if prompts.is_dir() else [prompts]
    found = []
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise ValueError(f"{one_line(file)} is not a list of prompts")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not isinstance(row.get("Prompt"), str) or "prompt_id" not in row:
                raise ValueError(f"{one_line(file)}: prompt {number} must have Prompt and prompt_id")
            found.append(_single(row["Prompt"], out / f"{int(row['prompt_id'])}.png", samples))
    if not found:
        raise ValueError(f"{one_line(prompts)} has no prompts")
    return found


def _geneval2(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """geneval2_data.jsonl to `00000.png` by line, one picture each."""
    found = []
    for number, line in enumerate(filter(str.strip, read_text(prompts).splitlines())):
        row = parse_json(line, f"{one_line(prompts)}:{number + 1}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{one_line(prompts)}:{number + 1} has no prompt")
        found.append(_single(row["prompt"], out / f"{number:05}.png", samples))
    return found


def _single(prompt: str, path: pathlib.Path, samples: int) -> Drawing:
    if samples != 1:
        raise ValueError(f"this benchmark takes 1 picture of a prompt, got --samples {samples}")

    def write(pictures: Sequence[Image.Image]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        layouts.write_picture(path, pictures[0])

    return Drawing(path.stem, prompt, samples, path, write)


# By name: how to read the prompts, and how many pictures each has.
BENCHMARKS = {"geneval": (_geneval, 4), "dpg": (_dpg, 4), "wise": (_wise, 1), "geneval2": (_geneval2, 1)}
