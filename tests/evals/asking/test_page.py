"""report.html: one file that fetches nothing, in which nothing of the data can run."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re

import pytest
from PIL import Image

from evals.evaluate import Evaluation
from evals.reports.page import page
from tests.evals.asking.toy import Toy, write_data

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    task, data = Toy(), write_data(tmp_path_factory.mktemp("data"), two=True)
    loaded = task.load(data, "report")
    items = list(loaded.items)
    items[1] = dataclasses.replace(items[1], fields={**items[1].fields, "question": HOSTILE})
    replies = {item.id: "A right" if number % 2 else HOSTILE for number, item in enumerate(items)}
    replies[items[2].id] = None
    scores = task.score(items, replies, "report")
    return Evaluation(task, "report", loaded, items, replies, [], scores, [], None)


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_rows_failures_first(evaluation):
    data = data_of(page({"model": "m"}, [evaluation]))
    rows = data["tasks"][0]["rows"]
    assert len(rows) == 21
    assert [row["outcome"] for row in rows] == ["wrong"] * 11 + ["right"] * 10
    row = next(row for row in rows if row["item"] == evaluation.items[1].id)
    assert row["question"] == HOSTILE and row["gold"] == "A" and row["extracted"] == "A"
    assert next(row for row in rows if row["item"] == evaluation.items[2].id)["reply"] == "(could not be asked)"
    two = next(row for row in rows if row["item"] == "two")
    assert len(two["pictures"]) == 2


def test_each_picture_once_and_small(evaluation):
    data = data_of(page({"model": "m"}, [evaluation, evaluation]))
    assert len(data["pictures"]) == 3 and len(data["tasks"]) == 2
    for text in data["pictures"].values():
        image = Image.open(io.BytesIO(base64.b64decode(text.removeprefix("data:image/jpeg;base64,"))))
        assert max(image.size) <= 160


def test_nothing_runs_and_nothing_is_fetched(evaluation):
    text = page({"model": HOSTILE}, [evaluation])
    assert text.count("<script") == 2 and text.count("</script>") == 2
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert "onerror" not in re.sub(r"&lt;.*?&gt;", "", outside)
    assert not re.search(r'(src|href)="?(http|//)', text) and "default-src 'none'" in text
    assert "innerHTML" not in text


def test_at_most_so_many(evaluation):
    text = page({"model": "m"}, [evaluation], most=5)
    rows = data_of(text)["tasks"][0]["rows"]
    assert [row["outcome"] for row in rows] == ["wrong"] * 5
    assert "5 of 21 items here" in text


def test_pictures_that_cannot_be_read(evaluation, tmp_path):
    item = evaluation.items[0]
    broken = dataclasses.replace(item.images[0], path=tmp_path / "none.png")
    changed = dataclasses.replace(
        evaluation, items=[dataclasses.replace(item, images=(broken,)), *evaluation.items[1:]]
    )
    data = data_of(page({"model": "m"}, [changed]))
    assert sorted(map(bool, data["pictures"].values())) == [False, True, True, True]
