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

# Replies to questions with OPTIONS, and what VLMEvalKit, lmms-eval on MMBench and lmms-eval on SEED-Bench take them to
# mean: a letter, Z for a refusal, or nothing.
OPTIONS = {"A": "cat", "B": "dog", "C": "blue bird", "D": "fish"}
LETTER_REPLIES = [
    ("A", "A", "A", "A"),
    ("B.", "B", "B", "B"),
    ("(C)", "C", "C", "("),
    ("D) fish", "D", "D", "D"),
    ("The answer is B", "B", "B", "T"),
    ("The answer is **C**.", "C", "", "T"),
    ("A cat", "A", "A", "A"),
    ("A dog is in the picture", "B", "B", "A"),
    # 38 characters, twice as many as the options have; then one more.
    ("It is B because dogs bark loudly today", "B", "B", "I"),
    ("It is B because dogs bark loudly today.", "", "B", "I"),
    ("The correct answer is B since the thing that barks at night is such an animal", "B", "B", "T"),
    ("the answer is b", "", "", "T"),
    ("A or B", "", "", "A"),
    ("Z", "Z", "", "Z"),
    ("Sorry, I can't help with images of people yet.", "Z", "", "S"),
    ("Cannot determine the answer, maybe A", "Z", "", "C"),
    ("I can't process this file.", "Z", "", "I"),
    ("I'm sorry, but without the image provided I guess D", "Z", "D", "I"),
    ("Failed to obtain answer via API", "", "", "F"),
    ("cat", "A", "A", "C"),
    ("cat or dog", "", "", "C"),
    ("a blue bird", "C", "C", "A"),
    ("E", "", "E", "E"),
    ("", "", "", ""),
    ("A, B", "", "B", "A"),
    ("C: blue bird", "C", "C", "C"),
    (":D", "D", "D", ":"),
    ("Option (A).", "A", "A", "O"),
    ("Answer: A", "A", "A", "A"),
    ("#A", "A", "", "#"),
    ("{B}", "B", "", "{"),
    ("'B'", "", "", "'"),
    ("B-dog", "B", "B", "B"),
    ("correct answer is **D** as far as the whole long text of this goes on and on", "D", "", "C"),
    ("The answer is A. B is wrong and so are the other ones", "A", "B", "T"),
]
