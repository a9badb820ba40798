"""Small files of benchmarks in their public formats, made by tests."""

from __future__ import annotations

import base64
import csv
import functools
import io
import pathlib
from typing import Any

from PIL import Image


@functools.cache
def picture(number: int) -> bytes:
    """A small PNG, another one for each number."""
    file = io.BytesIO()
    # Large enough that its base64 is no reference to another row.
    Image.new("RGB", (24, 16), (number * 37 % 256, number * 91 % 256, number % 256)).save(file, "PNG")
    return file.getvalue()


def base64_of(number: int) -> str:
    return base64.b64encode(picture(number)).decode()


def write_tsv(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """As pandas' to_csv(sep="\\t", index=False) writes it; the columns are those of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def stored(number: int) -> dict[str, Any]:
    """A picture as `datasets` stores it in parquet."""
    return {"bytes": picture(number), "path": f"{number}.png"}


# Replies to questions of yes or no, and what VLMEvalKit, lmms-eval on POPE, lmms-eval on MME, and POPE's script take
# them to say: "yes", "no", or neither.
YES_NO_REPLIES = [
    ("Yes", "yes", "yes", "yes", "yes"),
    ("No", "no", "no", "no", "no"),
    ("yes", "yes", "yes", "yes", "yes"),
    (" yes \n", "yes", "yes", "yes", "yes"),
    ("NO", "no", "no", "no", "yes"),
    ("Yes.", "yes", "", "yes", "yes"),
    ("No.", "no", "", "no", "no"),
    ("YES!", "yes", "", "yes", "yes"),
    ("**Yes**", "", "", "", "yes"),
    ("Yes, there is a dog.", "yes", "", "yes", "yes"),
    ("No, there is no dog.", "no", "", "no", "no"),
    ("There is no dog.", "no", "", "", "no"),
    ("There is not a dog", "", "", "", "no"),
    ("Not sure", "", "", "no", "yes"),
    ("Yes or no", "", "", "yes", "no"),
    ("", "", "", "", "yes"),
    ("y", "", "", "yes", "yes"),
    ("n", "", "", "no", "yes"),
    ("x", "", "", "", "yes"),
    ("Yes/No", "", "", "yes", "yes"),
    ("yes-man 3,000", "", "", "yes", "yes"),
    ("Answer:yes", "", "", "", "yes"),
    ("Answer: no.", "no", "", "", "no"),
    ("I think so. No", "no", "", "", "yes"),
    ("no.5", "", "", "no", "no"),
    ("“Yes”", "", "", "yes", "yes"),
    ('"Yes"', "yes", "", "yes", "yes"),
    ("(no)", "no", "", "no", "yes"),
    ("yes yes", "yes", "", "yes", "yes"),
    ("It does not; yes", "yes", "", "", "yes"),
    ("none", "", "", "no", "yes"),
    ("Unknown", "", "", "", "yes"),
    ("." * 32 + "yes.", "", "", "yes", "yes"),
    ("." * 31 + "yes.", "yes", "", "yes", "yes"),
]
