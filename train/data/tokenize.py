"""Tokenizes a raw sample into the `Sample`s that are stored.

Conversations are formatted by `format_conversation` and tokenized in pieces: the prompt up to `<|Assistant|>:`, then
` answer` with its EOS, then the next turn. So an answer follows exactly the ids that its prompt has at inference.
"""

from __future__ import annotations

import hashlib
import io
import os
import re

import numpy as np
from PIL import Image

from janus_jax.io.files import read_bytes
from janus_jax.io.messages import one_line
from janus_jax.processing.chat import ROLES, SYSTEM_PROMPT, Processor
from janus_jax.processing.images import (
    ImageSettings,
    ImageSource,
    generation_pixels,
    open_image,
    understanding_pixels_uint8,
)
from train.config import PREFERENCE, PREPARED
from train.data.samples import Sample
from train.raw.readers import MAX_PICTURE
from train.raw.sources import BadSample, RawSample
from train.raw.storage import machine_error

# How an understanding image is stored: as its own file, or as a PNG of the pixels that the encoder sees.
STORES = ("original", "resized")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")
_WANTED = {
    "understanding": "a conversation, or a caption with its image",
    "text": "a text or a conversation without images",
    "generation": "a caption with its image",
    PREFERENCE: "a prompt with a chosen and a rejected image",
}


