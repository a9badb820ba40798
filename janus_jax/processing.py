"""Text in and out: tokenizer, conversation templates, and the `Processor` that makes prompts of token ids.

No id is hard-coded: everything is looked up by name in the checkpoint's own tokenizer files. Arrays: B batch, T token
positions. Reference: janus/models/processing_vlm.py and janus/utils/conversation.py. Pictures: `janus_jax.images`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from PIL import Image

from janus_jax import files
from janus_jax.config import JanusConfig
from janus_jax.fields import Fields, shown
from janus_jax.images import ImageSettings, ImageSource, understanding_pixels
from janus_jax.messages import one_line
from janus_jax.roles import ROLES, detect_roles

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_PLACEHOLDER = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"

Messages = Sequence[tuple[str, str]]
_SPEAKERS = ("user", "assistant")


_MAX_TOKENIZER = 64 << 20  # bytes; Janus's has 5 MB


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json_object(path, missing_ok=True)


@contextlib.contextmanager
def _no_panic(place: str) -> Iterator[None]:
    """Makes a panic of the tokenizer's Rust, which is no Exception, a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{place} ({one_line(error)}): copy tokenizer.json again") from None


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from None


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text to ids and back over a `tokenizers.Tokenizer`, knowing Janus's special tokens by name and by id.

    Special tokens written inside a text are parsed as such, as in the reference: a text can end its own turn.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos: str = BOS,
        eos: str = EOS,
        pad: str = PAD,
        begin_of_image: str = BEGIN_OF_IMAGE,
        end_of_image: str = END_OF_IMAGE,
        image_placeholder: str = IMAGE_PLACEHOLDER,
    ):
        # A tokenizer.json may carry a length limit of its own, which would cut prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eos, self.begin_of_image, self.image_placeholder = eos, begin_of_image, image_placeholder
        self.bos_id, self.eos_id, self.pad_id = map(self._special_id, (bos, eos, pad))
        self.begin_of_image_id, self.end_of_image_id = map(self._special_id, (begin_of_image, end_of_image))
        self.image_placeholder_id = self._special_id(image_placeholder)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and the names of its special tokens.

        BOS and EOS are named by tokenizer_config.json, else special_tokens_map.json; image tags and pad by
        processor_config.json (`image_tag`, `image_start_tag`, `image_end_tag`, `pad_tag`); DeepSeek's names stand in.
        `pad_token` counts only where DeepSeek's pad is unknown: the reference ignores it, for it may be EOS.

        Raises FileNotFoundError without tokenizer.json, ValueError when a file is damaged or a special token unknown.
        """
        folder = pathlib.Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            name = one_line(path)
            raise FileNotFoundError(f"{name} is missing: copy it from the checkpoint's repository into the folder")
        text = files.read_text(path, _MAX_TOKENIZER)
        damaged = f"{one_line(path)} is not a readable tokenizer"
        try:
            with _no_panic(damaged):
                tokenizer = tokenizers.Tokenizer.from_str(text)
        except ValueError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{damaged} ({one_line(error)}): copy it again") from None

        named = _token_names(folder)
        known_pad = PAD if tokenizer.token_to_id(PAD) is not None else named("pad_token", PAD)
        path = folder / "processor_config.json"
        processor = Fields(_read_json(path))
        with _naming(path):
            tags = {key: processor.text(key, "", null=True) for key in ("image_start_tag", "image_end_tag")}
            tags |= {key: processor.text(key, "", null=True) for key in ("image_tag", "pad_tag")}
        with _naming(folder / "tokenizer.json"):
            return cls(
                tokenizer,
                bos=named("bos_token", BOS),
                eos=named("eos_token", EOS),
                pad=tags["pad_tag"] or known_pad,
                begin_of_image=tags["image_start_tag"] or BEGIN_OF_IMAGE,
                end_of_image=tags["image_end_tag"] or END_OF_IMAGE,
                image_placeholder=tags["image_tag"] or IMAGE_PLACEHOLDER,
            )

    def _special_id(self, name: str) -> int:
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ValueError(f"it lacks the special token {shown(name)}; use the tokenizer files of a Janus checkpoint")
        return token_id

    def is_added_token(self, name: str) -> bool:
        """Whether `name` is one added token, which no text around it can split or merge."""
        return any(token.content == name for token in self._tokenizer.get_added_tokens_decoder().values())

    def special_tokens(self) -> list[str]:
        """The tokens that a user's text should not hold: all that are marked as special, and Janus's own."""
        own = {self.bos_id, self.eos_id, self.pad_id, self.begin_of_image_id, self.end_of_image_id}
        own.add(self.image_placeholder_id)
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token_id, token in added.items() if token.special or token_id in own]

    def state(self) -> str:
        """All that decides which ids a text gets, for comparing tokenizers."""
        return self._tokenizer.to_str()

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of `text`, after exactly one BOS if `add_bos`, whatever the post-processor of tokenizer.json adds."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start} ({error.reason})") from None
        with _no_panic("the tokenizer fails on a text"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        with _no_panic("the tokenizer fails to decode"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A new `StreamDecoder` over this tokenizer."""
        return StreamDecoder(self, skip_special_tokens)


