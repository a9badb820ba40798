"""Folders of drawn pictures as the official scorers read them."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file


def grid(pictures: Sequence[Image.Image], per_row: int, padding: int = 0) -> Image.Image:
    """Pictures of one size in rows, from the top left; `padding` black pixels around each, shared by neighbors.

    As torchvision's make_grid, one picture alone has none around it. ValueError for no pictures or for pictures of
    different sizes.
    """
    sizes = {each.size for each in pictures}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs pictures of one size, got {sorted(sizes)}")
    ((width, height),) = sizes
    padding = padding if len(pictures) > 1 else 0
    columns, rows = min(per_row, len(pictures)), -(-len(pictures) // per_row)
    whole = ((width + padding) * columns + padding, (height + padding) * rows + padding)
    made = Image.new("RGB", whole)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, per_row)
        made.paste(picture, (padding + column * (width + padding), padding + row * (height + padding)))
    return made


def geneval_folder(root: pathlib.Path, number: int) -> pathlib.Path:
    """The folder of GenEval's prompt of this line, from 0."""
    return root / f"{number:05}"


def geneval_sample(root: pathlib.Path, number: int, sample: int) -> pathlib.Path:
    """The file of a picture of GenEval's prompt."""
    return geneval_folder(root, number) / "samples" / f"{sample:05}.png"


def write_geneval(root: pathlib.Path, number: int, prompt: Mapping[str, Any], pictures: Sequence[Image.Image]) -> None:
    """A prompt's folder: metadata.jsonl, samples/00000.png and so on, and all of them in grid.png, a row of four.

    The grid is written last: where it is, the folder is complete.
    """
    folder = geneval_folder(root, number)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_file(folder / "metadata.jsonl", json.dumps(prompt).encode())
    for sample, picture in enumerate(pictures):
        write_picture(geneval_sample(root, number, sample), picture)
    write_picture(geneval_grid(root, number), grid(pictures, 4, padding=2))


def geneval_grid(root: pathlib.Path, number: int) -> pathlib.Path:
    """The file of all pictures of GenEval's prompt."""
    return geneval_folder(root, number) / "grid.png"


def write_picture(path: pathlib.Path, picture: Image.Image) -> None:
    """A PNG, whole or not at all."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_file(path, data.getvalue())


def write_dpg(root: pathlib.Path, item: str, pictures: Sequence[Image.Image]) -> None:
    """A picture of DPG-Bench: four samples as a square without borders. ValueError for another number of samples."""
    if len(pictures) != 4:
        raise ValueError(f"{one_line(item)}: DPG-Bench takes four pictures of a prompt, got {len(pictures)}")
    root.mkdir(parents=True, exist_ok=True)
    write_picture(root / f"{item}.png", grid(pictures, 2))


def dpg_tiles(picture: Image.Image, size: int, count: int = 4) -> list[Image.Image]:
    """The first `count` tiles of `size` pixels: top left, top right, bottom left, bottom right."""
    corners = [(0, 0), (size, 0), (0, size), (size, size)][:count]
    return [picture.crop((left, top, left + size, top + size)) for left, top in corners]
