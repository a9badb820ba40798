"""Parquet files of the Hub's data sets: rows of texts, with pictures set aside."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from evals.items import ImageRef
from evals.read.pictures import FilePicture, Spool
from janus_jax.io.messages import did_you_mean, one_line


def read_parquet(
    paths: Sequence[pathlib.Path], columns: Sequence[str], images: Sequence[str] = (), optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of `paths` in order: `columns` ("" for null) and `optional`, and `images` as tuples of `ImageRef`.

    A column of `images` holds pictures, lists of them, or nothing; those that end in `_1`, `_2` may be absent. The rows
    of all files share one spool. `place` of a row is its file and number. ValueError without pyarrow, for a file that
    cannot be read, or for columns that are not there; OSError if the machine cannot read it.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{one_line(paths[0])}: reading parquet files needs pyarrow; pip install pyarrow") from None
    spool, rows = Spool(), []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                there = file.schema_arrow.names
                _check_columns(path, there, [*columns, *images])
                wanted = [name for name in (*columns, *optional, *images) if name in there]
                number = 0
                for batch in file.iter_batches(batch_size=64, columns=wanted):
                    for row in batch.to_pylist():
                        place = f"{one_line(path, 500)} row {number}"
                        for name in set(images) & set(row):
                            row[name] = _pictures(row[name], place, path.parent, spool)
                        for name in columns:
                            row[name] = "" if row[name] is None else row[name]
                        rows.append({**row, "place": place})
                        number += 1
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{one_line(path)} is not a parquet file that can be read: {one_line(error)}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"{one_line(path)} is not a parquet file that can be read: {one_line(error)}") from None
    return rows


def _check_columns(path: pathlib.Path, there: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in there and name[-2:-1] != "_"]
    if missing:
        hints = "".join(did_you_mean(name, there) for name in missing)
        listed = ", ".join(map(one_line, there[:30]))
        raise ValueError(f"{one_line(path)} has no column {', '.join(missing)}{hints}; it has {listed}")


def _pictures(value: Any, place: str, folder: pathlib.Path, spool: Spool) -> tuple[ImageRef, ...]:
    """Pictures as `datasets` stores them: {"bytes", "path"}, bytes alone, or a list of either."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(each for one in value for each in _pictures(one, place, folder, spool))
    if isinstance(value, dict):
        if value.get("bytes") is None:
            return (FilePicture(folder / value["path"]),) if value.get("path") else ()
        value = value["bytes"]
    if not isinstance(value, bytes):
        raise ValueError(f"{place}: a picture is {type(value).__name__}, not bytes")
    return (spool.keep(value, f"the picture of {place}"),)
