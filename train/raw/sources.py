"""Training data as people have it: `open_source` gives `len()` and `[i]` over files of any of `FORMATS`.

A *format* is what holds records, and how they are read from it:

| format | its records |
|---|---|
| json | one list of objects, or an object on each line (.json, .jsonl, .ndjson) |
| csv | rows under a first row that names the fields (.csv, .tsv) |
| parquet | rows of a table; images as bytes, `{bytes, path}` or paths |
| txt | one document |
| webdataset | tar shards of `key.jpg`, `key.txt` or `key.json` with "caption", as img2dataset writes them |
| folders | a folder of images for each category, whose name is the caption |
| sidecar | pictures with a text beside each, `a.jpg` and `a.txt`, in a folder and the folders within it |

A *schema* is what the fields of a record mean (`train.raw.fields`); txt is of the schema text, and the last three of
the schema captions:

| schema | a record |
|---|---|
| llava | `{"image": "a.jpg" or list, "conversations": [{"from": "human" or "gpt", "value"}]}` |
| chat | `{"messages": [{"role", "content"}], "images": [...] if any}`; or OpenAI's lists of parts |
| text | `{"text"}` |
| captions | `{"image" or "file_name", "caption" or "text"}` |

All formats but the last two may be one file, a folder of files or a glob. Paths of pictures may not lead out of the
data's folder unless `allow_outside`.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import nearest, one_line
from train.raw.csv_files import CsvFile
from train.raw.fields import SCHEMAS, Parse, RawSample, Root, schema_of
from train.raw.folders import ImageFolders, Sidecars, count_sidecars, is_picture, read_names
from train.raw.json_files import json_reader
from train.raw.parquet import Parquet
from train.raw.readers import COMPRESSED_SUFFIXES, BadSample, PassedOver, TextFile, listed
from train.raw.tars import TarShard

__all__ = ["FORMATS", "NAMES", "SCHEMAS", "BadSample", "RawSample", "Source", "missing_path", "open_source"]


@dataclasses.dataclass(frozen=True)
class Format:
    """What holds records.

    Attributes:
      reader: opens a file of it, or a folder where it has no endings.
      endings: of its files.
      schema: of its records; '' where their fields tell.
    """

    reader: Callable[..., Any]
    endings: tuple[str, ...] = ()
    schema: str = ""


# A new format is a reader in a module of its own (see `train.raw.readers`) and a row here.
FORMATS: dict[str, Format] = {
    "json": Format(json_reader, (".json", ".jsonl", ".ndjson")),
    "csv": Format(CsvFile, (".csv", ".tsv")),
    "parquet": Format(Parquet, (".parquet",)),
    "txt": Format(TextFile, (".txt",), "text"),
    "webdataset": Format(TarShard, (".tar",), "captions"),
    "folders": Format(ImageFolders, schema="captions"),
    "sidecar": Format(Sidecars, schema="captions"),
}
NAMES = (*FORMATS, *SCHEMAS)  # what `open_source` takes as a format
# The datasets library's names for a file about the pictures beside it.
_METADATA = ("metadata.jsonl", "metadata.csv")


class Source:
    """Random access to the samples of several readers, one after the other; `[i]` raises BadSample for a bad one.

    Attributes:
      description: what was read: path, format, schema, samples, bytes.
      why: how format and schema were chosen.
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
        what = f"{said['schema']} in {said['format']}"
        line = f"{one_line(said['path'])} is read as {what} ({self.why}): {len(self):,} samples"
        if self.passed_over.count:
            line += f"; passed over: {self.passed_over.count:,} files of no sample, such as {self.passed_over.first}"
        return line


