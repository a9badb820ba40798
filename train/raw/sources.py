"""Users' training data in any of `FORMATS`: `open_source` returns a sequence of samples, with `len()` and `[i]`.

A *format* is a kind of file or folder that contains records:

| format | its records |
|---|---|
| json | one list of objects, or an object on each line (.json, .jsonl, .ndjson) |
| csv | rows under a first row that names the fields (.csv, .tsv) |
| parquet | rows of a table; images as bytes, `{bytes, path}` or paths |
| txt | one document |
| webdataset | tar shards of `key.jpg`, `key.txt` or `key.json` with "caption", as img2dataset writes them |
| folders | a folder of images for each category, whose name is the caption |
| sidecar | images with a text file next to each, `a.jpg` and `a.txt`, in a folder and its subfolders |

A *schema* is the meaning of a record's fields (`train.raw.fields`); txt has the schema text; webdataset, folders and
sidecar have the schema captions:

| schema | a record |
|---|---|
| llava | `{"image": "a.jpg" or list, "conversations": [{"from": "human" or "gpt", "value"}]}` |
| chat | `{"messages": [{"role", "content"}], "images": [...] if any}`; or OpenAI's lists of parts |
| text | `{"text"}` |
| captions | `{"image" or "file_name", "caption" or "text"}` |
| pairs | `{"prompt" or "caption", "chosen", "rejected"}`, or Pick-a-Pic's `jpg_0`, `jpg_1`, `label_0`, `label_1` |

All formats but folders and sidecar may be a file, a folder or a glob. Images lie in its folder, or `allow_outside`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import nearest, one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path, has_pattern, matching
from train.raw.csv_files import CsvFile
from train.raw.fields import SCHEMAS, Parse, RawSample, Root, schema_of
from train.raw.folders import ImageFolders, Sidecars, count_sidecars, is_picture, read_names
from train.raw.json_files import json_reader
from train.raw.parquet import Parquet
from train.raw.readers import COMPRESSED_SUFFIXES, BadSample, PassedOver, TextFile, listed, missing_path
from train.raw.tar.shard import TarShard

__all__ = ["FORMATS", "NAMES", "SCHEMAS", "BadSample", "RawSample", "Source", "missing_path", "open_source"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file or folder that contains records.

    Attributes:
      reader: opens a file of this format, or a folder if it has no endings; ValueError if it is none. `len()`, and
        `[i]`: the record's place, for messages, and its fields, or BadSample. Threads share a reader: it keeps an
        index, and no open file. It opens by `open_regular`, and reads no more at a time than it means to keep.
      endings: the endings of its files, in lower case: what follows the last dot of a name, with the dot.
      schema: the schema of its records; '' if it is detected by their fields.
      indexed: whether `reader` takes a folder `index` too, see `train.raw.indices`.
      among_pictures: whether such files, in a folder with pictures, are taken for its records rather than for something
        else about them: if no picture has a text file next to it, and no folder in it holds pictures.
    """

    reader: Callable[..., Any]
    endings: tuple[str, ...] = ()
    schema: str = ""
    indexed: bool = False
    among_pictures: bool = False


# A new format is a reader, such as `readers.TextFile` (a record each) or `CsvFile`, and rows here and in docs/data.md.
FORMATS: dict[str, Format] = {
    "json": Format(json_reader, (".json", ".jsonl", ".ndjson"), indexed=True),
    "csv": Format(CsvFile, (".csv", ".tsv"), indexed=True, among_pictures=True),
    "parquet": Format(Parquet, (".parquet",)),
    "txt": Format(TextFile, (".txt",), "text"),
    "webdataset": Format(TarShard, (".tar",), "captions", indexed=True),
    "folders": Format(ImageFolders, schema="captions"),
    "sidecar": Format(Sidecars, schema="captions"),
}
NAMES = (*FORMATS, *SCHEMAS)  # what `open_source` accepts as a format
_FILES_AT_ONCE = 16  # of a store, while their indices are built; of a disk, one a core
# The datasets library's names for a file about the images next to it.
_METADATA = ("metadata.jsonl", "metadata.csv")


