"""Schemas: turn a record, as a reader returns it, into a `RawSample`.

Know or refuse: a field that changes a sample's meaning (a system prompt outside the turns, a turn not to be trained on,
an image within a turn) is either used, or the sample is refused with the reason; it is never silently ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path
from janus_jax.processing.chat import IMAGE_PLACEHOLDER
from janus_jax.processing.images import ImageSource
from train.raw.folders import is_picture
from train.raw.media import PICTURE_FIELDS, is_media_field, refuse_media_fields, refuse_media_tags
from train.raw.readers import BadSample, listed

IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SYSTEM = ("system", "system_prompt", "system_message")
# Fields of a turn: 1 or true to train on it, 0 or false not to.
_TRAINED = ("loss", "weight", "train", "training", "trainable", "loss_weight", "loss_scale")
# Fields of a turn that mean different things in different programs, or contain spans of characters.
_UNKNOWN_MASKS = ("mask", "masked", "loss_mask", "train_detail", "training_detail")
_ABOUT_TRAINING = frozenset((*_TRAINED, *_UNKNOWN_MASKS))
_TOOLS = ("tools", "functions")
# The two pictures of a pair: by what they are, or as Pick-a-Pic has them, with labels that say so.
_CHOSEN, _NUMBERED, _LABELS = ("chosen", "rejected"), ("jpg_0", "jpg_1"), ("label_0", "label_1")
_OF_PAIRS = ("prompt", *_CHOSEN, *_NUMBERED, *_LABELS)
_TEXTS = ("caption", "text", "txt", "conversations", "messages")
_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
_PICTURE_PARTS = ("image", "image_url", "input_image")
_PICTURE_SOURCES = ("image_url", "image", "url", "path", "source")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,20}://")
_MAX_PATH = 4096  # characters


@dataclasses.dataclass(frozen=True)
class RawSample:
    """One sample as found: a conversation, a text, a caption with its image, or a prompt with two.

    Attributes:
      place: file and line, tar member or row, for messages.
      messages: dicts {"role": "user" | "assistant" | "system", "content": str}; None if it is not a conversation.
      images: in order, as anything that `janus_jax.processing.images.open_image` accepts.
      text, caption: the content of the next two kinds.
      prompt: of a pair, whose `images` are the chosen one and the rejected one.
      image_tags: placeholders for an image in the messages.
      untrained: indices of the answers in `messages` that are not to be trained on.
    """

    place: str
    messages: tuple[dict[str, str], ...] | None = None
    images: tuple[ImageSource, ...] = ()
    text: str | None = None
    caption: str | None = None
    image_tags: tuple[str, ...] = (IMAGE_TAG,)
    untrained: tuple[int, ...] = ()
    prompt: str | None = None


def wanted(name: str) -> bool:
    """Whether a record's field of this name matters here, even if only to refuse the sample."""
    known = (*_TEXTS, *_SYSTEM, *_TRAINED, *_TOOLS, *_OF_PAIRS, "file_name")
    return name in known or is_media_field(name)


def schema_of(fields: Iterable[str], named_picture: bool = False) -> str | None:
    """The schema of a record with these fields; `named_picture` if its file_name is that of an image."""
    fields = set(fields)
    if "conversations" in fields:
        return "llava"
    if "messages" in fields:
        return "chat"
    if any(fields.issuperset(names) for names in (_CHOSEN, _NUMBERED)):
        return "pairs"
    if named_picture or fields & set(PICTURE_FIELDS):
        return "captions" if fields & {"caption", "text", "txt"} else None
    return "text" if "text" in fields else None


# ---------------------------------------------------------------- images


