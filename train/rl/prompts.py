"""Prompts that pictures are drawn of: read from text and JSON lines, and chosen for each step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from janus_jax.io.files import parse_json, read_text
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path
from janus_jax.processing.chat import Processor

_MOST_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, its ids, which end in begin_of_image, and what else its line says, for rewards."""

    text: str
    ids: tuple[int, ...]
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a run, in the order of their files.

    Attributes:
      fingerprints: of each file, by its path as given.
    """

    prompts: tuple[Prompt, ...]
    fingerprints: dict[str, str]
    seed: int

    def of_step(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of `step`: all are drawn of before one is again, in an order that `seed` shuffles."""
        return [self.prompts[self._order[position]] for position in range(step * count, (step + 1) * count)]

    @functools.cached_property
    def _order(self) -> Any:
        return grain.MapDataset.range(len(self.prompts)).seed(self.seed).shuffle().repeat()


def read_prompts(paths: Sequence[str], processor: Processor, longest: int, seed: int) -> Prompts:
    """The prompts of text files, one a line, and of `.jsonl` files, whose records have a `prompt`.

    Args:
      longest: the most ids of a prompt.
    Raises: FileNotFoundError or ValueError, in one line, with the place, for a file that is missing or has no prompts,
      and for a prompt that is empty or too long.
    """
    found: list[Prompt] = []
    fingerprints: dict[str, str] = {}
    for path in paths:
        own = []
        digest = hashlib.sha256()
        for place, text, metadata in _records(path):
            try:
                ids = processor.text_to_image_prompt(text)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if len(ids) > longest:
                raise ValueError(
                    f"{place}: the prompt of {len(ids)} tokens is longer than the {longest} that data.context leaves "
                    "beside a picture; shorten it, or raise data.context"
                )
            own.append(Prompt(text, tuple(ids), metadata))
            digest.update(f"{json.dumps([text, metadata], sort_keys=True)}\n".encode())
        if not own:
            raise ValueError(f"grpo.prompts: {one_line(path)} has no prompts")
        found += own
        fingerprints[path] = digest.hexdigest()[:16]
    return Prompts(tuple(found), fingerprints, seed)


def _records(path: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """(place, prompt, what else the record says) of each line that is not blank."""
    lines = read_text(as_path(path), _MOST_BYTES).split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{one_line(path)}, line {number}"
        if not path.endswith(".jsonl"):
            records.append((place, line.strip(), {}))
            continue
        record = parse_json(line.encode(), place)
        if not isinstance(record, dict) or "prompt" not in record:
            raise ValueError(f"{place} is not a JSON object with a prompt")
        records.append((place, record.pop("prompt"), record))
    return records


def padded(rows: Sequence[Sequence[int]], processor: Processor, length: int, guided: bool) -> dict[str, np.ndarray]:
    """`ids` and `mask` [B, rows, length] of prompts, padded on the left; with their unconditional rows if guided."""
    given = [[row, processor.unconditional(row)] if guided else [row] for row in rows]
    ids, mask = processor.left_pad([row for pair in given for row in pair], length)
    shape = (len(given), -1, length)
    return {"ids": ids.reshape(shape), "mask": mask.reshape(shape).astype(bool)}