def open_source(
    path: str | os.PathLike,
    format: str | None = None,
    images: str | os.PathLike | None = None,
    names: str | os.PathLike | None = None,
    allow_outside: bool = False,
    schema: str | None = None,
) -> Source:
    """Opens training data.

    Args:
      path: file, folder or glob.
      format: one of `FORMATS`; None tells it by the files' names. One of `fields.SCHEMAS` stands for that schema in
        whatever format the files are.
      images: the folder that image paths start from; None means that of the file which names them.
      names: for `folders`, a file of names for them, see `folders.read_names`.
      allow_outside: whether paths of pictures may lead out of that folder (absolute, by `..`, by links).
      schema: one of `fields.SCHEMAS`; None tells it by the fields of the first records.
    Raises: FileNotFoundError for a path that is not there, ValueError for what is no such data or has no samples.
    """
    for name, known in ((format, NAMES), (schema, tuple(SCHEMAS))):
        if name is not None and name not in known:
            near = nearest(name, known)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown {'format' if known is NAMES else 'schema'} {name!r}{hint}")
    if format in SCHEMAS:
        if schema not in (None, format):
            raise ValueError(f"the schema {format} stands where the format should, and {schema} beside it: which one?")
        format, schema = None, format
    for folder in (images, names):
        if folder is not None and not pathlib.Path(folder).exists():
            raise missing_path(folder)
    path = pathlib.Path(path)
    if format is None and schema is not None and path.is_dir():
        endings, why = _endings_of(path, schema), "as was asked for"
    else:
        format, why = (format, "as was asked for") if format else _guess_by_name(path)
        endings = FORMATS[format].endings
    if format and schema and FORMATS[format].schema not in ("", schema):
        raise ValueError(f"{one_line(path)}: {format} holds {FORMATS[format].schema}, not {schema}")
    if names is not None and format != "folders":
        raise ValueError(f"names are for the format folders, and {one_line(path)} is read as {format or schema}")
    passed = PassedOver()
    if format and not endings:
        if images is not None:
            raise ValueError(f"--images says where paths in records start, and {format} has no records")
        if not path.is_dir():
            kind = "folders" if format == "folders" else "pictures"
            raise missing_path(path) if not path.exists() else ValueError(f"{one_line(path)} is not a folder of {kind}")
        categories = [read_names(pathlib.Path(names))] if names else []
        files, readers = [], [FORMATS[format].reader(path, *categories)]
        roots, used = [Root(path, allow_outside)], [format]
    else:
        files = _files(path, endings, passed)
        used = [format or _format_of(file) for file in files]
        readers = [_reader(file, name) for file, name in zip(files, used, strict=True)]
        folders = {file.parent: Root(pathlib.Path(images or file.parent), allow_outside) for file in files}
        roots = [folders[file.parent] for file in files]
    for reader in readers:
        if more := getattr(reader, "passed_over", None):
            passed = PassedOver(passed.count + more.count, passed.first or more.first)
    if not any(len(reader) for reader in readers):
        told = f" of the format {format}" if format else ""
        more = f", only {passed.count} other files such as {passed.first}" if passed.count else ""
        raise ValueError(f"{one_line(path)} is empty: it holds no samples{told}{more}")
    if schema is None and not (schema := FORMATS[used[0]].schema):
        schema, fields = _guess_by_records(path, readers)
        why = f"{why}, and it has {fields}"
    size = sum(file.stat().st_size for file in files)
    formats = " and ".join(dict.fromkeys(used))
    description = {"path": str(path), "format": formats, "schema": schema, "bytes": size}
    return Source(readers, SCHEMAS[schema], roots, description, why, passed)


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


def _files(path: pathlib.Path, endings: Sequence[str], passed: PassedOver) -> list[pathlib.Path]:
    """The files of `path` that have one of `endings`; of its other files, those that are no pictures are `passed`."""
    if path.is_dir():
        children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
        found = [child for child in children if child.suffix.lower() in endings and not child.is_dir()]
        for name in (name for name in _METADATA if name.endswith(tuple(endings))):
            if path / name in found:
                found = [path / name]  # other files beside it are about the data set
            elif not found:
                found = sorted(path.glob(f"*/{name}"))
        for child in children:
            if child not in found and not child.is_dir() and not is_picture(child.name):
                passed.add(child.name)
        if not found:
            compressed = [child for child in children if child.suffix.lower() in COMPRESSED_SUFFIXES]
            if compressed:
                raise _compressed(compressed[0])
            raise ValueError(f"{one_line(path)} is empty: it holds no {' or '.join(endings)} file")
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


