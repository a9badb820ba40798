"""Training data as people have it: `open_source` gives `len()` and `[i]` over any of `FORMATS`.

| format | a sample |
|---|---|
| llava | JSON list or lines: `{"image": "a.jpg" or list, "conversations": [{"from": "human" or "gpt", "value"}]}` |
| chat | JSON list or lines: `{"messages": [{"role", "content"}], "images": [...] if any}` |
| text | JSON list or lines: `{"text"}`; or a .txt file, which is one document |
| captions | JSON list or lines: `{"image", "caption" or "text"}` |
| webdataset | tar shards of `key.jpg`, `key.txt` or `key.json` with "caption", as img2dataset writes them |
| parquet | rows with the columns of any format above; images as bytes, `{bytes, path}` or paths |
| folders | a folder of images for each category, whose name is the caption |

Everything but `folders` may be one file, a folder of files or a glob; parquet files may stand where JSON does.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus_jax.images import ImageSource
from janus_jax.processing import IMAGE_PLACEHOLDER
from train.parquet import Parquet
from train.readers import (
    IMAGE_SUFFIXES,
    BadSample,
    ImageFolders,
    TarShard,
    TextFile,
    json_reader,
    read_names,
)

__all__ = ["FORMATS", "BadSample", "RawSample", "Source", "missing_path", "open_source"]

IMAGE_TAG = "<image>"
_JSON = (".json", ".jsonl", ".ndjson")
_SUFFIXES = {
    "llava": (*_JSON, ".parquet"),
    "chat": (*_JSON, ".parquet"),
    "text": (*_JSON, ".parquet", ".txt"),
    "captions": (*_JSON, ".parquet"),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
    "folders": (),
}
FORMATS = tuple(_SUFFIXES)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class RawSample:
    """One sample as found: a conversation, a text, or a caption with its image.

    Attributes:
      place: file and line, tar member or row, for messages.
      messages: {"role": "user" | "assistant" | "system", "content": str} each; None where it is no conversation.
      images: in order, as anything that `janus_jax.images.open_image` takes.
      text, caption: the other two kinds.
      image_tags: what stands for an image in the messages.
    """

    place: str
    messages: tuple[dict[str, str], ...] | None = None
    images: tuple[ImageSource, ...] = ()
    text: str | None = None
    caption: str | None = None
    image_tags: tuple[str, ...] = (IMAGE_TAG,)


# ---------------------------------------------------------------- records to samples


def _images(record: dict[str, Any], root: pathlib.Path, place: str) -> tuple[ImageSource, ...]:
    value = record.get("image") or record.get("images") or []
    return tuple(_image(image, root, place) for image in (value if isinstance(value, list | tuple) else [value]))


def _image(value: Any, root: pathlib.Path, place: str) -> ImageSource:
    if isinstance(value, dict):  # how Hugging Face datasets store them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value and not value.startswith("data:"):
        return root / value
    if not value or not isinstance(value, str | bytes):
        raise BadSample("missing_image", place, f"an image must be a path or bytes, not {value!r:.60}")
    return value


def _messages(record: dict[str, Any], field: str, role: str, content: str, place: str) -> tuple[dict[str, str], ...]:
    turns = record.get(field)
    if not isinstance(turns, list):
        raise BadSample("missing_field", place, f"no list {field!r}; found {', '.join(record) or 'nothing'}")
    messages = []
    for index, turn in enumerate(turns):
        speaker, text = (turn.get(role), turn.get(content)) if isinstance(turn, dict) else (None, None)
        known = _ROLES.get(speaker.strip("<|>").lower()) if isinstance(speaker, str) else None
        if known is None:
            raise BadSample("bad_turns", place, f"turn {index}: {role} is {speaker!r:.40}, not one of {list(_ROLES)}")
        if not isinstance(text, str):
            raise BadSample("bad_turns", place, f"turn {index}: {content} is no string but {type(text).__name__}")
        messages.append({"role": known, "content": text})
    return tuple(messages)


def _string(record: dict[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        if record.get(name) is not None:
            if isinstance(record[name], str):
                return record[name]
            raise BadSample("missing_field", place, f"{name} is no string but {type(record[name]).__name__}")
    raise BadSample("missing_field", place, f"no {' or '.join(names)}; found {', '.join(record) or 'nothing'}")


def _llava(record: dict[str, Any], root: pathlib.Path, place: str) -> RawSample:
    messages = _messages(record, "conversations", "from", "value", place)
    return RawSample(place, messages, _images(record, root, place))


def _chat(record: dict[str, Any], root: pathlib.Path, place: str) -> RawSample:
    messages = _messages(record, "messages", "role", "content", place)
    images = _images(record, root, place)
    # The reference's own way to write conversations: images within the messages, and the placeholder as their tag.
    images += tuple(image for turn in record["messages"] for image in _images(turn, root, place))
    return RawSample(place, messages, images, image_tags=(IMAGE_TAG, IMAGE_PLACEHOLDER))


def _text(record: dict[str, Any], root: pathlib.Path, place: str) -> RawSample:
    return RawSample(place, text=_string(record, ["text"], place))


def _captions(record: dict[str, Any], root: pathlib.Path, place: str) -> RawSample:
    caption, images = _string(record, ["caption", "text"], place), _images(record, root, place)
    if len(images) != 1:
        raise BadSample("missing_image", place, f"a caption needs one image, not {len(images)}")
    return RawSample(place, images=images, caption=caption)


Parse = Callable[[dict[str, Any], pathlib.Path, str], RawSample]
_PARSE: dict[str, Parse] = {
    "llava": _llava,
    "chat": _chat,
    "text": _text,
    "captions": _captions,
    "webdataset": _captions,
    "folders": _captions,
}


def _format_of(fields: Sequence[str]) -> str | None:
    """The format of a record with these fields."""
    if "conversations" in fields:
        return "llava"
    if "messages" in fields:
        return "chat"
    if "image" in fields or "images" in fields:
        return "captions" if "caption" in fields or "text" in fields else None
    return "text" if "text" in fields else None


# ---------------------------------------------------------------- sources


class Source:
    """Random access to the samples of several readers, one after the other; `[i]` raises BadSample for a bad one.

    `description` says what was read: path, format, samples, bytes.
    """

    def __init__(self, readers: Sequence[Any], parse: Parse, root: pathlib.Path | None, description: dict[str, Any]):
        self._readers, self._parse, self._root = readers, parse, root
        self._ends = np.cumsum([len(reader) for reader in readers])
        self.description = description | {"samples": len(self)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._readers[number]
        place, record = reader[index - (int(self._ends[number - 1]) if number else 0)]
        return self._parse(record, self._root or reader.path.parent, place)


def open_source(
    path: str | os.PathLike,
    format: str | None = None,
    images: str | os.PathLike | None = None,
    names: str | os.PathLike | None = None,
) -> Source:
    """Opens training data.

    Args:
      path: file, folder or glob.
      format: one of `FORMATS`; None guesses it from the files' names and the first records.
      images: the folder that image paths start from; None means that of the file which names them.
      names: for `folders`, a file of names for them, see `readers.read_names`.
    Raises: FileNotFoundError for a path that is not there, ValueError for what is no such data or has no samples.
    """
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(FORMATS)}"
        raise ValueError(f"unknown format {format!r}{hint}")
    for folder in (images, names):
        if folder is not None and not pathlib.Path(folder).exists():
            raise missing_path(folder)
    path = pathlib.Path(path)
    format = format or _guess_by_name(path)
    if names is not None and format != "folders":
        raise ValueError(f"names are for the format folders, and {path} is read as {format or 'JSON'}")
    if format == "folders":
        if not path.is_dir():
            raise missing_path(path) if not path.exists() else ValueError(f"{path} is not a folder of folders")
        files, readers = [], [ImageFolders(path, read_names(pathlib.Path(names)) if names else None)]
    else:
        files = _files(path, _SUFFIXES[format] if format else _JSON)
        readers = [_reader(file, format) for file in files]
    if not any(len(reader) for reader in readers):
        raise ValueError(f"{path} is empty: it holds no samples" + (f" of the format {format}" if format else ""))
    if format is None or format == "parquet":
        meaning = _guess_by_records(path, readers)
        format = format or meaning
    else:
        meaning = format
    root = pathlib.Path(images) if images is not None else None
    size = sum(file.stat().st_size for file in files)
    return Source(readers, _PARSE[meaning], root, {"path": str(path), "format": format, "bytes": size})


def missing_path(path: str | os.PathLike) -> FileNotFoundError:
    """The error for a path that is not there, naming the nearest one that is."""
    path = pathlib.Path(path)
    part = path
    while not part.parent.exists():
        part = part.parent
    try:
        near = difflib.get_close_matches(part.name, [child.name for child in part.parent.iterdir()], 1)
    except OSError:
        near = []
    hint = f"; did you mean {part.parent / near[0]}?" if near else ""
    return FileNotFoundError(f"{path}: there is no such file or folder{hint}")


def _files(path: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
        if not found:
            raise ValueError(f"{path} is empty: it holds no {' or '.join(suffixes)} file")
        return found
    if glob.has_magic(str(path)):
        found = sorted(pathlib.Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not found:
            raise FileNotFoundError(f"no file matches {path}")
        return found
    raise missing_path(path)


def _reader(file: pathlib.Path, format: str | None) -> Any:
    suffix = file.suffix.lower()
    if suffix == ".parquet" or format == "parquet":
        return Parquet(file)
    if format == "webdataset":
        return TarShard(file)
    return TextFile(file) if suffix == ".txt" else json_reader(file)


def _guess_by_name(path: pathlib.Path) -> str | None:
    """The format that the files' names tell; None where they are JSON, whose records will."""
    if path.is_dir():
        children = sorted(path.iterdir())
        suffixes = {child.suffix.lower() for child in children if child.is_file()}
    else:
        children, suffixes = [], {path.suffix.lower()}
    # Shards of img2dataset lie beside parquet and JSON files about them, so they come first.
    for suffix, format in ((".tar", "webdataset"), (".parquet", "parquet")):
        if suffix in suffixes:
            return format
    if suffixes & set(_JSON):
        return None
    if any(child.is_dir() and _holds_images(child) for child in children):
        return "folders"
    if ".txt" in suffixes:
        return "text"
    if not path.exists() and not glob.has_magic(str(path)):
        raise missing_path(path)
    if path.is_dir() and not children:
        raise ValueError(f"{path} is empty")
    raise ValueError(f"{path}: cannot tell the format by its name; say which: {', '.join(FORMATS)}")


def _holds_images(folder: pathlib.Path) -> bool:
    with os.scandir(folder) as entries:
        return any(pathlib.Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in entries)


def _guess_by_records(path: pathlib.Path, readers: Sequence[Any]) -> str:
    reader = next(reader for reader in readers if len(reader))
    if isinstance(reader, Parquet):
        fields = reader.columns
        if found := _format_of(fields):
            return found
        raise ValueError(f"{path}: the columns {', '.join(fields)} are of no format; see `FORMATS` in train/sources.py")
    problem = ""
    for index in range(min(len(reader), 10)):
        try:
            place, record = reader[index]
        except BadSample as error:
            problem = problem or str(error)
            continue
        if found := _format_of(list(record)):
            return found
        problem = problem or f"{place} has the fields {', '.join(record)}"
    raise ValueError(f"{path}: cannot tell the format ({problem}); say which: {', '.join(FORMATS)}")
