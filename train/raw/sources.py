"""Training data as people have it: `open_source` gives `len()` and `[i]` over any of `FORMATS`.

| format | a sample |
|---|---|
| llava | JSON list or lines: `{"image": "a.jpg" or list, "conversations": [{"from": "human" or "gpt", "value"}]}` |
| chat | JSON list or lines: `{"messages": [{"role", "content"}], "images": [...] if any}`; or OpenAI's lists of parts |
| text | JSON list or lines: `{"text"}`; or a .txt file, which is one document |
| captions | JSON list or lines: `{"image" or "file_name", "caption" or "text"}` |
| webdataset | tar shards of `key.jpg`, `key.txt` or `key.json` with "caption", as img2dataset writes them |
| parquet | rows with the columns of any format above; images as bytes, `{bytes, path}` or paths |
| folders | a folder of images for each category, whose name is the caption |
| sidecar | pictures with a text beside each, `a.jpg` and `a.txt`, in a folder and the folders within it |

All but the last two may be one file, a folder of files or a glob; parquet files may stand where JSON does. Paths of
pictures may not lead out of the data's folder unless `allow_outside`. What the fields mean says `train.raw.fields`.
"""

from __future__ import annotations

import glob
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import nearest, one_line
from train.raw.fields import PARSE, Parse, RawSample, Root, format_of
from train.raw.folders import ImageFolders, Sidecars, count_sidecars, is_picture, read_names
from train.raw.json_files import json_reader
from train.raw.parquet import Parquet
from train.raw.readers import COMPRESSED_SUFFIXES, BadSample, PassedOver, TextFile, listed
from train.raw.tars import TarShard

__all__ = ["FORMATS", "BadSample", "RawSample", "Source", "missing_path", "open_source"]

_JSON = (".json", ".jsonl", ".ndjson")
_SUFFIXES = {
    "llava": (*_JSON, ".parquet"),
    "chat": (*_JSON, ".parquet"),
    "text": (*_JSON, ".parquet", ".txt"),
    "captions": (*_JSON, ".parquet"),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
    "folders": (),
    "sidecar": (),
}
FORMATS = tuple(_SUFFIXES)
# The datasets library's name for a file about the pictures beside it.
_METADATA = "metadata.jsonl"


class Source:
    """Random access to the samples of several readers, one after the other; `[i]` raises BadSample for a bad one.

    Attributes:
      description: what was read: path, format, samples, bytes.
      why: how the format was chosen.
      passed_over: files that belong to no sample.
    """

    def __init__(
        self,
        readers: Sequence[Any],
        parse: Parse,
        roots: Sequence[Root],
        description: dict[str, Any],
        why: str = "",
        passed_over: PassedOver | None = None,
    ):
        self._readers, self._parse, self._roots = readers, parse, roots
        self._ends = np.cumsum([len(reader) for reader in readers])
        self.description = description | {"samples": len(self)}
        self.why, self.passed_over = why, passed_over or PassedOver()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawSample:
        return self._sample(index, self._roots)

    def anywhere(self, index: int) -> RawSample:
        """`[index]` as with `allow_outside`, to tell what the data are: its pictures are not to be read."""
        return self._sample(index, [Root(root.folder, allow_outside=True) for root in self._roots])

    def _sample(self, index: int, roots: Sequence[Root]) -> RawSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        place, record = self._readers[number][index - (int(self._ends[number - 1]) if number else 0)]
        return self._parse(record, roots[number], place)

    def __str__(self) -> str:
        """What is read, as what and why, for people."""
        said = self.description
        line = f"{one_line(said['path'])} is read as {said['format']} ({self.why}): {len(self):,} samples"
        if self.passed_over.count:
            line += f"; passed over: {self.passed_over.count:,} files of no sample, such as {self.passed_over.first}"
        return line