class Source:
    """Random access to the samples of several readers, one after the other; `[i]` raises BadSample for a bad one.

    Attributes:
      description: path, format, schema, number of samples, bytes.
      why: how format and schema were chosen.
      passed_over: ignored files, which belong to no sample.
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
        """`[index]` as with `allow_outside`, to inspect the data; do not read its images."""
        return self._sample(index, [Root(root.folder, allow_outside=True) for root in self._roots])

    def _sample(self, index: int, roots: Sequence[Root]) -> RawSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        place, record = self._readers[number][index - (int(self._ends[number - 1]) if number else 0)]
        return self._parse(record, roots[number], place)

    def __str__(self) -> str:
        """What is read, as what and why, in one line."""
        found = self.description
        what = f"{found['schema']} in {found['format']}"
        line = f"{one_line(found['path'])} is read as {what} ({self.why}): {len(self):,} samples"
        if self.passed_over.count:
            line += f"; ignored: {self.passed_over.count:,} files that belong to no sample, such as "
            line += self.passed_over.first
        return line


def open_source(
    path: str | os.PathLike,
    format: str | None = None,
    images: str | os.PathLike | None = None,
    names: str | os.PathLike | None = None,
    allow_outside: bool = False,
    schema: str | None = None,
    index: str | os.PathLike | None = None,
    begin: float = 0.0,
) -> Source:
    """Opens training data.

    Args:
      path: file, folder or glob, also in a store.
      format: one of `FORMATS`; None detects it by the files' names. One of `fields.SCHEMAS` means that schema in any
        format.
      images: the folder from which image paths start; None means the folder of the file with the paths.
      names: for `folders`, a file of captions for the folders, see `folders.read_names`.
      allow_outside: whether image paths may leave that folder (absolute, by `..`, by links).
      schema: one of `fields.SCHEMAS`; None detects it by the fields of the first records.
      index: a folder, which need not exist, for what is found by reading a whole file: where its records are. It is
        found once, and mapped from then on, whoever opens the same files. None keeps it in memory.
      begin: from 0 to 1, at which of the files to begin: processes that index them together each begin elsewhere.
    Raises: FileNotFoundError if the path does not exist, ValueError if it is not such data or has no samples.
    """
    for name, known in ((format, NAMES), (schema, tuple(SCHEMAS))):
        if name is not None and name not in known:
            near = nearest(name, known)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown {'format' if known is NAMES else 'schema'} {name!r}{hint}")
    if format in SCHEMAS:
        if schema not in (None, format):
            raise ValueError(f"format={format} is a schema, and contradicts schema={schema}; give only one of them")
        format, schema = None, format
    for folder in (images, names):
        if folder is not None and not as_path(folder).exists():
            raise missing_path(folder)
    path = as_path(path)
    if format is None and schema is not None and path.is_dir():
        endings, why = _endings_of(path, schema), "as requested"
    else:
        format, why = (format, "as requested") if format else _guess_by_name(path)
        endings = FORMATS[format].endings
    if format and schema and FORMATS[format].schema not in ("", schema):
        raise ValueError(f"{one_line(path)}: {format} has the schema {FORMATS[format].schema}, not {schema}")
    if names is not None and format != "folders":
        raise ValueError(f"names are for the format folders, but {one_line(path)} is read as {format or schema}")
    passed = PassedOver()
    if format and not endings:
        if images is not None:
            raise ValueError(f"--images is the folder for paths in records, but {format} has no records")
        if not path.is_dir():
            kind = "folders" if format == "folders" else "images"
            raise missing_path(path) if not path.exists() else ValueError(f"{one_line(path)} is not a folder of {kind}")
        categories = [read_names(as_path(names))] if names else []
        files, readers = [], [FORMATS[format].reader(path, *categories)]
        roots, used = [Root(path, allow_outside)], [format]
    else:
        files = _files(path, endings, passed)
        used = [format or _format_of(file) for file in files]
        readers = _readers(files, used, None if index is None else as_path(index), begin)
        folders = {file.parent: Root(as_path(images or file.parent), allow_outside) for file in files}
        roots = [folders[file.parent] for file in files]
    for reader in readers:
        if more := getattr(reader, "passed_over", None):
            passed = PassedOver(passed.count + more.count, passed.first or more.first)
    if not any(len(reader) for reader in readers):
        kind = f" in the format {format}" if format else ""
        more = f", only {passed.count} other files such as {passed.first}" if passed.count else ""
        raise ValueError(f"{one_line(path)} is empty: it has no samples{kind}{more}")
    if schema is None and not (schema := FORMATS[used[0]].schema):
        schema, fields = _guess_by_records(path, readers)
        why = f"{why}, and it has {fields}"
    size = sum(file.stat().st_size for file in files)
    formats = " and ".join(dict.fromkeys(used))
    description = {"path": str(path), "format": formats, "schema": schema, "bytes": size}
    return Source(readers, SCHEMAS[schema], roots, description, why, passed)


# ---------------------------------------------------------------- files


def _files(path: pathlib.Path, endings: Sequence[str], passed: PassedOver) -> list[pathlib.Path]:
    """The files of `path` with one of `endings`; its other files, except images, are added to `passed`."""
    if path.is_dir():
        children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
        found = [child for child in children if child.suffix.lower() in endings and not child.is_dir()]
        for name in (name for name in _METADATA if name.endswith(tuple(endings))):
            if path / name in found:
                found = [path / name]  # other files next to it are about the data set
            elif not found:
                found = sorted(path.glob(f"*/{name}"))
        for child in children:
            if child not in found and not child.is_dir() and not is_picture(child.name):
                passed.add(child.name)
        if not found:
            if compressed := [child for child in children if child.suffix.lower() in COMPRESSED_SUFFIXES]:
                raise _compressed(compressed[0])
            raise ValueError(f"{one_line(path)} is empty: it has no {' or '.join(endings)} file")
        return found
    if path.exists():
        return [path]
    if has_pattern(path):
        if found := matching(path):
            return found
        raise FileNotFoundError(f"no file matches {one_line(path)}")
    raise missing_path(path)


def _compressed(path: pathlib.Path) -> ValueError:
    return ValueError(
        f"{one_line(path)} is compressed, but samples are read at random positions in a file; unpack it first "
        "(gunzip, unxz, unzstd or unzip)"
    )


def _readers(
    files: Sequence[pathlib.Path], formats: Sequence[str], index: pathlib.Path | None, begin: float
) -> list[Any]:
    def reader(number: int) -> Any:
        file, format = files[number], FORMATS[formats[number]]
        open_regular(file).close()
        return format.reader(file, index=index) if format.indexed else format.reader(file)

    first = int(begin * len(files))
    order = [*range(first, len(files)), *range(first)]
    with ThreadPoolExecutor(_FILES_AT_ONCE if is_store(files[0]) else os.cpu_count()) as pool:
        made = dict(zip(order, pool.map(reader, order), strict=True))
    return [made[number] for number in range(len(files))]


# ---------------------------------------------------------------- detecting formats and schemas


def _format_of(path: pathlib.Path) -> str:
    """The format of a file, by the ending of its name."""
    suffix = path.suffix.lower()
    for name, format in FORMATS.items():
        if suffix in format.endings:
            return name
    if suffix in COMPRESSED_SUFFIXES:
        raise _compressed(path)
    if path.exists():
        open_regular(path).close()  # anything that is not a file is reported first
    raise _untold(path)


def _endings_of(path: pathlib.Path, schema: str) -> tuple[str, ...]:
    """Endings of a folder's files that may hold records of `schema`; some only if it has no others."""
    formats = [format for format in FORMATS.values() if format.schema in ("", schema)]
    endings = tuple(end for format in formats if not format.among_pictures for end in format.endings)
    try:
        _files(path, endings, PassedOver())
    except ValueError:
        return tuple(end for format in formats for end in format.endings)
    return endings


