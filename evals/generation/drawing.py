"""Draws a benchmark's pictures, each of which depends on the model, its prompt, the seed and its number alone.

What pictures were drawn with is in a file beside their folder, and pictures drawn otherwise are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from evals.asking.identity import difference
from evals.generation.prompts import Drawing
from evals.hosts import is_first, together
from evals.progress import Progress
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file
from janus_jax.pipeline import JanusPipeline
from janus_jax.processes import gather
from janus_jax.sampling.sampler import Options, check_count

_PER_CALL = 64  # or as many as a batch has
DRAWN_WITH = ("seed", "cfg_weight", "temperature")  # of `How`: other values make other pictures

# From prompts and a number of pictures each to the pictures, in order.
Draw = Callable[[Sequence[str], int], Sequence[Image.Image]]


@dataclasses.dataclass(frozen=True)
class How:
    """How pictures are drawn: what makes other pictures of the same prompts, and how many at a time."""

    seed: int = 42
    cfg_weight: float = 5.0
    temperature: float = 1.0
    batch_size: int | None = None

    @property
    def per_call(self) -> int:
        """Pictures between two writes."""
        return max(_PER_CALL, self.batch_size or 0)

    def about(self) -> dict[str, Any]:
        """What tells these pictures from others."""
        return {name: getattr(self, name) for name in DRAWN_WITH}

    @staticmethod
    def add_options(parser: argparse._ActionsContainer, batch_size: str = "--batch-size") -> None:
        """Options by name; `batch_size` is that of the number of pictures at a time."""
        parser.add_argument(
            "--seed", type=int, help="of each prompt's pictures, for all prompts alike, as GenEval has it (default 42)"
        )
        parser.add_argument("--cfg-weight", type=float, help="weight of guidance (default 5)")
        parser.add_argument("--temperature", type=float, help="default 1")
        parser.add_argument(
            batch_size,
            dest="pictures_at_a_time",
            type=int,
            metavar="N",
            help=f"pictures at a time (default: what fits, up to {_PER_CALL})",
        )

    @staticmethod
    def given(args: argparse.Namespace) -> dict[str, Any]:
        """The options that are there, by the name of the attribute; those of what is drawn, not of how many."""
        there = {name: getattr(args, name) for name in DRAWN_WITH}
        return {name: value for name, value in there.items() if value is not None}

    @classmethod
    def of(cls, args: argparse.Namespace) -> How:
        """Of parsed options. ValueError for a setting out of range."""
        if args.pictures_at_a_time is not None:
            check_count("the number of pictures at a time", args.pictures_at_a_time)
        how = cls(**cls.given(args), batch_size=args.pictures_at_a_time)
        Options(**how.about())
        return how


def drawn_with(
    identity: Mapping[str, Any], benchmark: str, samples: int, how: How, drawings: Sequence[Drawing]
) -> dict[str, Any]:
    """What tells pictures of all these `drawings` from others; `identity` is the model's."""
    texts = "\0".join(each.prompt for each in drawings).encode("utf-8", "surrogatepass")
    about = {"benchmark": benchmark, "samples": samples, **how.about()}
    return {**identity, **about, "prompts": hashlib.sha256(texts).hexdigest()[:16]}


def brush(janus: Callable[[], JanusPipeline], how: How) -> Draw:
    """The model as it draws; it is asked for when there is something to draw."""

    def draw(prompts: Sequence[str], count: int) -> Sequence[Image.Image]:
        given = {"batch_size": how.batch_size, "progress": False, **how.about()}
        return janus().generate_images(prompts, count, **given)

    return draw


def draw_all(
    drawings: Sequence[Drawing], draw: Draw, name: str, per_call: int = _PER_CALL, progress: bool | None = None
) -> None:
    """Draws what is not there yet, about `per_call` pictures between two writes.

    On several processes all of them call this and draw the same. The first one writes, and then those that do not see
    its files, so that afterwards every host has the pictures.
    """
    left = missing(drawings)
    progress = progress if is_first() else False
    with Progress(name, len(drawings), len(drawings) - len(left), progress) as shown:
        while left:
            samples = left[0].samples
            count = max(1, per_call // samples)
            some, left = left[:count], left[count:]
            pictures = draw([each.prompt for each in some], samples)
            for first in (True, False):
                with together():
                    for number, each in enumerate(some if is_first() == first else ()):
                        if not each.last.is_file():
                            each.write(pictures[number * samples : (number + 1) * samples])
            shown.add(len(some))


def missing(drawings: Sequence[Drawing]) -> list[Drawing]:
    """What some process does not have yet."""
    own = [number for number, each in enumerate(drawings) if not each.last.is_file()]
    found = {number for told in gather(json.dumps(own)) for number in json.loads(told)}
    return [drawings[number] for number in sorted(found)]


def write_map(out: pathlib.Path, drawings: Sequence[Drawing]) -> None:
    """images.json, from prompts to the files of their pictures, as GenEval 2 reads it."""
    files = {each.prompt: str(each.last) for each in drawings}
    write_file(out / "images.json", (json.dumps(files, indent=1) + "\n").encode())


def settled(out: pathlib.Path) -> pathlib.Path:
    """The file beside the folder `out` that says what the pictures in it are drawn with."""
    return out.with_name(f"{out.name}.drawing.json")


def settle(out: pathlib.Path, ours: Mapping[str, Any]) -> None:
    """Writes what pictures in `out` are drawn with beside it; ValueError if there are some drawn otherwise."""
    path = settled(out)
    there = read_json_object(path, missing_ok=True)
    if there and (said := difference(there, ours)):
        raise ValueError(f"{one_line(out)} holds pictures that were drawn otherwise: {said}; choose another --out")
    if not there:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(ours, indent=1) + "\n").encode())
