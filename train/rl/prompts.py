"""Prompts of pictures and of answers: read from text and JSON lines, and chosen for each step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from janus_jax.io.fields import shown
from janus_jax.io.files import parse_json, read_text
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path
from janus_jax.processing.chat import Processor, normalize_messages
from train.raw.fields import Root
from train.raw.readers import BadSample

_MOST_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and what else its line says, for rewards.

    Attributes:
      ids: what the model goes on from; for a picture they end in begin_of_image.
      images: the pictures that an answer is about, for `open_image`.
    """

    text: str
    ids: tuple[int, ...]
    metadata: dict[str, Any]
    images: tuple[Any, ...] = ()


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


def read_prompts(paths: Sequence[str], processor: Processor, longest: int, seed: int, images: int = -1) -> Prompts:
    """The prompts of text files, one a line, and of `.jsonl` files, whose records have a `prompt`.

    Args:
      longest: the most ids of a prompt.
      images: for answers the most pictures of a prompt, which a record names as `images`: one path from the file's
        folder, or a list of them, which may not lead out of it. -1 for prompts of pictures.
    Raises: FileNotFoundError or ValueError, in one line, with the place, for a file that is missing or has no prompts,
      for a prompt that is empty or too long, and for a picture that is missing or has no place in the prompt. (In
      stores it is not looked for pictures, each of which would take a request.)
    """
    found: list[Prompt] = []
    fingerprints: dict[str, str] = {}
    for path in paths:
        own = []
        digest, root = hashlib.sha256(), Root(as_path(path).parent)
        for place, text, metadata in _records(path):
            pictures: tuple[Any, ...] = ()
            if images >= 0:
                pictures = _pictures(metadata, root, place, images)
            try:
                ids = processor.text_to_image_prompt(text) if images < 0 else _question(processor, text, pictures)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if len(ids) > longest:
                beside = "a picture" if images < 0 else "an answer of grpo.max_new_tokens"
                raise ValueError(
                    f"{place}: the prompt of {len(ids)} tokens is longer than the {longest} that data.context leaves "
                    f"beside {beside}; shorten it, or raise data.context"
                )
            own.append(Prompt(text, tuple(ids), metadata, pictures))
            digest.update(f"{json.dumps([text, metadata], sort_keys=True)}\n".encode())
        if not own:
            raise ValueError(f"grpo.prompts: {one_line(path)} has no prompts")
        found += own
        fingerprints[path] = digest.hexdigest()[:16]
    return Prompts(tuple(found), fingerprints, seed)


def _question(processor: Processor, text: Any, pictures: Sequence[Any]) -> list[int]:
    """Ids of the conversation that `JanusPipeline.chat` would answer."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the prompt must be text that asks something, got {shown(text)}")
    turns, found = normalize_messages(text, list(pictures), processor.tokenizer.image_placeholder)
    return processor.understanding_prompt(turns, len(found))


def _pictures(metadata: dict[str, Any], root: Root, place: str, most: int) -> tuple[Any, ...]:
    given = metadata.get("images", [])
    try:
        found = tuple(root.image(each, place) for each in (given if isinstance(given, list) else [given]))
    except BadSample as error:
        detail = error.detail
        if error.reason == "outside_folder":
            detail = "a picture is outside the folder of the file of prompts; put the file above its pictures"
        raise ValueError(f"{error.place}: {detail}") from None
    if len(found) > most:
        raise ValueError(
            f"{place}: pictures of the prompt: {len(found)}, more than data.images_per_row={most}; raise it"
        )
    for each in found:
        if isinstance(each, pathlib.Path) and not is_store(each) and not each.is_file():
            raise FileNotFoundError(
                f"{place}: the picture {one_line(each)} is missing; copy it there, or drop the line"
            )
    return found


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