def _token_names(folder: pathlib.Path) -> Callable[[str, str], str]:
    """Names of special tokens, by their key and a default, as tokenizer_config.json or special_tokens_map.json say."""
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    said = [(path, Fields(_read_json(path))) for path in paths]

    def named(key: str, default: str) -> str:
        for path, fields in said:
            with _naming(path):
                token = fields.get(key, None)
                token = Fields(token, key).get("content", None) if isinstance(token, Mapping) else token
                if token is not None and not isinstance(token, str):
                    raise fields.wrong(key, token, "a token")
            if token:
                return token
        return default

    return named


class StreamDecoder:
    """Text as its ids arrive: the pieces of `push` and the last one of `finish` join to `decode` of all ids.

    A character spread over several tokens comes out whole, with its last token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with `token_id`, often one word, sometimes ''."""
        self._ids.append(token_id)
        # Unfinished UTF-8 decodes to U+FFFD at the end; what stands before it no longer changes.
        return self._emit(self._decode().rstrip("\ufffd"))

    def finish(self) -> str:
        """What was held back: '' unless the ids end within a character."""
        return self._emit(self._decode())

    def _decode(self) -> str:
        # All ids each time: exact for every kind of decoder, and 0.6 ms for 4096 ids is nothing beside a model step.
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)

    def _emit(self, text: str) -> str:
        piece, self._emitted = text[self._emitted :], max(self._emitted, len(text))
        return piece


# ---------------------------------------------------------------- conversations


def format_conversation(messages: Messages, system_prompt: str = "", eos: str = EOS) -> str:
    """The prompt of `messages`, pairs (role, text) with the role written as the model wants it (see `ROLES`).

    `{system}\\n\\n{role}: {text}\\n\\n{role}: {text}{eos}...`; an empty text leaves `{role}:` for the model to go on.
    Separators go by message index, so turns must alternate. Reference: `apply_sft_template_for_multi_turn_prompts` in
    processing_vlm.py with the DeepSeek separator style of conversation.py.
    """
    parts = [f"{system_prompt}\n\n"] if system_prompt else []
    for index, (role, text) in enumerate(messages):
        text, separator = text.strip(), eos if index % 2 else "\n\n"
        parts.append(f"{role}: {text}{separator}" if text else f"{role}:")
    return "".join(parts).strip()


def _speaker(role: Any) -> str:
    """The speaker, "user" or "assistant", by any name of that role; ValueError for others."""
    plain = role.strip("<|>").lower() if isinstance(role, str) else None
    if plain not in _SPEAKERS:
        cure = "; give a system text as system_prompt" if plain == "system" else ""
        raise ValueError(
            f"unknown role {shown(role)}; known: user, assistant, {', '.join(sum(ROLES.values(), ()))}{cure}"
        )
    return plain


def _image_list(images: Any) -> list[ImageSource]:
    # A single image is itself a sequence (of characters, bytes or rows), which must not be taken apart.
    alone = isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image)
    if alone or (isinstance(images, np.ndarray) and images.ndim <= 3):
        return [images]
    return [] if images is None else list(images)


def _parse_message(message: Any, place: str) -> tuple[str, str, list[ImageSource]]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be a dict with 'role' and 'content', not {type(message).__name__}")
    if unknown := sorted(str(key) for key in set(message) - {"role", "content", "images"}):
        raise ValueError(f"{place} has unknown keys {one_line(', '.join(unknown))}; known: role, content, images")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: content must be a str, not {type(text).__name__}; images go under 'images'")
    try:
        speaker = _speaker(message.get("role"))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return speaker, text or "", _image_list(message.get("images"))


