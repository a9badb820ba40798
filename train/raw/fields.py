"""What the fields of a record mean, its schema: from a record, as a reader gives it, to a `RawSample`.

Know or refuse: what changes a sample's meaning (a system prompt beside the turns, a turn that is not to be trained on,
a picture within a turn) is taken, or the sample is refused, with the reason; nothing of it is read past.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from janus_jax.io.messages import one_line
from janus_jax.processing.chat import IMAGE_PLACEHOLDER
from janus_jax.processing.images import ImageSource
from train.raw.folders import is_picture
from train.raw.media import PICTURE_FIELDS, is_media_field, refuse_media_fields, refuse_media_tags
from train.raw.readers import BadSample, listed

IMAGE_TAG = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SYSTEM = ("system", "system_prompt", "system_message")
# Of a turn: 1 or true to be trained on, 0 or false not.
_TRAINED = ("loss", "weight", "train", "training", "trainable", "loss_weight", "loss_scale")
# Of a turn: programs differ in whether true means trained or not, or they hold spans of characters.
_UNKNOWN_MASKS = ("mask", "masked", "loss_mask", "train_detail", "training_detail")
_ABOUT_TRAINING = frozenset((*_TRAINED, *_UNKNOWN_MASKS))
_TOOLS = ("tools", "functions")
_TEXTS = ("caption", "text", "txt", "conversations", "messages")
_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
_PICTURE_PARTS = ("image", "image_url", "input_image")
_PICTURE_SOURCES = ("image_url", "image", "url", "path", "source")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,20}://")
_MAX_PATH = 4096  # characters


@dataclasses.dataclass(frozen=True)
class RawSample:
    """One sample as found: a conversation, a text, or a caption with its image.

    Attributes:
      place: file and line, tar member or row, for messages.
      messages: {"role": "user" | "assistant" | "system", "content": str} each; None where it is no conversation.
      images: in order, as anything that `janus_jax.processing.images.open_image` takes.
      text, caption: the other two kinds.
      image_tags: what stands for an image in the messages.
      untrained: which of the messages are answers that are not to be trained on.
    """

    place: str
    messages: tuple[dict[str, str], ...] | None = None
    images: tuple[ImageSource, ...] = ()
    text: str | None = None
    caption: str | None = None
    image_tags: tuple[str, ...] = (IMAGE_TAG,)
    untrained: tuple[int, ...] = ()


def wanted(name: str) -> bool:
    """Whether a record's field of this name says anything here, be it that the sample has to be refused."""
    known = (*_TEXTS, *_SYSTEM, *_TRAINED, *_TOOLS, "file_name")
    return name in known or is_media_field(name)


def schema_of(fields: Iterable[str], named_picture: bool = False) -> str | None:
    """The schema of a record with these fields; `named_picture` where its file_name is that of a picture."""
    fields = set(fields)
    if "conversations" in fields:
        return "llava"
    if "messages" in fields:
        return "chat"
    if named_picture or fields & set(PICTURE_FIELDS):
        return "captions" if fields & {"caption", "text", "txt"} else None
    return "text" if "text" in fields else None


# ---------------------------------------------------------------- pictures


