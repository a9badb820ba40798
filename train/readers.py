"""Files of records: each reader has `len()` and `[i]`, which gives a record's place, for messages, and its fields.

Readers hold an index and no open file, so that threads may share them. What is wrong with one record is raised, as
`BadSample`, when that one is asked for.
"""

from __future__ import annotations

import json
import os
import pathlib
import tarfile
from typing import Any

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

Record = tuple[str, dict[str, Any]]


class BadSample(ValueError):
    """A sample that cannot be used: `reason` (a short stable key), `place` (file and line or so), `detail`."""

    def __init__(self, reason: str, place: str, detail: str):
        detail = " ".join(detail.split())  # one line, whatever a library says
        super().__init__(reason, place, detail)
        self.reason, self.place, self.detail = reason, place, detail

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}: {self.detail}"


def _as_object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise BadSample("bad_json", place, f"expected an object, found {type(value).__name__}")
    return place, value


# ---------------------------------------------------------------- text files


def json_reader(path: pathlib.Path) -> JsonLines | JsonList:
    """The reader of a JSON file: a list of objects, or an object on each line."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return JsonList(path) if start.startswith(b"[") else JsonLines(path)


class JsonLines:
    """An object on each line; blank lines do not count."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        spans, begin = [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    spans.append((begin, len(line), number))
                begin += len(line)
        self._spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        begin, size, number = map(int, self._spans[index])
        place = f"{self.path}:{number}"
        try:
            return _as_object(json.loads(_read(self.path, begin, size)), place)
        except BadSample:
            raise
        except (ValueError, RecursionError) as error:
            raise BadSample("bad_json", place, str(error)) from None


class JsonList:
    """One JSON list of objects, held in memory."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._records = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return _as_object(self._records[index], f"{self.path}[{index}]")


class TextFile:
    """A text file, which is one document."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        try:
            return str(self.path), {"text": self.path.read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            raise BadSample("bad_unicode", str(self.path), f"not UTF-8 ({error})") from None


class ImageFolders:
    """A folder of images for each category; `names` maps folders to names, else a folder is called as it is."""

    def __init__(self, path: pathlib.Path, names: dict[str, str] | None = None):
        self.path = path
        folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        if names is not None and (unnamed := [folder.name for folder in folders if folder.name not in names]):
            raise ValueError(f"the names lack {len(unnamed)} of the folders in {path}, {unnamed[0]!r} for one")
        self._names = [names[folder.name] if names else folder.name.replace("_", " ") for folder in folders]
        self._images = [
            (category, f"{folder.name}/{image}")
            for category, folder in enumerate(folders)
            for image in sorted(os.listdir(folder))
            if image.lower().endswith(IMAGE_SUFFIXES) and not image.startswith(".")
        ]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        category, image = self._images[index]
        place = self.path / image
        return str(place), {"image": str(place.absolute()), "caption": self._names[category]}


def read_names(path: pathlib.Path) -> dict[str, str]:
    """Names of category folders: a JSON object, or lines `n01440764 tench, Tinca tinca`; the first name counts.

    ValueError where the file is neither.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{path} must be an object of folder: name")
    else:
        names = dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2)
    if not names:
        raise ValueError(f"{path} names no folder; expected lines such as `n01440764 tench, Tinca tinca`")
    return {folder: name.split(",")[0].strip() for folder, name in names.items()}


# ---------------------------------------------------------------- tar


class TarShard:
    """A tar file of `key.jpg`, `key.txt`, `key.json` (as img2dataset writes them), indexed by one scan of its headers.

    Of a tar that was cut short the whole samples are read; its lost end counts as one more, bad sample.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        members, self._broken = _scan_tar(path)
        spans: dict[str, list[int]] = {}  # begin and size of image, text, JSON; -1 for none
        for name, begin, size in members:
            key, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            kind = 0 if suffix in IMAGE_SUFFIXES else {".txt": 1, ".json": 2}.get(suffix)
            if kind is not None:
                spans.setdefault(key, [-1] * 6)[2 * kind : 2 * kind + 2] = begin, size
        if self._broken and spans:
            # The cut may have gone through the last sample: without an image or a text it is part of what was lost.
            key, span = next(reversed(spans.items()))
            if span[0] < 0 or (span[2] < 0 and span[4] < 0):
                del spans[key]
        self._keys = np.array(list(spans), np.str_)
        self._spans = np.array(list(spans.values()), np.int64).reshape(-1, 3, 2)

    def __len__(self) -> int:
        return len(self._keys) + bool(self._broken)

    def __getitem__(self, index: int) -> Record:
        if index == len(self._keys):
            raise BadSample("truncated_tar", str(self.path), self._broken)
        place = f"{self.path}/{self._keys[index]}"
        image, text, fields = (
            _read(self.path, int(begin), int(size)) if begin >= 0 else None for begin, size in self._spans[index]
        )
        try:
            if text is not None:
                caption = text.decode("utf-8")
            else:
                caption = _as_object(json.loads(fields or b"{}"), place)[1].get("caption")
        except UnicodeDecodeError as error:
            raise BadSample("bad_unicode", place, f"the text is not UTF-8 ({error})") from None
        except json.JSONDecodeError as error:
            raise BadSample("bad_json", place, str(error)) from None
        return place, {"image": image, "caption": caption}


def _scan_tar(path: pathlib.Path) -> tuple[list[tuple[str, int, int]], str]:
    """Name, begin and size of the whole files in a tar, and what is wrong with its end, '' if nothing."""
    found: list[tuple[str, int, int]] = []
    file_size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps them all
                if member.offset_data + member.size > file_size:
                    return found, f"cut short within {member.name}"
                if member.isfile():
                    found.append((member.name, member.offset_data, member.size))
            # tarfile takes whatever is no header for the end; the end of a whole tar is a block of zeros.
            if _read(path, tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                after = f" after {found[-1][0]}" if found else ""
                return found, f"no end of archive{after}, so it was cut short or damaged there"
    except tarfile.TarError as error:
        after = f" after {found[-1][0]}" if found else ""
        return found, f"not a readable tar{after} ({error})"
    return found, ""


def _read(path: pathlib.Path, begin: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(size)
