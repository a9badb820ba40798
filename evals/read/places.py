"""Where a benchmark's files lie in a folder of data."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence

from evals.read.pictures import is_file
from janus_jax.io.messages import one_line

# Parts of a data set's name in the Hub's cache and in downloads: datasets--lmms-lab--POPE, lmms-lab___POPE.
_SEPARATORS = re.compile(r"--|___|__")
_ANYWHERE = ("lmudata", "snapshots", "data")


def plain(name: str) -> str:
    """`name` without owner, case and punctuation: `datasets--lmms-lab--SEED-Bench` is `seedbench`.

    >>> plain("datasets--lmms-lab--SEED-Bench")
    'seedbench'
    """
    return re.sub(r"[^a-z0-9]", "", _SEPARATORS.split(name)[-1].lower())


def folders(data: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """`data`, and the folders in it (two levels down) that have one of `names`, see `plain`.

    ValueError if `data` is no folder.
    """
    if not data.is_dir():
        raise ValueError(f"{one_line(data)} is not a folder; --data names the folder of the benchmarks' files")
    found = [data]
    for inner in _inner(data):
        if plain(inner.name) in (*names, *_ANYWHERE):
            found.append(inner)
        found += [each for each in _inner(inner) if plain(each.name) in names]
    return list(dict.fromkeys(found))


def _inner(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir())


def first_file(places: Iterable[pathlib.Path], names: Sequence[str]) -> pathlib.Path | None:
    """The first file of one of `names` in `places`, by name first."""
    places = list(places)
    return next((place / name for name in names for place in places if is_file(place / name)), None)


def tables(names: Sequence[str]) -> list[str]:
    """File names of VLMEvalKit's tables; a table beyond a gigabyte has a sibling whose pictures are files."""
    return [f"{name}{suffix}.tsv" for name in names for suffix in ("", "_local")]


def parquet_files(
    places: Sequence[pathlib.Path], names: Sequence[str], split: str, config: str = ""
) -> list[pathlib.Path]:
    """The parquet files of a data set's `split` (`test-00000-of-00003.parquet`), below a folder of one of `names`.

    `config` is the folder between, or part of its name; "" takes any. The first folder that has some is taken.
    """
    for place in places:
        if plain(place.name) not in names:
            continue
        found = sorted(
            path
            for path in place.rglob(f"{split}*.parquet")
            if re.fullmatch(rf"{re.escape(split)}(-.*)?\.parquet", path.name)
            and (not config or config in path.relative_to(place).parts[:-1])
        )
        if found:
            # Of several snapshots in the Hub's cache, the first.
            roots = {path.relative_to(place).parts[:2] for path in found if "snapshots" in path.parts}
            return [path for path in found if not roots or path.relative_to(place).parts[:2] == min(roots)]
    return []


def missing(title: str, data: pathlib.Path, expected: Sequence[str]) -> ValueError:
    """The error that says what is missing, and where it is published."""
    return ValueError(f"{title}: no data in {one_line(data)}; expected {'; or '.join(expected)}")


def picture_folder(candidates: Iterable[pathlib.Path], some_name: str) -> pathlib.Path | None:
    """The first of `candidates` that has the file `some_name`."""
    return next((folder for folder in candidates if is_file(folder / some_name)), None)