class Root:
    """The folder that paths of pictures start from, and beyond which none may lead unless `allow_outside`."""

    def __init__(self, folder: pathlib.Path, allow_outside: bool = False):
        self.folder, self.allow_outside = folder, allow_outside
        self._known = functools.lru_cache(4096)(self._holds)

    @functools.cached_property
    def _inside(self) -> str:
        return os.path.realpath(self.folder).rstrip(os.sep) + os.sep

    def _holds(self, path: str) -> bool:
        # Links are followed: an archive that was unpacked may hold some.
        return (os.path.realpath(path) + os.sep).startswith(self._inside)

    def _leads_out(self, path: str) -> bool:
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return not self._holds(path)
        return not self._known(parent)

    def image(self, value: Any, place: str) -> ImageSource:
        """A picture as a record gives it: its bytes, a data URI, a path, or `{bytes, path}` as datasets store it."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not value or not isinstance(value, str):
            raise BadSample("missing_image", place, f"an image must be a path or bytes, not {told(value)}")
        if value.startswith("data:"):
            return value
        if _ADDRESS.match(value):
            raise BadSample("missing_image", place, f"{told(value)} is not fetched; download it and give its path")
        if len(value) > _MAX_PATH or "\0" in value:
            detail = f"{told(value)} is no path; base64 is written as data:image/...;base64,..."
            raise BadSample("missing_image", place, detail)
        if not self.allow_outside and self._leads_out(os.path.join(self.folder, value)):
            detail = f"{one_line(value)} leads out of {one_line(self.folder)}; if that is meant, give --allow-outside"
            raise BadSample("outside_folder", place, detail)
        return self.folder / value

    def images(self, fields: dict[str, Any], place: str, where: str = "") -> tuple[ImageSource, ...]:
        """The pictures that a record or a turn names; BadSample for what names media otherwise."""
        if not any(map(is_media_field, fields)) and "file_name" not in fields:
            return ()
        given = {name: fields[name] for name in PICTURE_FIELDS if fields.get(name)}
        if not given and isinstance(fields.get("file_name"), str) and is_picture(os.path.basename(fields["file_name"])):
            given = {"file_name": fields["file_name"]}  # how the datasets library names them
        refuse_media_fields(fields, bool(given), place, where)
        lists = [value if isinstance(value, list) else [value] for value in given.values()]
        found = [tuple(self.image(value, place) for value in values) for values in lists] or [()]
        if any(images != found[0] for images in found):
            raise BadSample("ambiguous_sample", place, f"{where}pictures in {listed(given)}: which of them count?")
        return found[0]


def told(value: Any) -> str:
    """A value for a message, whatever it holds."""
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
            raise BadSample("unsupported_field", place, f"{name}: descriptions of tools have no place in the template")
    shared = root.images(record, place)
    messages, own, untrained, empty = [], [], [], 0
    for index, turn in enumerate(turns):
        where = f"turn {index}: "
        speaker = turn.get(role) if isinstance(turn, dict) else None
        known = _ROLES.get(speaker.strip("<|>").lower()) if isinstance(speaker, str) else None
        if known is None:
            raise BadSample("bad_turns", place, f"{where}{role} is {told(speaker)}, not one of {list(_ROLES)}")
        within = root.images(turn, place, where)
        text = turn.get(content)
        if isinstance(text, list):
            text, parts, empty = _parts(text, empty, root, place, where)
            if parts and within:
                raise BadSample("ambiguous_sample", place, f"{where}pictures in its parts and beside them")
            within = within or parts
        if not isinstance(text, str):
            raise BadSample("bad_turns", place, f"{where}{content} is no string but {type(text).__name__}")
        refuse_media_tags(text, tags, place, where)
        trained = _trained(turn, place, where)
        if trained and known != "assistant":
            raise BadSample("unsupported_weight", place, f"{where}only answers are trained on, and it asks for more")
        if trained is False and known == "assistant":
            untrained.append(index)
        messages.append({"role": known, "content": text})
        own.append(within)
    images = _in_order(messages, own, shared, tags, place)
    system = _system(record, place)
    if system is not None and messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise BadSample("ambiguous_sample", place, "one system prompt beside the turns and another as the first")
    elif system is not None:
        refuse_media_tags(system, (), place, "the system prompt: ")
        messages.insert(0, {"role": "system", "content": system})
        untrained = [index + 1 for index in untrained]
    return RawSample(place, tuple(messages), images, image_tags=tags, untrained=tuple(untrained))


def _system(record: dict[str, Any], place: str) -> str | None:
    given = {name: record[name] for name in _SYSTEM if record.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise BadSample("bad_turns", place, f"{name} is no string but {type(value).__name__}")
    if len(set(given.values())) > 1:
        raise BadSample("ambiguous_sample", place, f"system prompts in {listed(given)}: which of them counts?")
    return next(iter(given.values()), None)


def _trained(fields: dict[str, Any], place: str, where: str) -> bool | None:
    """Whether the data say that a turn is to be trained on; None where they say nothing."""
    if _ABOUT_TRAINING.isdisjoint(fields):
        return None
    for name in _UNKNOWN_MASKS:
        if fields.get(name) is not None:
            detail = f"{where}{name} is not known here; say loss: true or false of each answer"
            raise BadSample("unsupported_weight", place, detail)
    given = {name: fields[name] for name in _TRAINED if fields.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            detail = f"{where}{name} is {told(value)}; only 1 or true and 0 or false are known"
            raise BadSample("unsupported_weight", place, detail)
    if len({bool(value) for value in given.values()}) > 1:
        raise BadSample("unsupported_weight", place, f"{where}{listed(given)} contradict one another")
    return bool(next(iter(given.values()))) if given else None


def _parts(
    parts: list[Any], before: int, root: Root, place: str, where: str
) -> tuple[str, tuple[ImageSource, ...], int]:
    """The text of a turn that is a list of parts, as OpenAI's interface takes them, and the pictures it brings.

    A part `{"type": "image"}` without a picture stands for the next one beside the turns; `before`, and last of what is
    returned, is how many of those there were.
    """
    texts, images, empty = [], [], before
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        sources = [part[name] for name in _PICTURE_SOURCES if part.get(name)] if kind else []
        if isinstance(kind, str) and kind in _PARTS and not sources and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind in _PICTURE_PARTS and len(sources) <= 1:
            texts.append(IMAGE_TAG)
            if part.get("index") is not None and part["index"] != empty:
                raise BadSample("ambiguous_sample", place, f"{where}pictures are not in the order of their parts")
            empty += not sources
            images += [root.image(_source(source), place) for source in sources]
        else:
            known = listed((*_PARTS, *_PICTURE_PARTS))
            reason = "unsupported_media" if isinstance(kind, str) and is_media_field(kind) else "bad_turns"
            raise BadSample(reason, place, f"{where}a part of type {told(kind)} that is not read; known: {known}")
    if images and empty > before:
        raise BadSample("ambiguous_sample", place, f"{where}some of its parts bring their pictures and others do not")
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
    """All pictures in the order of their tags: those of turns that bring their own, and those beside the turns."""
    counts = [sum(message["content"].count(tag) for tag in tags) for message in messages]
    if any(count for count, message in zip(counts, messages, strict=True) if message["role"] == "system"):
        raise BadSample("placeholder_mismatch", place, f"{tags[0]} in a system prompt")
    everything = shared + tuple(image for within in own for image in within)
    if not any(own) or sum(counts) != len(everything):
        return everything  # where their number does not fit, the tokenizer refuses the sample
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
            raise BadSample("missing_field", place, f"{name} is no string but {type(record[name]).__name__}")
    raise BadSample("missing_field", place, f"no {' or '.join(names)}; found {listed(record)}")


def _llava(record: dict[str, Any], root: Root, place: str) -> RawSample:
    return _conversation(record, ("conversations", "from", "value"), (IMAGE_TAG,), root, place)


def _chat(record: dict[str, Any], root: Root, place: str) -> RawSample:
    # The reference's own way to write conversations: images within the messages, and the placeholder as their tag.
    return _conversation(record, ("messages", "role", "content"), (IMAGE_TAG, IMAGE_PLACEHOLDER), root, place)


def _text(record: dict[str, Any], root: Root, place: str) -> RawSample:
    text = _string(record, ["text"], place)
    if root.images(record, place):
        raise BadSample("unexpected_image", place, "a text with a picture; read it as captions or chat")
    return RawSample(place, text=text)


def _captions(record: dict[str, Any], root: Root, place: str) -> RawSample:
    caption, images = _string(record, ["caption", "text", "txt"], place), root.images(record, place)
    if len(images) != 1:
        raise BadSample("missing_image", place, f"a caption needs one image, not {len(images)}")
    return RawSample(place, images=images, caption=caption)


Parse = Callable[[dict[str, Any], Root, str], RawSample]
# What a record may say; a new schema is a row here and, to be told by a record's fields, in `schema_of`.
SCHEMAS: dict[str, Parse] = {"llava": _llava, "chat": _chat, "text": _text, "captions": _captions}
