"""report.html: pictures, questions, replies and verdicts of an evaluation to look through, in one file.

Nothing is fetched from anywhere. Questions and replies are data in the page, which its script puts in as text only, so
that nothing in them can run.
"""

from __future__ import annotations

import base64
import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from evals.evaluate import Evaluation
from evals.items import ImageRef, Item
from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file
from janus_jax.processing.images import open_image

PAGE = "report.html"
_SIDE = 160  # pixels of a thumbnail
MOST_ROWS = 2000  # of a benchmark, failures first: browsers are slow with more
_MOST_TEXT = 4000  # characters of a question or a reply
_ORDER = {"wrong": 0, "unjudged": 1, "scored": 2, "right": 3}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.facts { color: var(--dim); font-size: .85rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top; }
th { cursor: pointer; position: sticky; top: 0; background: Canvas; } th.sorted::after { content: " \\2193"; }
th.sorted.up::after { content: " \\2191"; }
td { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 26rem; font-size: .9rem; }
td img { max-width: 160px; display: block; margin-bottom: .2rem; }
tr.wrong td.outcome { color: #c33; } tr.right td.outcome { color: #2a8a3c; } tr.unjudged td.outcome { color: #a70; }
input { font: inherit; padding: .2rem .5rem; width: 20rem; }
"""

_SCRIPT = """
const page = JSON.parse(document.getElementById('data').textContent);
const columns = ['item', 'question', 'gold', 'reply', 'extracted', 'outcome', 'score'];
for (const task of page.tasks) {
  const section = document.getElementById(task.id), body = section.querySelector('tbody');
  const filter = section.querySelector('input'), heads = [...section.querySelectorAll('th[data-column]')];
  let by = null, up = true;
  const draw = () => {
    const wanted = filter.value.toLowerCase();
    let rows = task.rows.filter(r => !wanted || columns.some(c => String(r[c]).toLowerCase().includes(wanted)));
    if (by) rows = [...rows].sort((a, b) => (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0) * (up ? 1 : -1));
    body.replaceChildren(...rows.map(row => {
      const line = document.createElement('tr'), seen = document.createElement('td');
      line.className = row.outcome;
      for (const key of row.pictures) {
        const picture = document.createElement('img');
        if (page.pictures[key]) { picture.src = page.pictures[key]; picture.loading = 'lazy'; seen.append(picture); }
      }
      line.append(seen);
      for (const name of columns) {
        const cell = document.createElement('td');
        cell.className = name;
        cell.textContent = row[name];
        line.append(cell);
      }
      return line;
    }));
  };
  for (const head of heads) head.addEventListener('click', () => {
    up = by === head.dataset.column ? !up : true;
    by = head.dataset.column;
    for (const other of heads) other.className = other === head ? (up ? 'sorted' : 'sorted up') : '';
    draw();
  });
  filter.addEventListener('input', draw);
  draw();
}
"""


def write_page(out: pathlib.Path, identity: Mapping[str, Any], done: Sequence[Evaluation]) -> None:
    """Writes report.html of these evaluations."""
    write_file(out / PAGE, page(identity, done).encode("utf-8", "backslashreplace"))


def page(identity: Mapping[str, Any], done: Sequence[Evaluation], most: int = MOST_ROWS) -> str:
    """The page: at most `most` items of each evaluation, failures first."""
    shown = [(evaluation, _first(evaluation, most)) for evaluation in done]
    pictures = {image.key: image for _, items in shown for item in items for image in item.images}
    numbered = {key: str(number) for number, key in enumerate(pictures)}
    data = {
        "pictures": {numbered[key]: thumbnail(image) for key, image in pictures.items()},
        "tasks": [
            {"id": f"task{number}", "rows": [_row(evaluation, item, numbered) for item in items]}
            for number, (evaluation, items) in enumerate(shown)
        ],
    }
    # `</script>` in a reply would end the script that holds the data.
    text = json.dumps(data).replace("<", "\\u003c")
    name = html.escape(one_line(identity.get("model", "")))
    heads = ("item", "question", "gold", "reply", "extracted", "outcome", "score")
    head = "<th>picture</th>" + "".join(f'<th data-column="{column}">{column}</th>' for column in heads)
    sections = []
    for number, (evaluation, items) in enumerate(shown):
        title = html.escape(f"{evaluation.task.title}, protocol {evaluation.protocol}")
        about = f"{evaluation.loaded.source}; {len(items):,} of {len(evaluation.replies):,} items here, failures first"
        sections.append(
            f'<section id="task{number}"><h2>{title}</h2><p class="facts">{html.escape(one_line(about, 1000))}</p>'
            '<p><input placeholder="show only rows with this text"></p>'
            f"<table><thead><tr>{head}</tr></thead><tbody></tbody></table></section>"
        )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
            f"<title>{name}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{name}</h1>",
            *sections,
            f'<script type="application/json" id="data">{text}</script>',
            f"<script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _first(evaluation: Evaluation, most: int) -> list[Item]:
    """The items to show: those that are wrong, then those that are not judged, then by their score."""
    verdicts = evaluation.scores.verdicts
    there = [item for item in evaluation.items if item.id in verdicts]
    return sorted(there, key=lambda item: (_ORDER[verdicts[item.id].outcome], verdicts[item.id].score))[:most]


def _row(evaluation: Evaluation, item: Item, numbered: Mapping[str, str]) -> dict[str, Any]:
    verdict, reply = evaluation.scores.verdicts[item.id], evaluation.replies.get(item.id)
    return {
        "pictures": [numbered[image.key] for image in item.images],
        "item": item.id,
        "question": _cut(item.fields["question"]),
        "gold": _cut(item.fields["answer"]),
        "reply": "(could not be asked)" if reply is None else _cut(reply),
        "extracted": verdict.extracted,
        "outcome": verdict.outcome,
        "score": verdict.score,
    }


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def thumbnail(image: ImageRef) -> str:
    """A small JPEG as a data URL; "" for a picture that cannot be read."""
    try:
        small = open_image(image.read())
    except (ValueError, OSError):
        return ""
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    small.convert("RGB").save(encoded, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
