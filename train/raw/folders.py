"""Folders of images: one for each category, or with a text file next to each image."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from janus_jax.io.files import read_bytes
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from train.raw.encodings import decode_text
from train.raw.readers import (
    MAX_TEXT,
    PICTURE_SUFFIXES,
    BadSample,
    Names,
    PassedOver,
    Record,
    object_of,
    read_span,
    text_of,
)

_TEXTS = (".txt", ".caption", ".json")  # the first that exists is used
_MAX_NAMES = 16 << 20  # bytes of a file of names


def is_picture(name: str) -> bool:
    """Whether a file of this name is an image; macOS's hidden files next to images are not."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith(".")


class ImageFolders:
    """A folder of images for each category; `names` maps folders to captions, by default the folders' own names.

    `passed_over` are files that are not images, and folders within the categories.
    """

    def __init__(self, path: pathlib.Path, names: dict[str, str] | None = None):
        self.path, self.passed_over = path, PassedOver()
        folders = []
        for child in sorted(path.iterdir()):
            if child.name.startswith(".") or child.name == "__MACOSX":
                continue
            if child.is_dir():
                folders.append(child)
            else:
                self.passed_over.add(child.name)
        if names is not None and (unnamed := [folder.name for folder in folders if folder.name not in names]):
            raise ValueError(
                f"the names lack {len(unnamed)} of the folders in {one_line(path)}, such as {one_line(unnamed[0])!r}"
            )
        self._names = [names[folder.name] if names else folder.name.replace("_", " ") for folder in folders]
        categories, images = [], []
        for category, folder in enumerate(folders):
            for name, is_folder in _entries(folder):
                if is_picture(name) and not is_folder:
                    categories.append(category)
                    images.append(f"{folder.name}/{name}")
                elif not name.startswith("."):
                    self.passed_over.add(f"{folder.name}/{name}")
        self._categories, self._images = np.array(categories, np.int32), Names(images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image = self._images[index]
        return one_line(self.path / image, 500), {"image": image, "caption": self._names[self._categories[index]]}


class Sidecars:
    """Images with a text file next to each, `a.jpg` and `a.txt`, in a folder and its subfolders.

    The text is that of `a.txt` (or `a.caption`), else the caption in `a.json`, as img2dataset writes it. `passed_over`
    are files that belong to no image.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.passed_over = path, PassedOver()
        images, texts = [], []
        for folder, names in _walk(path):
            beside: dict[str, dict[str, str]] = {}  # by stem: the suffixes of its texts, as they are written
            for name in names:
                stem, suffix = os.path.splitext(name)
                if is_picture(name):
                    beside.setdefault(stem, {})
            for name in names:
                stem, suffix = os.path.splitext(name)
                if is_picture(name):
                    continue
                if stem in beside and suffix.lower() in _TEXTS:
                    beside[stem][suffix.lower()] = suffix
                else:
                    self.passed_over.add(folder + name)
            for name in filter(is_picture, names):
                found = beside[os.path.splitext(name)[0]]
                images.append(folder + name)
                texts.append(next((found[suffix] for suffix in _TEXTS if suffix in found), ""))
        self._images, self._texts = Names(images), Names(texts)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image, suffix = self._images[index], self._texts[index]
        place = one_line(self.path / image, 500)
        if not suffix:
            raise BadSample("missing_field", place, "there is no .txt file next to it")
        text = text_of(read_span(self.path / (os.path.splitext(image)[0] + suffix), 0, MAX_TEXT + 1), place)
        if suffix.lower() == ".json":
            text = object_of(text, place).get("caption")
        return place, {"image": image, "caption": text}


def count_sidecars(path: pathlib.Path, within: bool = True) -> tuple[int, int]:
    """Number of images in `path`, and its subfolders if `within`, and how many have a text file next to them."""
    pictures = texts = 0
    for _, names in _walk(path):
        found = [os.path.splitext(name)[0] for name in names if is_picture(name)]
        beside = {stem for stem, suffix in map(os.path.splitext, names) if suffix.lower() in (".txt", ".caption")}
        pictures, texts = pictures + len(found), texts + sum(stem in beside for stem in found)
        if not within:
            break
    return pictures, texts


def _walk(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `path` down, as '' or a relative path with a slash at the end, and its files, sorted."""
    if is_store(path):
        yield from _walk_store(path)
        return
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        relative = os.path.relpath(folder, path)
        prefix = "" if relative == "." else f"{relative}/"
        yield prefix, sorted(name for name in names if not name.startswith("."))


def _walk_store(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for file in path.walk():  # type: ignore[attr-defined]
        *folders, name = file.relative_to(path).parts
        if not any(part.startswith(".") or part == "__MACOSX" for part in folders) and not name.startswith("."):
            found.setdefault("".join(f"{part}/" for part in folders), []).append(name)
    found.setdefault("", [])
    yield from sorted((prefix, sorted(names)) for prefix, names in found.items())


def _entries(folder: pathlib.Path) -> list[tuple[str, bool]]:
    """Names in `folder`, sorted, and whether each is a folder."""
    if is_store(folder):
        return sorted((path.name, path.is_dir()) for path in folder.iterdir())
    return [(name, is_picture(name) and (folder / name).is_dir()) for name in sorted(os.listdir(folder))]


def _raise(error: OSError):
    raise error


def read_names(path: pathlib.Path) -> dict[str, str]:
    """Names of category folders: a JSON object, or lines `n01440764 tench, Tinca tinca`; the first name is used.

    ValueError if the file is neither.
    """
    place = one_line(path)
    data = read_bytes(path, _MAX_NAMES)
    try:
        text = decode_text(data)
    except ValueError as error:
        raise ValueError(f"{place} is {error}") from None
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not valid JSON: {one_line(error)}") from None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{place} must be an object that maps folders to names")
    else:
        names = dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2)
    if not names:
        raise ValueError(f"{place} has no names of folders; expected lines such as `n01440764 tench, Tinca tinca`")
    return {folder: name.split(",")[0].strip() for folder, name in names.items()}
