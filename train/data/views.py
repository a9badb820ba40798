"""Prepared samples for people: text with marks for images, and which of it is trained on."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from janus_jax.config import read_config
from janus_jax.io.files import read_text
from janus_jax.io.messages import one_line
from janus_jax.processing.chat import Processor
from train.data.prepared import SPECIAL_IDS, TOKENIZER, Prepared
from train.data.samples import Sample
from train.data.tokenize import tokenizer_fingerprint

IMAGE_MARK, CODES_MARK = "<image>", "<codes>"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of a sample's text: `kind` is 'text', 'image' or 'codes'; `trained` if the model learns to produce it."""

    kind: str
    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class View:
    """One sample for people.

    Attributes:
      index: its index in the folder.
      sample: the sample itself.
      pieces: its text, in order.
      answers: the texts that are trained on, without special tokens and surrounding space.
      short: a generation sample's prompt with the caption cut to its first sentence; '' if it has only one.
    """

    index: int
    sample: Sample
    pieces: tuple[Piece, ...]
    answers: tuple[str, ...]
    short: str

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def trained_tokens(self) -> int:
        return int(self.sample.answers.sum()) + len(self.sample.codes) + len(self.sample.rejected)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints; `spans` are the ranges [begin, end) of `text` that are trained on."""
        ends = list(itertools.accumulate(len(piece.text) for piece in self.pieces))
        spans = [[end - len(p.text), end] for p, end in zip(self.pieces, ends, strict=True) if p.trained]
        return {
            "index": self.index,
            "kind": self.sample.kind,
            "text": self.text,
            "answers": list(self.answers),
            "spans": spans,
            "images": len(self.sample.images),
            "codes": len(self.sample.codes) + len(self.sample.rejected),
            "tokens": self.sample.length,
            "trained_tokens": self.trained_tokens,
            "short_text": self.short,
            "place": self.sample.place,
        }


def stored_codes(sample: Sample) -> dict[str, np.ndarray]:
    """The codes of a sample's images, by what they are called."""
    if len(sample.rejected):
        return {"chosen codes": sample.codes, "rejected codes": sample.rejected}
    return {"codes": sample.codes} if len(sample.codes) else {}


class Viewer:
    """Makes `View`s of the samples of one folder.

    Args:
      folder: a prepared folder.
      model: a checkpoint folder whose tokenizer decodes the samples; None for the one stored in `folder`.
    Raises: FileNotFoundError or ValueError, in one line, if there is no tokenizer, or it is not the data's.
    """

    def __init__(self, folder: Prepared, model: pathlib.Path | None = None):
        self.folder = folder
        self._tokenizer, self._ids = _of_model(folder, model) if model else _kept(folder)

    def __getitem__(self, index: int) -> View:
        sample = self.folder[index]
        pieces, answers = self._pieces(sample)
        short = self._decode(sample.short_ids) if len(sample.short_ids) else ""
        return View(index, sample, pieces, answers, short)

    def _decode(self, ids: Sequence[int], plain: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=plain)

    def _pieces(self, sample: Sample) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
        pieces, answers, ids = [], [], sample.ids.tolist()
        for kind, begin, end in self._runs(ids, bool(len(sample.codes))):
            if kind != "text":
                trained = kind == "codes" or bool(sample.answers[begin:end].any())
                pieces.append(Piece(kind, IMAGE_MARK if kind == "image" else CODES_MARK, trained))
                continue
            for trained, run in itertools.groupby(range(begin, end), lambda i: bool(sample.answers[i])):
                span = [ids[i] for i in run]
                pieces.append(Piece("text", self._decode(span), trained))
                if trained:
                    answers.append(self._decode(span, plain=True).strip())
        return tuple(pieces), tuple(answers)

    def _runs(self, ids: list[int], codes: bool) -> Iterator[tuple[str, int, int]]:
        """(kind, begin, end) of the texts and images in `ids`, and of the codes that follow."""
        begin, i = 0, 0
        start, end, slot = (self._ids[name] for name in ("begin_of_image", "end_of_image", "image_placeholder"))
        while i < len(ids):
            if ids[i] != slot:
                i += 1
                continue
            first = i - (i > begin and ids[i - 1] == start)
            while i < len(ids) and ids[i] == slot:
                i += 1
            i += i < len(ids) and ids[i] == end
            if first > begin:
                yield "text", begin, first
            yield "image", first, i
            begin = i
        last = len(ids) - (codes and ids[-1:] == [start])
        if last > begin:
            yield "text", begin, last
        if codes:
            yield "codes", last, len(ids)


def _kept(folder: Prepared) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    path, ids = folder.folder / TOKENIZER, folder.meta.get("ids")
    if not path.exists() or ids is None:
        raise FileNotFoundError(
            f"{one_line(folder.folder)} was prepared before folders kept their tokenizer; name the model that it was "
            "prepared for with --model"
        )
    if not isinstance(ids, dict) or not all(isinstance(ids.get(name), int) for name in SPECIAL_IDS):
        raise ValueError(f"{one_line(folder.folder)}/prepared.json is damaged: `ids` are not those of {SPECIAL_IDS}")
    try:
        return tokenizers.Tokenizer.from_str(read_text(path)), ids
    except (OSError, ValueError):
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{one_line(path)} is not a readable tokenizer ({one_line(error)})") from None


def _of_model(folder: Prepared, model: pathlib.Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    processor = Processor.from_folder(model, read_config(model))
    if tokenizer_fingerprint(processor) != folder.meta["settings"]["tokenizer"]:
        raise ValueError(
            f"{one_line(folder.folder)} was prepared with another tokenizer than that of {one_line(model)}"
        )
    tokenizer = processor.tokenizer
    ids = {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_IDS}
    return tokenizers.Tokenizer.from_str(tokenizer.state()), ids