def _reader(file: pathlib.Path, format: str) -> Any:
    open_regular(file).close()
    return FORMATS[format].reader(file)


# ---------------------------------------------------------------- guessing


def _format_of(path: pathlib.Path) -> str:
    """The format that the ending of a file's name tells."""
    suffix = path.suffix.lower()
    for name, format in FORMATS.items():
        if suffix in format.endings:
            return name
    if suffix in COMPRESSED_SUFFIXES:
        raise _compressed(path)
    if path.exists():
        open_regular(path).close()  # what is no file at all is told first
    raise _untold(path)


def _endings_of(path: pathlib.Path, schema: str) -> tuple[str, ...]:
    """Of what files in a folder records of `schema` are: tables as text only where there is nothing else."""
    formats = {name: format for name, format in FORMATS.items() if format.endings and format.schema in ("", schema)}
    endings = tuple(end for name, format in formats.items() if name != "csv" for end in format.endings)
    try:
        _files(path, endings, PassedOver())
    except ValueError:
        return (*endings, *FORMATS["csv"].endings)
    return endings


def _guess_by_name(path: pathlib.Path) -> tuple[str, str]:
    """The format that the files' names tell, and how."""
    if path.is_dir():
        return _guess_folder(path)
    if not path.exists() and not glob.has_magic(str(path)):
        raise missing_path(path)
    return _format_of(path), f"by its ending {path.suffix.lower()}"


def _guess_folder(path: pathlib.Path) -> tuple[str, str]:
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
    json, csv = FORMATS["json"].endings, FORMATS["csv"].endings
    for name, format in zip(_METADATA, ("json", "csv"), strict=True):
        if name in names or any((folder / name).is_file() for folder in folders):
            return format, f"it holds {name}"
    own, own_texts = count_sidecars(path, within=False)
    stems = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    others = [name for name in names if name.lower().endswith(json) and os.path.splitext(name)[0] not in stems]
    if own_texts and others:
        told = f"both {one_line(others[0])} and texts beside the pictures: say which with --format"
        raise ValueError(f"{one_line(path)} holds {told}")
    if suffixes & set(json) and (others or not own):
        return "json", "it holds JSON"
    if suffixes & set(csv) and not own_texts and not any(_holds_images(folder) for folder in folders):
        return "csv", "it holds .csv or .tsv files"
    if own or any(_holds_images(folder) for folder in folders):
        pictures, texts = count_sidecars(path)
        if suffixes & set(json) and own and not own_texts:
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
        return "txt", "it holds .txt files"
    if compressed := [child for child in children if child.suffix.lower() in COMPRESSED_SUFFIXES]:
        raise _compressed(compressed[0])
    raise _untold(path)


_ABOUT = (".parquet", "_stats.json")


def _untold(path: pathlib.Path) -> ValueError:
    told = f"cannot tell the format by its name; say which with --format: {', '.join(FORMATS)}"
    return ValueError(f"{one_line(path)}: {told}")


def _holds_images(folder: pathlib.Path) -> bool:
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) for entry in entries)


def _guess_by_records(path: pathlib.Path, readers: Sequence[Any]) -> tuple[str, str]:
    """The schema that the fields of the first records tell, and those fields."""
    reader = next(reader for reader in readers if len(reader))
    if isinstance(reader, Parquet):
        fields = reader.columns
        if found := schema_of(fields, reader.path.name == "metadata.parquet"):
            return found, f"the columns {listed(fields)}"
        told = f"the columns {listed(fields)} are of no schema that is known: {', '.join(SCHEMAS)}"
        raise ValueError(f"{one_line(path)}: {told}")
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
        f"{one_line(path)}: cannot tell the schema ({problem}); say which with --schema: {', '.join(SCHEMAS)}"
    )