def open_source(
    path: str | os.PathLike,
    format: str | None = None,
    images: str | os.PathLike | None = None,
    names: str | os.PathLike | None = None,
    allow_outside: bool = False,
) -> Source:
    """Opens training data.

    Args:
      path: file, folder or glob.
      format: one of `FORMATS`; None guesses it from the files' names and the first records.
      images: the folder that image paths start from; None means that of the file which names them.
      names: for `folders`, a file of names for them, see `folders.read_names`.
      allow_outside: whether paths of pictures may lead out of that folder (absolute, by `..`, by links).
    Raises: FileNotFoundError for a path that is not there, ValueError for what is no such data or has no samples.
    """
    if format is not None and format not in FORMATS:
        near = nearest(format, FORMATS)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(FORMATS)}"
        raise ValueError(f"unknown format {format!r}{hint}")
    for folder in (images, names):
        if folder is not None and not pathlib.Path(folder).exists():
            raise missing_path(folder)
    path = pathlib.Path(path)
    format, why = (format, "as was asked for") if format else _guess_by_name(path)
    if names is not None and format != "folders":
        raise ValueError(f"names are for the format folders, and {one_line(path)} is read as {format or 'JSON'}")
    passed = PassedOver()
    if format in ("folders", "sidecar"):
        if images is not None:
            raise ValueError(f"--images says where paths in records start, and {format} has no records")
        if not path.is_dir():
            kind = "folders" if format == "folders" else "pictures"
            raise missing_path(path) if not path.exists() else ValueError(f"{one_line(path)} is not a folder of {kind}")
        categories = read_names(pathlib.Path(names)) if names else None
        files, readers = [], [ImageFolders(path, categories) if format == "folders" else Sidecars(path)]
        roots = [Root(path, allow_outside)]
    else:
        files = _files(path, _SUFFIXES[format] if format else _JSON, passed)
        readers = [_reader(file, format) for file in files]
        folders = {file.parent: Root(pathlib.Path(images or file.parent), allow_outside) for file in files}
        roots = [folders[file.parent] for file in files]
    for reader in readers:
        if more := getattr(reader, "passed_over", None):
            passed = PassedOver(passed.count + more.count, passed.first or more.first)
    if not any(len(reader) for reader in readers):
        told = f" of the format {format}" if format else ""
        more = f", only {passed.count} other files such as {passed.first}" if passed.count else ""
        raise ValueError(f"{one_line(path)} is empty: it holds no samples{told}{more}")
    if format is None or format == "parquet":
        meaning, fields = _guess_by_records(path, readers)
        why = f"it has {fields}" if format is None else f"{why}, and it has {fields}"
        format = format or meaning
    else:
        meaning = format
    size = sum(file.stat().st_size for file in files)
    return Source(readers, PARSE[meaning], roots, {"path": str(path), "format": format, "bytes": size}, why, passed)


def missing_path(path: str | os.PathLike) -> FileNotFoundError:
    """The error for a path that is not there, naming the nearest one that is."""
    path = pathlib.Path(path)
    part = path
    while not part.parent.exists():
        part = part.parent
    try:
        near = nearest(part.name, [child.name for child in part.parent.iterdir()])
    except OSError:
        near = []
    hint = f"; did you mean {one_line(part.parent / near[0])}?" if near else ""
    return FileNotFoundError(f"{one_line(path)}: there is no such file or folder{hint}")


# ---------------------------------------------------------------- files


def _files(path: pathlib.Path, suffixes: Sequence[str], passed: PassedOver) -> list[pathlib.Path]:
    """The files of `path` that have one of `suffixes`; of its other files, those that are no pictures are `passed`."""
    if path.is_dir():
        children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
        found = [child for child in children if child.suffix.lower() in suffixes and not child.is_dir()]
        metadata = path / _METADATA
        if metadata in found:
            found = [metadata]  # other JSON beside it is about the data set
        elif not found and ".jsonl" in suffixes:
            found = sorted(path.glob(f"*/{_METADATA}"))
        for child in children:
            if child not in found and not child.is_dir() and not is_picture(child.name):
                passed.add(child.name)
        if not found:
            compressed = [child for child in children if child.suffix.lower() in COMPRESSED_SUFFIXES]
            if compressed:
                raise _compressed(compressed[0])
            raise ValueError(f"{one_line(path)} is empty: it holds no {' or '.join(suffixes)} file")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        found = sorted(pathlib.Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))
        if not found:
            raise FileNotFoundError(f"no file matches {one_line(path)}")
        return found
    raise missing_path(path)


def _compressed(path: pathlib.Path) -> ValueError:
    return ValueError(
        f"{one_line(path)} is compressed, and samples are read from anywhere in a file: unpack it first "
        "(gunzip, unxz, unzstd or unzip)"
    )


def _reader(file: pathlib.Path, format: str | None) -> Any:
    open_regular(file).close()
    suffix = file.suffix.lower()
    if suffix == ".parquet" or format == "parquet":
        return Parquet(file)
    if format == "webdataset":
        return TarShard(file)
    return TextFile(file) if suffix == ".txt" else json_reader(file)


# ---------------------------------------------------------------- guessing