def normalise_messages(
    messages: str | Sequence[Mapping[str, Any]], images: Any = (), image_tag: str = IMAGE_PLACEHOLDER
) -> tuple[list[tuple[str, str]], list[ImageSource]]:
    """`messages` as pairs ("user" | "assistant", text) ending with an empty assistant turn, and the images in order.

    `messages` is a question, or dicts {"role", "content", optional "images": [...]} as in the reference. Images are
    given in the messages or as `images`, one or several. Where a message has images and its text no placeholder, one
    `image_tag` line for each goes in front; for `images`, in front of the first message if no message has one.

    Raises ValueError for an unknown role or key, turns that do not alternate from the user on, an empty message, a last
    message that is an answer, or images given in both ways.
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
        raise ValueError("there are no messages: give a question or at least one user message")
    if images and found:
        raise ValueError("images are given both in the messages and beside them; give them in one place")
    if images and not any(image_tag in text for _, text in turns):
        turns[0] = ("user", f"{image_tag}\n" * len(images) + turns[0][1])
    if len(turns) % 2:
        turns.append(("assistant", ""))
    for index, (role, text) in enumerate(turns[:-1]):
        if not text.strip():
            raise ValueError(f"message {index} ({role}) is empty")
    if turns[-1][1].strip():
        raise ValueError(f"message {len(turns) - 1} is an answer already; end with a user message or an empty answer")
    return turns, images or found


# ---------------------------------------------------------------- processor


@dataclass
class Processor:
    """Prompts and pixels of one checkpoint (reference: VLChatProcessor).

    `roles` is a key of `ROLES`, and `roles_from` what decided it, see `detect_roles`.
    """

    tokenizer: Tokenizer
    config: JanusConfig
    settings: ImageSettings
    roles: str = "pro"
    roles_from: str = "chosen by hand"

    def __post_init__(self):
        if not isinstance(self.roles, str) or self.roles not in ROLES:
            raise ValueError(f"unknown roles {shown(self.roles)}; known: {', '.join(ROLES)}")
        rows, ids = self.config.language.vocab_size, self.tokenizer.vocab_size
        if ids > rows:
            raise ValueError(
                f"the tokenizer has {ids} ids but the model only {rows}: they are of different checkpoints"
            )
        size, expected = self.settings.image_size, self.config.vision.image_size
        if size != expected:
            raise ValueError(f"the image settings say image_size {size} but the model's encoder takes {expected}")

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, config: JanusConfig, roles: str | None = None, hub_id: str | None = None
    ) -> Processor:
        """The processor of a checkpoint folder; `roles` None asks `detect_roles`, with `hub_id`.

        preprocessor_config.json (or `image_processor` in processor_config.json, as transformers 5 writes it) is read
        where present. Raises as `Tokenizer.from_folder`, and ValueError where the files contradict `config`.
        """
        folder = pathlib.Path(folder)
        tokenizer = Tokenizer.from_folder(folder)
        processor = _read_json(folder / "processor_config.json")
        path = folder / "preprocessor_config.json"
        raw = _read_json(path)
        try:
            raw = raw or Fields(processor).block("image_processor", {}, null=True).raw
            settings = ImageSettings.parse(raw, config.vision.image_size)
            count = processor.get("num_image_tokens", config.vision.num_patches)
            if count != config.vision.num_patches:
                raise ValueError(
                    f"num_image_tokens {shown(count)} is not the model's {config.vision.num_patches} patches"
                )
            if roles is not None:
                return cls(tokenizer, config, settings, roles)
            size = (config.language.layers, config.language.width)
            known = detect_roles(folder, size, tokenizer.pad_id, tokenizer.is_added_token, hub_id)
            return cls(tokenizer, config, settings, *known)
        except ValueError as error:
            raise ValueError(f"{one_line(folder)}: {error}") from None

    def format(self, messages: Messages, system_prompt: str = "") -> str:
        """`format_conversation` with this checkpoint's EOS and role tags, whatever names the roles have."""
        tags = dict(zip(_SPEAKERS, ROLES[self.roles], strict=True))
        tagged = [(tags[_speaker(role)], text) for role, text in messages]
        return format_conversation(tagged, system_prompt, self.tokenizer.eos)

    def understanding_prompt(
        self, messages: Messages, num_images: int, system_prompt: str = SYSTEM_PROMPT, max_new_tokens: int = 0
    ) -> list[int]:
        """Ids of a conversation (from `normalise_messages`) about `num_images` images, for the model to answer.

        Each placeholder becomes begin_of_image, `config.vision.num_patches` placeholders, end_of_image. ValueError when
        placeholders and images differ in number, or prompt and `max_new_tokens` exceed the model's positions.
        """
        tokenizer = self.tokenizer
        ids = tokenizer.encode(self.format(messages, system_prompt))
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

    def text_to_image_prompt(self, prompt: str) -> list[int]:
        """Ids that ask for an image of `prompt`, ending with begin_of_image; no system prompt.

        ValueError when `prompt` is blank, or leaves no room for the image's tokens.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"the prompt is {shown(prompt)}: say what to draw")
        text = self.format([("user", prompt), ("assistant", "")]) + self.tokenizer.begin_of_image
        ids = self.tokenizer.encode(text)
        self._check_length(len(ids), self.config.gen_vision.num_tokens)
        return ids

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The guidance partner of a text-to-image prompt: all but the first and last id are pad (to be attended to)."""
        return [*ids[:1], *[self.tokenizer.pad_id] * (len(ids) - 2), *ids[1:][-1:]]

    def left_pad(self, rows: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids [B, T] and mask [B, T], 1 where a token stands; T is `length`, or that of the longest row.

        ValueError when there are no rows, a row is empty, or one is longer than `length`.
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
