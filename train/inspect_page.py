"""The page of `train.inspect --html`: a single file, without scripts or external resources."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from janus_jax.io.messages import one_line
from janus_jax.processing.images import open_image
from train.data.prepared import Prepared
from train.data.views import View, stored_codes

_SIDE = 320  # pixels of an image on the page
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; --trained: #2e9e4433; --edge: #2e9e44; --mark: #7a5cc0; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1.2rem 0; }
article h2 { font-size: 1rem; margin: 0 0 .2rem; }
.place, .facts, figcaption { color: var(--dim); font-size: .85rem; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
figure { margin: 0; max-width: 320px; }
figure img { max-width: 100%; display: block; border: 1px solid var(--line); }
figure img.codes { image-rendering: pixelated; width: 160px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0 0; font: 14px/1.55 ui-monospace, monospace; }
mark { background: var(--trained); color: inherit; border-bottom: 2px solid var(--edge); }
.mark { color: #fff; background: var(--mark); border-radius: 4px; padding: 0 .35em; font-size: .85em; }
mark .mark { outline: 2px solid var(--edge); }
.key { display: flex; flex-wrap: wrap; gap: 1.2rem; font-size: .9rem; }
"""


Decode = Callable[[np.ndarray], np.ndarray]  # from codes [num_tokens] to uint8 [h, w, 3]


def page(folder: Prepared, views: Sequence[View], decode: Decode | None = None) -> str:
    """HTML of `views`; everything that comes from data is escaped. Codes are shown as images if `decode` is given."""
    name = html.escape(one_line(folder.folder))
    tokens = int(folder.lengths.sum(dtype=np.int64))
    whole = f"{len(folder):,} {folder.kind} samples, {tokens:,} tokens; {len(views):,} of them here"
    note = (
        "Text samples: all tokens are trained on, unless the run says data.text_loss=answers."
        if folder.kind == "text"
        else ""
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Nothing is fetched and nothing runs, whatever the data contain.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>{name}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{name}</h1><p class='facts'>{whole}. {note}</p>",
            "<p class='key'><span><mark>trained on</mark></span><span><span class='mark'>image</span> an image</span>"
            "<span><mark><span class='mark'>codes</span></mark> the codes of an image to draw</span></p>",
            *(_article(view, decode) for view in views),
            "</body></html>",
            "",
        ]
    )


def _article(view: View, decode: Decode | None) -> str:
    sample = view.sample
    facts = f"{sample.length:,} tokens, {view.trained_tokens:,} trained on"
    figures = [_picture(number, image) for number, image in enumerate(sample.images, 1)]
    figures += [_codes(name, codes, decode) for name, codes in stored_codes(sample).items()]
    short = f"<p class='facts'>cut to its first sentence: {_escape(view.short)}</p>" if view.short else ""
    pictures = f"<div class='pictures'>{''.join(figures)}</div>" if figures else ""
    return (
        f"<article><h2>Sample {view.index:,}: {html.escape(sample.kind)}</h2>"
        f"<div class='place'>{html.escape(one_line(sample.place, 1000)) or 'place not kept'}</div>"
        f"<div class='facts'>{facts}</div>{pictures}<pre>{_text(view)}</pre>{short}</article>"
    )


def _text(view: View) -> str:
    made, number = [], 0
    for piece in view.pieces:
        if piece.kind == "text":
            shown = _escape(piece.text)
        else:
            number += piece.kind == "image"
            stored = [f"{len(codes)} {name}" for name, codes in stored_codes(view.sample).items()]
            label = f"image {number}" if piece.kind == "image" else ", ".join(stored)
            shown = f"<span class='mark'>{label}</span>"
        made.append(f"<mark>{shown}</mark>" if piece.trained else shown)
    return "".join(made)


def _escape(text: str) -> str:
    """`text` for HTML, line by line as one can read it: control characters are written as escapes."""
    return "\n".join(html.escape(one_line(line, 100_000)) for line in text.split("\n"))


def _picture(number: int, image: bytes) -> str:
    try:
        opened = open_image(image)
    except (ValueError, OSError) as error:
        return f"<figure><figcaption>image {number}: damaged ({html.escape(one_line(error))})</figcaption></figure>"
    told = f"image {number}: {opened.width} x {opened.height}, {len(image):,} bytes"
    opened.thumbnail((_SIDE, _SIDE))
    return f"<figure><img src='{_uri(opened)}' alt='image {number}'><figcaption>{told}</figcaption></figure>"


def _codes(name: str, codes: np.ndarray, decode: Decode | None) -> str:
    """The image of the codes, or a map of colors, which shows whether they vary as in an image."""
    told = f"{len(codes)} {name}, {len(np.unique(codes))} distinct"
    if decode is not None:
        image = Image.fromarray(decode(codes))
        return f"<figure><img src='{_uri(image)}' alt='{name}'><figcaption>{told}</figcaption></figure>"
    side = int(len(codes) ** 0.5)
    rows = codes if side * side == len(codes) else codes[: side * side]
    hashed = (rows.astype(np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    colors = np.stack([(hashed >> np.uint64(shift)) & np.uint64(255) for shift in (24, 16, 8)], -1)
    uri = _uri(Image.fromarray(colors.astype(np.uint8).reshape(side, side, 3)))
    told += ", a color each"
    return f"<figure><img class='codes' src='{uri}' alt='{name}'><figcaption>{told}</figcaption></figure>"


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