def _guess_by_name(path: pathlib.Path) -> tuple[str | None, str]:
    """The format that the files' names tell, and how; None where they are JSON, whose records will."""
    if path.is_dir():
        return _guess_folder(path)
    suffix = path.suffix.lower()
    if suffix in COMPRESSED_SUFFIXES:
        raise _compressed(path) if path.exists() or glob.has_magic(str(path)) else missing_path(path)
    known = {".tar": "webdataset", ".parquet": "parquet", ".txt": "text"}
    if suffix in known:
        return known[suffix], f"by its ending {suffix}"
    if suffix in _JSON:
        return None, ""
    if not path.exists() and not glob.has_magic(str(path)):
        raise missing_path(path)
    raise _untold(path)


def _guess_folder(path: pathlib.Path) -> tuple[str | None, str]:
    children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if not children:
        raise ValueError(f"{one_line(path)} is empty")
    folders = [child for child in children if child.is_dir()]
    # What img2dataset writes about the shards or folders of pictures beside it.
    about = {f"{child.stem if child.suffix == '.tar' else child.name}{end}" for child in children for end in _ABOUT}
    names = [child.name for child in children if not child.is_dir() and child.name not in about]
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if ".tar" in suffixes:
        return "webdataset", "it holds .tar files"
    if ".parquet" in suffixes:
        return "parquet", "it holds .parquet files"
    if _METADATA in names or any((folder / _METADATA).is_file() for folder in folders):
        return None, ""
    for folder in (path, *folders):
        if (folder / "metadata.csv").is_file():
            told = "captions in a .csv are not read: write metadata.jsonl, a line {file_name, text} a picture"
            raise ValueError(f"{one_line(folder / 'metadata.csv')}: {told}")
    own, own_texts = count_sidecars(path, within=False)
    stems = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    others = [name for name in names if name.lower().endswith(_JSON) and os.path.splitext(name)[0] not in stems]
    if own_texts and others:
        told = f"both {one_line(others[0])} and texts beside the pictures: say which with --format"
        raise ValueError(f"{one_line(path)} holds {told}")
    if suffixes & set(_JSON) and (others or not own):
        return None, ""
    if own or any(_holds_images(folder) for folder in folders):
        pictures, texts = count_sidecars(path)
        if suffixes & set(_JSON) and own and not own_texts:
            texts = pictures  # a JSON beside each picture
        if 2 * texts >= pictures:
            return "sidecar", f"{texts:,} of {pictures:,} pictures have a text beside them"
        if texts:
            told = f"{texts:,} of {pictures:,} pictures have a text beside them: say --format sidecar or folders"
            raise ValueError(f"{one_line(path)}: {told}")
        if any(_holds_images(folder) for folder in folders):
            return "folders", "it holds folders of pictures without texts"
        raise ValueError(f"{one_line(path)} holds pictures, but neither texts beside them nor a file of captions")
    if ".txt" in suffixes:
        return "text", "it holds .txt files"
    if compressed := [child for child in children if child.suffix.lower() in COMPRESSED_SUFFIXES]:
        raise _compressed(compressed[0])
    raise _untold(path)


_ABOUT = (".parquet", "_stats.json")


def _untold(path: pathlib.Path) -> ValueError:
    told = f"cannot tell the format by its name; say which: {', '.join(FORMATS)}"
    return ValueError(f"{one_line(path)}: {told}")


def _holds_images(folder: pathlib.Path) -> bool:
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) for entry in entries)


def _guess_by_records(path: pathlib.Path, readers: Sequence[Any]) -> tuple[str, str]:
    """The format that the fields of the first records tell, and those fields."""
    reader = next(reader for reader in readers if len(reader))
    if isinstance(reader, Parquet):
        fields = reader.columns
        if found := format_of(fields, reader.path.name == "metadata.parquet"):
            return found, f"the columns {listed(fields)}"
        told = f"the columns {listed(fields)} are of no format; see `FORMATS` in train/raw/sources.py"
        raise ValueError(f"{one_line(path)}: {told}")
    problem = ""
    for index in range(min(len(reader), 10)):
        try:
            place, record = reader[index]
        except BadSample as error:
            problem = problem or str(error)
            continue
        name = record.get("file_name")
        if found := format_of(record, isinstance(name, str) and is_picture(os.path.basename(name))):
            return found, f"the fields {listed(record)}"
        problem = problem or f"{place} has the fields {listed(record)}"
    raise ValueError(f"{one_line(path)}: cannot tell the format ({problem}); say which: {', '.join(FORMATS)}")