def _guess_by_name(path: pathlib.Path) -> tuple[str, str]:
    """The format, by the files' names, and the reason."""
    if path.is_dir():
        return _guess_folder(path)
    if not path.exists() and not has_pattern(path):
        raise missing_path(path)
    return _format_of(path), f"by its ending {path.suffix.lower()}"


def _guess_folder(path: pathlib.Path) -> tuple[str, str]:
    children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if not children:
        raise ValueError(f"{one_line(path)} is empty")
    folders = [child for child in children if child.is_dir()]
    # Files that img2dataset writes about the shards or image folders next to them.
    about = {f"{child.stem if child.suffix == '.tar' else child.name}{end}" for child in children for end in _ABOUT}
    names = [child.name for child in children if not child.is_dir() and child.name not in about]
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if ".tar" in suffixes:
        return "webdataset", "it has .tar files"
    if ".parquet" in suffixes:
        return "parquet", "it has .parquet files"
    json = FORMATS["json"].endings
    for name, format in zip(_METADATA, ("json", "csv"), strict=True):
        if name in names or any((folder / name).is_file() for folder in folders):
            return format, f"it has {name}"
    own, own_texts = count_sidecars(path, within=False)
    stems = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    others = [name for name in names if name.lower().endswith(json) and os.path.splitext(name)[0] not in stems]
    if own_texts and others:
        both = f"both {one_line(others[0])} and text files next to images"
        raise ValueError(f"{one_line(path)} has {both}; choose one with --format")
    if suffixes & set(json) and (others or not own):
        return "json", "it has JSON files"
    pictures_within = any(_holds_images(folder) for folder in folders)
    for format, known in FORMATS.items():
        if known.among_pictures and suffixes & set(known.endings) and not own_texts and not pictures_within:
            return format, f"it has {' or '.join(known.endings)} files"
    if own or pictures_within:
        pictures, texts = count_sidecars(path)
        if suffixes & set(json) and own and not own_texts:
            texts = pictures  # a JSON file next to each image
        if 2 * texts >= pictures:
            return "sidecar", f"{texts:,} of {pictures:,} images have a text file next to them"
        if texts:
            share = f"{texts:,} of {pictures:,} images have a text file next to them"
            raise ValueError(f"{one_line(path)}: {share}; choose --format sidecar or folders")
        if pictures_within:
            return "folders", "it has folders of images without text files"
        raise ValueError(f"{one_line(path)} has images, but neither text files next to them nor a file of captions")
    if ".txt" in suffixes:
        return "txt", "it has .txt files"
    # Formats that need no look at what else the folder holds.
    for format, known in FORMATS.items():
        if found := suffixes & set(known.endings):
            return format, f"it has {sorted(found)[0]} files"
    if compressed := [child for child in children if child.suffix.lower() in COMPRESSED_SUFFIXES]:
        raise _compressed(compressed[0])
    raise _untold(path)