class Root:
    """The folder from which image paths start, and which they may not leave unless `allow_outside`."""

    def __init__(self, folder: pathlib.Path, allow_outside: bool = False):
        self.folder, self.allow_outside = folder, allow_outside
        self._known = functools.lru_cache(4096)(self._holds)

    @functools.cached_property
    def _inside(self) -> str:
        return os.path.realpath(self.folder).rstrip(os.sep) + os.sep

    def _holds(self, path: str) -> bool:
        # Links are followed: an unpacked archive may contain some.
        return (os.path.realpath(path) + os.sep).startswith(self._inside)

    def _leads_out(self, path: str) -> bool:
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return not self._holds(path)
        return not self._known(parent)

    def image(self, value: Any, place: str) -> ImageSource:
        """An image from a record: its bytes, a data URI, a path, or `{bytes, path}` as in the datasets library."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not value or not isinstance(value, str):
            raise BadSample("missing_image", place, f"an image must be a path or bytes, got {told(value)}")
        if value.startswith("data:"):
            return value
        if is_store(value) and (is_store(self.folder) or self.allow_outside):
            if not self.allow_outside and not str(as_path(value)).startswith(f"{self.folder}/"):
                raise self._outside(value, place)
            return as_path(value)
        if _ADDRESS.match(value):
            raise BadSample("missing_image", place, f"{told(value)} is not fetched; download it and use its path")
        if len(value) > _MAX_PATH or "\0" in value:
            detail = f"{told(value)} is not a path; base64 must be written as data:image/...;base64,..."
            raise BadSample("missing_image", place, detail)
        if is_store(self.folder):
            outside = value.startswith("/") or posixpath.normpath(value).startswith("..")  # there are no links
        else:
            outside = self._leads_out(os.path.join(self.folder, value))
        if outside and not self.allow_outside:
            raise self._outside(value, place)
        return self.folder / value

    def _outside(self, value: str, place: str) -> BadSample:
        detail = f"{one_line(value)} is outside {one_line(self.folder)}; use --allow-outside if that is intended"
        return BadSample("outside_folder", place, detail)

    def images(self, fields: dict[str, Any], place: str, where: str = "") -> tuple[ImageSource, ...]:
        """The images in a record or a turn; BadSample if another field names media."""
        if not any(map(is_media_field, fields)) and "file_name" not in fields:
            return ()
        given = {name: fields[name] for name in PICTURE_FIELDS if fields.get(name)}
        if not given and isinstance(fields.get("file_name"), str) and is_picture(os.path.basename(fields["file_name"])):
            given = {"file_name": fields["file_name"]}  # how the datasets library names them
        refuse_media_fields(fields, bool(given), place, where)
        lists = [value if isinstance(value, list) else [value] for value in given.values()]
        found = [tuple(self.image(value, place) for value in values) for values in lists] or [()]
        if any(images != found[0] for images in found):
            raise BadSample("ambiguous_sample", place, f"{where}images in {listed(given)}; use only one of them")
        return found[0]


def told(value: Any) -> str:
    """A value as shown in a message."""
    if isinstance(value, str):
        return f"'{one_line(value, 60)}'"
    if value is None or isinstance(value, bool | int | float):
        return one_line(value, 40)
    return {"dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)


# ---------------------------------------------------------------- conversations


def _conversation(
    record: dict[str, Any], names: tuple[str, str, str], tags: tuple[str, ...], root: Root, place: str
) -> RawSample:
    field, role, content = names
    turns = record.get(field)
    if not isinstance(turns, list):
        raise BadSample("missing_field", place, f"no list {field!r}; found {listed(record)}")
    if _trained(record, place, "") is False:
        raise BadSample("not_trained", place, "the record says that it is not to be trained on")
    for name in _TOOLS:
        if record.get(name) and record[name] not in ("[]", "null", "{}"):
            raise BadSample("unsupported_field", place, f"{name}: the template does not support descriptions of tools")
    shared = root.images(record, place)
    messages, own, untrained, empty = [], [], [], 0
    for index, turn in enumerate(turns):
        where = f"turn {index}: "
        speaker = turn.get(role) if isinstance(turn, dict) else None
        known = _ROLES.get(speaker.strip("<|>").lower()) if isinstance(speaker, str) else None
        if known is None:
            raise BadSample("bad_turns", place, f"{where}{role} must be one of {list(_ROLES)}, got {told(speaker)}")
        within = root.images(turn, place, where)
        text = turn.get(content)
        if isinstance(text, list):
            text, listed_images, empty = _content_list(text, empty, root, place, where)
            if listed_images and within:
                raise BadSample("ambiguous_sample", place, f"{where}images both in its content list and next to it")
            within = within or listed_images
        if not isinstance(text, str):
            raise BadSample("bad_turns", place, f"{where}{content} must be a string, got {type(text).__name__}")
        refuse_media_tags(text, tags, place, where)
        trained = _trained(turn, place, where)
        if trained and known != "assistant":
            raise BadSample("unsupported_weight", place, f"{where}only answers can be trained on")
        if trained is False and known == "assistant":
            untrained.append(index)
        messages.append({"role": known, "content": text})
        own.append(within)
    images = _in_order(messages, own, shared, tags, place)
    system = _system(record, place)
    if system is not None and messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise BadSample("ambiguous_sample", place, "one system prompt outside the turns and another as the first")
    elif system is not None:
        refuse_media_tags(system, (), place, "the system prompt: ")
        messages.insert(0, {"role": "system", "content": system})
        untrained = [index + 1 for index in untrained]
    return RawSample(place, tuple(messages), images, image_tags=tags, untrained=tuple(untrained))


def _system(record: dict[str, Any], place: str) -> str | None:
    given = {name: record[name] for name in _SYSTEM if record.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise BadSample("bad_turns", place, f"{name} must be a string, got {type(value).__name__}")
    if len(set(given.values())) > 1:
        raise BadSample("ambiguous_sample", place, f"system prompts in {listed(given)}; use only one of them")
    return next(iter(given.values()), None)


def _trained(fields: dict[str, Any], place: str, where: str) -> bool | None:
    """Whether the data say that a turn is to be trained on; None if they do not say."""
    if _ABOUT_TRAINING.isdisjoint(fields):
        return None
    for name in _UNKNOWN_MASKS:
        if fields.get(name) is not None:
            detail = f"{where}{name} is not supported; give each answer loss: true or false"
            raise BadSample("unsupported_weight", place, detail)
    given = {name: fields[name] for name in _TRAINED if fields.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            detail = f"{where}{name} must be 1 or true, or 0 or false, got {told(value)}"
            raise BadSample("unsupported_weight", place, detail)
    if len({bool(value) for value in given.values()}) > 1:
        raise BadSample("unsupported_weight", place, f"{where}{listed(given)} contradict one another")
    return bool(next(iter(given.values()))) if given else None


def _content_list(
    items: list[Any], before: int, root: Root, place: str, where: str
) -> tuple[str, tuple[ImageSource, ...], int]:
    """The text and the images of a turn whose content is a list, as in OpenAI's API.

    An item `{"type": "image"}` without an image is a placeholder for the next image outside the turns; `before`, and
    the last value returned, is the number of those so far.
    """
    texts, images, empty = [], [], before
    for item in items:
        kind = item.get("type") if isinstance(item, dict) else None
        sources = [item[name] for name in _PICTURE_SOURCES if item.get(name)] if kind else []
        if isinstance(kind, str) and kind in _PARTS and not sources and isinstance(item.get("text"), str):
            texts.append(item["text"])
        elif isinstance(kind, str) and kind in _PICTURE_PARTS and len(sources) <= 1:
            texts.append(IMAGE_TAG)
            if item.get("index") is not None and item["index"] != empty:
                raise BadSample("ambiguous_sample", place, f"{where}images are not in the order of the content list")
            empty += not sources
            images += [root.image(_source(source), place) for source in sources]
        else:
            known = listed((*_PARTS, *_PICTURE_PARTS))
            reason = "unsupported_media" if isinstance(kind, str) and is_media_field(kind) else "bad_turns"
            raise BadSample(reason, place, f"{where}content of type {told(kind)} is not supported; known: {known}")
    if images and empty > before:
        raise BadSample("ambiguous_sample", place, f"{where}only some items of its content list have their images")
    return "\n".join(texts), tuple(images), empty


def _source(source: Any) -> Any:
    if isinstance(source, dict) and source.get("url"):
        return source["url"]
    if isinstance(source, dict) and source.get("type") == "base64" and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type') or 'image/png'};base64,{source['data']}"
    return source


def _in_order(
    messages: list[dict[str, str]], own: list[tuple], shared: tuple, tags: tuple[str, ...], place: str
) -> tuple[ImageSource, ...]:
    """All images in the order of their tags: those of turns with their own images, and those outside the turns."""
    counts = [sum(message["content"].count(tag) for tag in tags) for message in messages]
    if any(count for count, message in zip(counts, messages, strict=True) if message["role"] == "system"):
        raise BadSample("placeholder_mismatch", place, f"{tags[0]} in a system prompt")
    everything = shared + tuple(image for within in own for image in within)
    if not any(own) or sum(counts) != len(everything):
        return everything  # if their number is wrong, the tokenizer refuses the sample
    images, rest = [], shared
    for index, (count, within) in enumerate(zip(counts, own, strict=True)):
        if within and len(within) != count:
            raise BadSample("placeholder_mismatch", place, f"turn {index}: {len(within)} images but {count} {tags[0]}")
        images += within or rest[:count]
        rest = rest if within else rest[count:]
    return tuple(images)


# ---------------------------------------------------------------- schemas


def _string(record: dict[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        if record.get(name) is not None:
            if isinstance(record[name], str):
                refuse_media_tags(record[name], (), place, f"{name}: ")
                return record[name]
            raise BadSample("missing_field", place, f"{name} must be a string, got {type(record[name]).__name__}")
    raise BadSample("missing_field", place, f"no {' or '.join(names)}; found {listed(record)}")


def _llava(record: dict[str, Any], root: Root, place: str) -> RawSample:
    return _conversation(record, ("conversations", "from", "value"), (IMAGE_TAG,), root, place)


def _chat(record: dict[str, Any], root: Root, place: str) -> RawSample:
    # The reference's own form of conversations: images within the messages, and the placeholder as their tag.
    return _conversation(record, ("messages", "role", "content"), (IMAGE_TAG, IMAGE_PLACEHOLDER), root, place)


def _text(record: dict[str, Any], root: Root, place: str) -> RawSample:
    text = _string(record, ["text"], place)
    if root.images(record, place):
        raise BadSample("unexpected_image", place, "a text with an image; read it as captions or chat")
    return RawSample(place, text=text)


def _captions(record: dict[str, Any], root: Root, place: str) -> RawSample:
    caption, images = _string(record, ["caption", "text", "txt"], place), root.images(record, place)
    if len(images) != 1:
        raise BadSample("missing_image", place, f"a caption needs one image, got {len(images)}")
    return RawSample(place, images=images, caption=caption)


def _pairs(record: dict[str, Any], root: Root, place: str) -> RawSample:
    prompt = _string(record, ["prompt", "caption"], place)
    if prompt != _string(record, ["caption", "prompt"], place):
        raise BadSample("ambiguous_sample", place, "the prompt and the caption are different; use only one of them")
    refuse_media_fields({name: value for name, value in record.items() if name not in _OF_PAIRS}, True, place)
    given = [names for names in (_CHOSEN, _NUMBERED) if any(record.get(name) is not None for name in names)]
    more = [name for name in PICTURE_FIELDS if record.get(name)]
    if len(given) > 1 or more:
        found = listed([name for names in given for name in names] + more)
        raise BadSample("ambiguous_sample", place, f"a pair has two images; found {found}")
    names = given[0] if given else _CHOSEN
    if names == _NUMBERED and _preferred(record, place) == 1:
        names = names[::-1]
    images = []
    for name in names:
        try:
            images.append(root.image(record.get(name), place))
        except BadSample as error:
            raise BadSample(error.reason, place, f"{name}: {error.detail}") from None
    return RawSample(place, images=tuple(images), prompt=prompt)


def _preferred(record: dict[str, Any], place: str) -> int:
    """Which of two numbered pictures is preferred, by their labels, of which one is 1 and the other 0."""
    labels = [record.get(name) for name in _LABELS]
    if None in labels:
        raise BadSample("missing_field", place, f"no {' and '.join(_LABELS)}, which say which image is preferred")
    if any(isinstance(label, bool) or not isinstance(label, int | float) for label in labels) or sum(labels) != 1:
        raise BadSample("ambiguous_sample", place, f"{' and '.join(_LABELS)} must be 1 and 0, got {listed(labels)}")
    if labels[0] == labels[1]:
        raise BadSample("no_preference", place, "neither image is preferred")
    if labels[0] not in (0, 1):
        raise BadSample("ambiguous_sample", place, f"{' and '.join(_LABELS)} must be 1 and 0, got {listed(labels)}")
    return labels.index(1)


Parse = Callable[[dict[str, Any], Root, str], RawSample]
# The schemas; a new one is a row here and, to be detected by a record's fields, in `schema_of`.
SCHEMAS: dict[str, Parse] = {"llava": _llava, "chat": _chat, "text": _text, "captions": _captions, "pairs": _pairs}