class SampleTokenizer:
    """Makes `Sample`s of one kind.

    - understanding: a conversation, with or without images; or a caption, as BOS, image, caption, EOS. Answers listed
      in `RawSample.untrained` are read but not learned.
    - text: a conversation without images; or a text, as BOS, text, EOS. A text longer than the context becomes several
      samples of about equal length, each with its own BOS.
    - generation: a caption as the prompt of its image; the caller adds the codes.
    - preference: a prompt with a chosen and a rejected image; the caller adds the codes of both.

    `system_prompt` is for conversations without one; '' for none. Text that contains a special token is refused, since
    it could end a turn or stand for an image.
    """

    def __init__(
        self,
        processor: Processor,
        kind: str,
        context: int,
        system_prompt: str = SYSTEM_PROMPT,
        store: str = "original",
    ):
        if kind not in PREPARED:
            raise ValueError(f"unknown kind {kind!r}; known: {', '.join(PREPARED)}")
        fixed = {"understanding": processor.config.vision.num_patches, "text": 0}
        least = fixed.get(kind, processor.config.gen_vision.num_tokens) + 4
        if context < least:
            raise ValueError(f"context must be at least {least} for {kind} samples, got {context}")
        if store not in STORES:
            raise ValueError(f"unknown store {store!r}; known: {', '.join(STORES)}")
        self.processor, self.kind, self.context, self.system_prompt = processor, kind, context, system_prompt
        self.store = store
        tokenizer = processor.tokenizer
        tags = [tag for tag in ROLES[processor.roles] if tokenizer.is_added_token(tag)]
        special = {*tokenizer.special_tokens(), *tags}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        slots = [tokenizer.image_placeholder_id] * processor.config.vision.num_patches
        self._image = [tokenizer.begin_of_image_id, *slots, tokenizer.end_of_image_id]

    def __call__(self, raw: RawSample) -> tuple[list[Sample], np.ndarray | None]:
        """The samples of `raw`, and the pixels of images to be encoded, float32 in [-1, 1].

        These are [h, w, 3] of a generation sample, and [2, h, w, 3] of a preference, the chosen image first; else None.
        Raises BadSample.
        """
        if self.kind == "generation" and raw.caption is not None:
            samples = [self._prompt(raw.caption, raw, cut=True)]
            return samples, self._pixels(raw, "")[0]
        if self.kind == PREFERENCE and raw.prompt is not None:
            samples = [self._prompt(raw.prompt, raw)]
            pixels = self._pixels(raw, "chosen", "rejected")
            if np.array_equal(*pixels):
                raise BadSample("same_images", raw.place, "the chosen and the rejected image are the same")
            return samples, pixels
        if self.kind == "understanding" and raw.caption is not None:
            return [self._caption(raw)], None
        if self.kind == "text" and raw.text is not None:
            return self._text(raw), None
        if self.kind in ("understanding", "text") and raw.messages is not None:
            return [self._conversation(raw)], None
        raise BadSample("missing_field", raw.place, f"{self.kind} needs {_WANTED[self.kind]}")

    # ------------------------------------------------------------ kinds

    def _prompt(self, text: str, raw: RawSample, cut: bool = False) -> Sample:
        caption, short = self._clean(text, raw), []
        try:
            ids = self.processor.text_to_image_prompt(caption)
            first, *more = _SENTENCE_END.split(caption, maxsplit=1)
            if cut and more and more[0]:
                short = self.processor.text_to_image_prompt(first)
        except ValueError as error:  # longer than the model's positions
            raise BadSample("too_long", raw.place, str(error)) from None
        sample = Sample(self.kind, _ids(ids), np.zeros(len(ids), bool), short_ids=_ids(short))
        self._check_length(sample.length + self.processor.config.gen_vision.num_tokens, raw)
        return sample

    def _caption(self, raw: RawSample) -> Sample:
        tokenizer = self.processor.tokenizer
        answer = [*tokenizer.encode(self._clean(raw.caption, raw), add_bos=False), tokenizer.eos_id]
        return self._sample([([tokenizer.bos_id, *self._image], False), (answer, True)], raw)

    def _text(self, raw: RawSample) -> list[Sample]:
        tokenizer = self.processor.tokenizer
        ids = [*tokenizer.encode(self._clean(raw.text, raw), add_bos=False), tokenizer.eos_id]
        pieces = np.array_split(_ids(ids), -(-len(ids) // self.context))
        return [self._sample([([tokenizer.bos_id], False), (piece, True)], raw) for piece in pieces]

    def _conversation(self, raw: RawSample) -> Sample:
        turns, system = self._turns(raw)
        before = len(raw.messages) - len(turns)
        if all(before + index in raw.untrained for index in range(1, len(turns), 2)):
            raise BadSample("not_trained", raw.place, "no answer is to be trained on")
        full = self.processor.format(turns, system)
        tokenizer, pieces, end = self.processor.tokenizer, [], 0
        for index in range(1, len(turns), 2):
            asked = self.processor.format([*turns[:index], ("assistant", "")], system)
            answered = self.processor.format(turns[: index + 1], system)
            if not (full.startswith(answered) and answered.startswith(asked)):
                raise AssertionError("a conversation's first turns must be a prefix of it")
            question = tokenizer.encode(asked[end:], add_bos=end == 0)
            expanded = [i for t in question for i in (self._image if t == tokenizer.image_placeholder_id else [t])]
            answer = tokenizer.encode(answered[len(asked) :], add_bos=False)
            pieces += [(expanded, False), (answer, before + index not in raw.untrained)]
            end = len(answered)
        return self._sample(pieces, raw)

    def _turns(self, raw: RawSample) -> tuple[list[tuple[str, str]], str]:
        messages, system = list(raw.messages), self.system_prompt
        if messages and messages[0]["role"] == "system":
            system = self._clean(messages.pop(0)["content"].strip(), raw, allow_empty=True)
        roles = [message["role"] for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            got = ", ".join(roles[:6]) or "nothing"
            raise BadSample("bad_turns", raw.place, f"user and assistant must alternate, an answer last; got {got}")
        if raw.images and self.kind == "text":
            raise BadSample("unexpected_image", raw.place, "text samples have no images; prepare it as understanding")
        turns, places = [], []
        tag = re.compile("|".join(map(re.escape, raw.image_tags)))
        for message in messages:
            texts = tag.split(message["content"])
            cleaned = [self._clean(text, raw, allow_empty=len(texts) > 1) for text in texts]
            turns.append((message["role"], self.processor.tokenizer.image_placeholder.join(cleaned)))
            places.append(len(texts) - 1)
        if sum(places) != len(raw.images) or any(places[1::2]):
            found = f"{sum(places[::2])} {raw.image_tags[0]} in questions, {sum(places[1::2])} in answers"
            raise BadSample("placeholder_mismatch", raw.place, f"{len(raw.images)} images but {found}")
        return turns, system

    # ------------------------------------------------------------ pieces

    def _sample(self, pieces: list[tuple[list[int] | np.ndarray, bool]], raw: RawSample) -> Sample:
        ids = np.concatenate([_ids(piece) for piece, _ in pieces])
        answers = np.concatenate([np.full(len(piece), answer) for piece, answer in pieces])
        self._check_length(len(ids) - 1, raw)
        return Sample(self.kind, ids, answers, tuple(self._stored(image, raw.place) for image in raw.images))

    def _clean(self, text: str, raw: RawSample, allow_empty: bool = False) -> str:
        """`text`, stripped unless `allow_empty`; refused if blank, not valid Unicode, or with special tokens."""
        if not allow_empty:
            text = text.strip()
            if not text:
                raise BadSample("empty", raw.place, "there is no text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSample("bad_unicode", raw.place, f"character {error.start}: {error.reason}") from None
        if found := self._special.search(text):
            raise BadSample("special_token_in_text", raw.place, f"the text contains {found[0]}")
        return text

    def _check_length(self, length: int, raw: RawSample):
        if length > self.context:
            raise BadSample("too_long", raw.place, f"{length} tokens, more than the context of {self.context}")

    def _stored(self, image: ImageSource, place: str) -> bytes:
        if self.store == "original":
            return _image_file(image, place)
        with _reading(place):
            if isinstance(image, os.PathLike):
                image = read_bytes(image, MAX_PICTURE)
            file = io.BytesIO()
            # Already of the encoder's size, so that these pixels stay the same when they are read again.
            Image.fromarray(understanding_pixels_uint8(image, self.processor.settings)).save(file, "PNG")
            return file.getvalue()

    def _pixels(self, raw: RawSample, *names: str) -> np.ndarray:
        made = []
        for image, name in zip(raw.images, names, strict=True):
            with _reading(raw.place, name):
                made.append(generation_pixels(image, self.processor.config.gen_vision.image_size))
        return np.stack(made)


def tokenizer_fingerprint(processor: Processor) -> str:
    """A hash of everything that determines a conversation's ids; prepared data fit models with the same hash."""
    state = f"{processor.tokenizer.state()}\n{processor.roles}\n{processor.config.vision.num_patches}"
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def resized_by(settings: ImageSettings) -> tuple:
    """The settings that determine `understanding_pixels_uint8`: size, least side, and color of the borders."""
    return (settings.image_size, settings.min_size, *settings.background_color)


def _ids(ids: list[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, np.int32)


class _reading:
    """Turns errors in reading an image, which may have a name, into BadSample."""

    def __init__(self, place: str, name: str = ""):
        self.place, self._name = place, f"{name}: " if name else ""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and machine_error(error):
            return  # the image may be intact
        if isinstance(error, OSError):
            detail = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            raise BadSample("missing_image", self.place, f"{self._name}{detail}") from None
        if isinstance(error, ValueError):
            raise BadSample("undecodable_image", self.place, f"{self._name}{error}") from None


def _image_file(image: ImageSource, place: str) -> bytes:
    """The bytes of an image file that can be decoded: the source's own, or a PNG if the source is not a file."""
    with _reading(place):
        if isinstance(image, os.PathLike):
            data = read_bytes(image, MAX_PICTURE)
            try:
                open_image(data)
            except ValueError as error:
                raise ValueError(f"{one_line(image)}: {error}") from None
            return data
        decoded = open_image(image)
        if isinstance(image, bytes):
            return image
        file = io.BytesIO()
        decoded.save(file, "PNG")
        return file.getvalue()
