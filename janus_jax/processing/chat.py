"""Conversation templates, and the `Processor` that turns messages and prompts into token ids.

No id is hard-coded: all are looked up by name in the checkpoint's own tokenizer files. Arrays: B batch, T token
positions. Reference: janus/models/processing_vlm.py and janus/utils/conversation.py. The tokenizer is in
`janus_jax.processing.tokenizer`, images are in `janus_jax.processing.images`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from janus_jax.config import JanusConfig
from janus_jax.io import files
from janus_jax.io.fields import Fields, shown
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path
from janus_jax.processing.images import ImageSettings, ImageSource, understanding_pixels
from janus_jax.processing.roles import ROLES, detect_roles
from janus_jax.processing.tokenizer import (
    BEGIN_OF_IMAGE,
    BOS,
    END_OF_IMAGE,
    EOS,
    IMAGE_PLACEHOLDER,
    PAD,
    StreamDecoder,
    Tokenizer,
)

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

__all__ = ["BEGIN_OF_IMAGE", "BOS", "END_OF_IMAGE", "EOS", "IMAGE_PLACEHOLDER", "PAD", "ROLES", "SYSTEM_PROMPT"]
__all__ += ["Messages", "Processor", "StreamDecoder", "Tokenizer", "detect_roles", "format_conversation"]
__all__ += ["normalize_messages"]

Messages = Sequence[tuple[str, str]]
_SPEAKERS = ("user", "assistant")


# ---------------------------------------------------------------- conversations


def format_conversation(messages: Messages, system_prompt: str = "", eos: str = EOS) -> str:
    """The prompt for `messages`, pairs (role, text) with the role spelled as the model expects it (see `ROLES`).

    `{system}\\n\\n{role}: {text}\\n\\n{role}: {text}{eos}...`; an empty text leaves `{role}:` for the model to go on.
    The separator depends on the message index, so turns must alternate. Reference:
    `apply_sft_template_for_multi_turn_prompts` in processing_vlm.py with the DeepSeek separator style of
    conversation.py.

    >>> format_conversation([("<|User|>", "Hi."), ("<|Assistant|>", "")])
    '<|User|>: Hi.\\n\\n<|Assistant|>:'
    """
    pieces = [f"{system_prompt}\n\n"] if system_prompt else []
    for index, (role, text) in enumerate(messages):
        text, separator = text.strip(), eos if index % 2 else "\n\n"
        pieces.append(f"{role}: {text}{separator}" if text else f"{role}:")
    return "".join(pieces).strip()


def _speaker(role: Any) -> str:
    """The speaker, "user" or "assistant", for any spelling of the role; ValueError for an unknown role."""
    plain = role.strip("<|>").lower() if isinstance(role, str) else None
    if plain not in _SPEAKERS:
        cure = "; pass a system message as system_prompt" if plain == "system" else ""
        raise ValueError(
            f"unknown role {shown(role)}; known: user, assistant, {', '.join(sum(ROLES.values(), ()))}{cure}"
        )
    return plain


def _image_list(images: Any) -> list[ImageSource]:
    # A single image is itself a sequence (of characters, bytes or rows) and must not be split.
    alone = isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image)
    if alone or (isinstance(images, np.ndarray) and images.ndim <= 3):
        return [images]
    return [] if images is None else list(images)


def _parse_message(message: Any, place: str) -> tuple[str, str, list[ImageSource]]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be a dict with 'role' and 'content', got {type(message).__name__}")
    if unknown := sorted(str(key) for key in set(message) - {"role", "content", "images"}):
        raise ValueError(f"{place} has unknown keys {one_line(', '.join(unknown))}; known: role, content, images")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: content must be a str, got {type(text).__name__}; images go under 'images'")
    try:
        speaker = _speaker(message.get("role"))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return speaker, text or "", _image_list(message.get("images"))


def normalize_messages(
    messages: str | Sequence[Mapping[str, Any]], images: Any = (), image_tag: str = IMAGE_PLACEHOLDER
) -> tuple[list[tuple[str, str]], list[ImageSource]]:
    """`messages` as pairs ("user" | "assistant", text) ending with an empty assistant turn, and the images in order.

    `messages` is a question, or dicts {"role", "content", optional "images": [...]} as in the reference. Images are
    given either in the messages or as `images`, one or several. If a message has images but no placeholder in its text,
    one `image_tag` line per image is put in front; for `images`, in front of the first message if no message has one.

    Raises ValueError for an unknown role or key, turns that do not alternate starting with the user, an empty message,
    a last message that is already an answer, or images given both ways.
    """
    images = _image_list(images)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns: list[tuple[str, str]] = []
    found: list[ImageSource] = []
    for index, message in enumerate(messages):
        speaker, text, own = _parse_message(message, f"message {index}")
        if speaker != _SPEAKERS[index % 2]:
            raise ValueError(f"message {index} is by {shown(message['role'])}: turns must alternate, user first")
        if image_tag not in text:
            text = f"{image_tag}\n" * len(own) + text
        found += own
        turns.append((speaker, text))
    if not turns:
        raise ValueError("there are no messages; pass a question or at least one user message")
    if images and found:
        raise ValueError("images are given both in the messages and as `images`; give them in one place")
    if images and not any(image_tag in text for _, text in turns):
        turns[0] = ("user", f"{image_tag}\n" * len(images) + turns[0][1])
    if len(turns) % 2:
        turns.append(("assistant", ""))
    for index, (role, text) in enumerate(turns[:-1]):
        if not text.strip():
            raise ValueError(f"message {index} ({role}) is empty")
    if turns[-1][1].strip():
        raise ValueError(f"message {len(turns) - 1} is already an answer; end with a user message or an empty answer")
    return turns, images or found


_FINE = 512  # lengths above are padded by an eighth at most


def bucket(length: int, smallest: int = 32) -> int:
    """The next of 32, 48, 64, 96, ..., 512, 576, 640, ...: lengths are padded to these, for few programs to compile.

    From 512 on, where padding costs more than a program now and then, there are eight of them up to twice that.

    >>> [bucket(length) for length in (1, 33, 49, 576, 642, 1025)]
    [32, 48, 64, 576, 704, 1152]
    """
    if length > _FINE:
        step = 2 ** ((length - 1).bit_length() - 1) // 8
        return -(-length // step) * step
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


# ---------------------------------------------------------------- processor


@dataclass
class Processor:
    """Makes prompts and pixels for one checkpoint (reference: VLChatProcessor).

    `roles` is a key of `ROLES`, and `roles_from` says how it was determined, see `detect_roles`.
    """

    tokenizer: Tokenizer
    config: JanusConfig
    settings: ImageSettings
    roles: str = "pro"
    roles_from: str = "chosen by the caller"

    def __post_init__(self):
        if not isinstance(self.roles, str) or self.roles not in ROLES:
            raise ValueError(f"unknown roles {shown(self.roles)}; known: {', '.join(ROLES)}")
        rows, ids = self.config.language.vocab_size, self.tokenizer.vocab_size
        if ids > rows:
            raise ValueError(
                f"the tokenizer has {ids} ids but the model only {rows}: they are from different checkpoints"
            )
        size, expected = self.settings.image_size, self.config.vision.image_size
        if size != expected:
            raise ValueError(f"the image settings have image_size {size} but the model's encoder expects {expected}")

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, config: JanusConfig, roles: str | None = None, hub_id: str | None = None
    ) -> Processor:
        """The processor of a checkpoint folder; if `roles` is None, `detect_roles` decides, with `hub_id`.

        preprocessor_config.json (or `image_processor` in processor_config.json, as transformers 5 writes it) is read
        if present. Raises as `Tokenizer.from_folder`, and ValueError if the files contradict `config`.
        """
        folder = as_path(folder)
        tokenizer = Tokenizer.from_folder(folder)
        processor = files.read_json_object(folder / "processor_config.json", missing_ok=True)
        path = folder / "preprocessor_config.json"
        raw = files.read_json_object(path, missing_ok=True)
        try:
            own = raw or Fields(processor).block("image_processor", {}, null=True).raw
            settings = ImageSettings.parse(own, config.vision.image_size)
            count = processor.get("num_image_tokens", config.vision.num_patches)
            if count != config.vision.num_patches:
                raise ValueError(
                    f"num_image_tokens must be the model's {config.vision.num_patches} patches, got {shown(count)}"
                )
            if roles is not None:
                return cls(tokenizer, config, settings, roles)
            size = (config.language.layers, config.language.width)
            known = detect_roles(folder, size, tokenizer.pad_id, tokenizer.is_added_token, hub_id)
            return cls(tokenizer, config, settings, *known)
        except ValueError as error:
            raise ValueError(f"{one_line(folder)}: {error}") from None

    def format(self, messages: Messages, system_prompt: str = "") -> str:
        """`format_conversation` with this checkpoint's EOS and role tags, whatever spelling the roles come in."""
        tags = dict(zip(_SPEAKERS, ROLES[self.roles], strict=True))
        tagged = [(tags[_speaker(role)], text) for role, text in messages]
        return format_conversation(tagged, system_prompt, self.tokenizer.eos)

    def understanding_prompt(
        self, messages: Messages, num_images: int, system_prompt: str = SYSTEM_PROMPT, max_new_tokens: int = 0
    ) -> list[int]:
        """Ids of a conversation (from `normalize_messages`) about `num_images` images, for the model to answer.

        Each placeholder becomes begin_of_image, `config.vision.num_patches` placeholders, end_of_image. ValueError if
        there are not as many placeholders as images, or prompt and `max_new_tokens` exceed the model's positions.
        """
        return self.prompt_ids(self.format(messages, system_prompt), num_images, max_new_tokens)

    def prompt_ids(self, prompt: str, num_images: int, max_new_tokens: int = 0) -> list[int]:
        """`understanding_prompt` of the exact text that the model reads, roles and all."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt)
        placeholders = ids.count(tokenizer.image_placeholder_id)
        if placeholders != num_images:
            tag = tokenizer.image_placeholder
            raise ValueError(
                f"the messages hold {placeholders} {tag} but there are {num_images} images; give one for each"
            )
        slots = [tokenizer.image_placeholder_id] * self.config.vision.num_patches
        image = [tokenizer.begin_of_image_id, *slots, tokenizer.end_of_image_id]
        expanded = [i for token in ids for i in (image if token == tokenizer.image_placeholder_id else [token])]
        self._check_length(len(expanded), max_new_tokens)
        return expanded

    def understanding_batch(
        self,
        conversations: Sequence[str | Sequence[Mapping[str, Any]]],
        images: Sequence[Any],
        system_prompt: str = SYSTEM_PROMPT,
        max_new_tokens: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """What the model takes for conversations, each with its `images` (as for `normalize_messages`).

        Returns: ids [B, T] int32, padded on the left; where the image placeholders are, [B, T] bool; pixels
          [B, M, S, S, 3] float32, blank behind a conversation's own, or None without images; mask [B, T] bool.
        """
        rows, pixels = [], []
        for messages, own in zip(conversations, images, strict=True):
            turns, sources = normalize_messages(messages, own, self.tokenizer.image_placeholder)
            rows.append(self.understanding_prompt(turns, len(sources), system_prompt, max_new_tokens))
            pixels.append(self.understanding_pixels(sources))
        ids, mask = self._padded(rows)
        where = (ids == self.tokenizer.image_placeholder_id) & mask
        stacked = np.zeros((len(pixels), max(map(len, pixels)), *pixels[0].shape[1:]), np.float32)
        for row, own in zip(stacked, pixels, strict=True):
            row[: len(own)] = own
        return ids, where, stacked if stacked.shape[1] else None, mask

    def drawing_batch(self, prompts: Sequence[str], copies: int, guided: bool) -> tuple[np.ndarray, np.ndarray]:
        """What the model takes for `copies` images of each prompt.

        Returns: ids [len(prompts) * copies, P, T] int32, padded on the left, where P is 2 (prompt and `unconditional`)
          if guided, else 1; mask as ids, bool.
        """
        rows = [self.text_to_image_prompt(prompt) for prompt in prompts]
        pairs = [[row, self.unconditional(row)] if guided else [row] for row in rows for _ in range(copies)]
        ids, mask = self._padded([row for pair in pairs for row in pair])
        shape = (len(pairs), -1, ids.shape[-1])
        return ids.reshape(shape), mask.reshape(shape)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.left_pad(rows, bucket(max(len(row) for row in rows)))
        return ids, mask.astype(bool)

    def text_to_image_prompt(self, prompt: str) -> list[int]:
        """Ids that ask for an image of `prompt`, ending with begin_of_image; without a system prompt.

        ValueError if `prompt` is blank, or leaves no room for the image's tokens.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"the prompt must be text that says what to draw, got {shown(prompt)}")
        text = self.format([("user", prompt), ("assistant", "")]) + self.tokenizer.begin_of_image
        ids = self.tokenizer.encode(text)
        self._check_length(len(ids), self.config.gen_vision.num_tokens)
        return ids

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The unconditional prompt for guidance: all ids but the first and last become pad (which is attended to)."""
        return [*ids[:1], *[self.tokenizer.pad_id] * (len(ids) - 2), *ids[1:][-1:]]

    def left_pad(self, rows: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids [B, T] and mask [B, T], 1 for a token and 0 for padding; T is `length`, or that of the longest row.

        ValueError if there are no rows, a row is empty, or one is longer than `length`.
        """
        if not len(rows) or not all(len(row) for row in rows):
            raise ValueError("left_pad needs at least one row and at least one id in every row")
        longest = max(len(row) for row in rows)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a row of {longest} ids does not fit the length {length}")
        ids = np.full((len(rows), length), self.tokenizer.pad_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for index, row in enumerate(rows):
            ids[index, length - len(row) :] = row
            mask[index, length - len(row) :] = 1
        return ids, mask

    def understanding_pixels(self, images: Iterable[ImageSource]) -> np.ndarray:
        """float32 [N, S, S, 3] for SigLIP, S = `settings.image_size`; N may be 0. Raises as `open_image`."""
        pixels, size = [understanding_pixels(image, self.settings) for image in images], self.settings.image_size
        return np.array(pixels, np.float32).reshape(-1, size, size, 3)

    def _check_length(self, length: int, new_tokens: int):
        limit = self.config.language.max_positions
        if length + new_tokens > limit:
            room = f" and {new_tokens} new tokens" if new_tokens else ""
            raise ValueError(f"the prompt of {length} tokens{room} exceeds the model's {limit} positions; shorten it")