_ABOUT = (".parquet", "_stats.json")


def _untold(path: pathlib.Path) -> ValueError:
    cure = f"choose one with --format: {', '.join(FORMATS)}"
    return ValueError(f"{one_line(path)}: cannot tell the format from its name; {cure}")


def _holds_images(folder: pathlib.Path) -> bool:
    if is_store(folder):
        return any(is_picture(path.name) for path in folder.iterdir())
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) for entry in entries)


def _guess_by_records(path: pathlib.Path, readers: Sequence[Any]) -> tuple[str, str]:
    """The schema of the first records, by their fields, and those fields."""
    reader = next(reader for reader in readers if len(reader))
    if isinstance(reader, Parquet):
        fields = reader.columns
        if found := schema_of(fields, reader.path.name == "metadata.parquet"):
            return found, f"the columns {listed(fields)}"
        known = f"known schemas: {', '.join(SCHEMAS)}"
        raise ValueError(f"{one_line(path)}: the columns {listed(fields)} fit no schema; {known}")
    problem = ""
    for index in range(min(len(reader), 10)):
        try:
            place, record = reader[index]
        except BadSample as error:
            problem = problem or str(error)
            continue
        name = record.get("file_name")
        if found := schema_of(record, isinstance(name, str) and is_picture(os.path.basename(name))):
            return found, f"the fields {listed(record)}"
        problem = problem or f"{place} has the fields {listed(record)}"
    raise ValueError(
        f"{one_line(path)}: cannot tell the schema ({problem}); choose one with --schema: {', '.join(SCHEMAS)}"
    )
