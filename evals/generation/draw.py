"""Draws a benchmark's pictures: `python -m evals.generation.draw --benchmark geneval --prompts FILE --out DIR ...`.

A picture depends on the model, its prompt, the seed and its number among the prompt's pictures, and on nothing else:
stopped and started again, the command goes on and ends with the same pictures. What they were drawn with is in a file
beside the folder, and pictures drawn otherwise are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from evals.asking.identity import difference, model_identity
from evals.generation import layouts
from evals.generation.geneval import read_prompts
from evals.progress import Progress
from janus_jax import compilation_cache
from janus_jax.__main__ import mesh_of
from janus_jax.hub import resolve
from janus_jax.io import commands
from janus_jax.io.files import parse_json, read_json, read_json_object, read_text
from janus_jax.io.messages import one_line
from janus_jax.io.stores import local_only
from janus_jax.io.whole.files import write_file
from janus_jax.loading import default_dtype, first_device, load
from janus_jax.sampling.sampler import check_count
from janus_jax.sharding import MESH_AXES
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.quantize import FORMS
from janus_jax.weights.torch_weights import DTYPES

_PER_CALL = 64  # pictures between two writes, unless a batch is larger
_MAX_PROMPT = 1 << 20  # bytes of a file with one prompt

# From prompts and a number of pictures each to the pictures, in order.
Draw = Callable[[Sequence[str], int], Sequence[Image.Image]]


@dataclass(frozen=True)
class Drawing:
    """What is drawn of one prompt; `last` is the file that is there when all of its pictures are."""

    prompt: str
    samples: int
    last: pathlib.Path
    write: Callable[[Sequence[Image.Image]], None]


# ---------------------------------------------------------------- benchmarks


def _geneval(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """evaluation_metadata.jsonl to folders `00000` with `samples/00000.png`."""

    def drawing(number: int, row: Mapping[str, Any]) -> Drawing:
        def write(pictures: Sequence[Image.Image]) -> None:
            layouts.write_geneval(out, number, row, pictures)

        return Drawing(row["prompt"], samples, layouts.geneval_grid(out, number), write)

    return [drawing(number, row) for number, row in enumerate(read_prompts(prompts))]


def _dpg(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """A folder of texts, `ID.txt`, to `ID.png`, four pictures in a square."""
    if samples != 4:
        raise ValueError(f"DPG-Bench takes 4 pictures of a prompt, got --samples {samples}")
    texts = sorted(prompts.glob("*.txt")) if prompts.is_dir() else []
    if not texts:
        raise ValueError(f"{one_line(prompts)} is not a folder of prompts such as partiprompts0.txt")

    def drawing(path: pathlib.Path) -> Drawing:
        def write(pictures: Sequence[Image.Image]) -> None:
            layouts.write_dpg(out, path.stem, pictures)

        return Drawing(read_text(path, _MAX_PROMPT).strip(), samples, out / f"{path.stem}.png", write)

    return [drawing(path) for path in texts]


def _wise(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """WISE's JSON (a file, or a folder of them) to `ID.png`, one picture each."""
    files = sorted(prompts.glob("*.json")) if prompts.is_dir() else [prompts]
    found = []
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise ValueError(f"{one_line(file)} is not a list of prompts")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not isinstance(row.get("Prompt"), str) or "prompt_id" not in row:
                raise ValueError(f"{one_line(file)}: prompt {number} must have Prompt and prompt_id")
            found.append(_single(row["Prompt"], out / f"{int(row['prompt_id'])}.png", samples))
    if not found:
        raise ValueError(f"{one_line(prompts)} has no prompts")
    return found


def _geneval2(prompts: pathlib.Path, out: pathlib.Path, samples: int) -> list[Drawing]:
    """geneval2_data.jsonl to `00000.png` by line, one picture each."""
    found = []
    for number, line in enumerate(filter(str.strip, read_text(prompts).splitlines())):
        row = parse_json(line, f"{one_line(prompts)}:{number + 1}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{one_line(prompts)}:{number + 1} has no prompt")
        found.append(_single(row["prompt"], out / f"{number:05}.png", samples))
    return found


def _single(prompt: str, path: pathlib.Path, samples: int) -> Drawing:
    if samples != 1:
        raise ValueError(f"this benchmark takes 1 picture of a prompt, got --samples {samples}")

    def write(pictures: Sequence[Image.Image]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        layouts.write_picture(path, pictures[0])

    return Drawing(prompt, samples, path, write)


# By name: how to read the prompts, and how many pictures each has.
BENCHMARKS = {"geneval": (_geneval, 4), "dpg": (_dpg, 4), "wise": (_wise, 1), "geneval2": (_geneval2, 1)}


# ---------------------------------------------------------------- drawing


def draw_all(drawings: Sequence[Drawing], draw: Draw, name: str, per_call: int, progress: bool | None = None) -> None:
    """Draws what is not there yet, about `per_call` pictures at a time."""
    left = [each for each in drawings if not each.last.is_file()]
    with Progress(name, len(drawings), len(drawings) - len(left), progress) as shown:
        while left:
            samples = left[0].samples
            count = max(1, per_call // samples)
            some, left = left[:count], left[count:]
            pictures = draw([each.prompt for each in some], samples)
            for number, each in enumerate(some):
                each.write(pictures[number * samples : (number + 1) * samples])
            shown.add(len(some))


def write_map(out: pathlib.Path, drawings: Sequence[Drawing]) -> None:
    """images.json, from prompts to the files of their pictures, as GenEval 2 reads it."""
    files = {each.prompt: str(each.last) for each in drawings}
    write_file(out / "images.json", (json.dumps(files, indent=1) + "\n").encode())


def settle(out: pathlib.Path, ours: Mapping[str, Any]) -> None:
    """Writes what pictures in `out` are drawn with beside it; ValueError if there are some drawn otherwise."""
    path = out.with_name(f"{out.name}.drawing.json")
    there = read_json_object(path, missing_ok=True)
    if there and (said := difference(there, ours)):
        raise ValueError(f"{one_line(out)} holds pictures that were drawn otherwise: {said}; choose another --out")
    if not there:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(ours, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m evals.generation.draw", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument(
        "--prompts", type=pathlib.Path, required=True, metavar="PATH", help="its file or folder of them"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--samples", type=int, metavar="N", help="pictures of a prompt (default: the benchmark's)")
    parser.add_argument("--limit", type=int, metavar="N", help="draw only the first prompts")
    parser.add_argument("--seed", type=int, default=42, help="for each prompt alike, as GenEval does (default 42)")
    parser.add_argument("--cfg-weight", type=float, default=5.0, help="weight of guidance (default 5)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on CPU")
    parser.add_argument("--weights", choices=FORMS, help="quantized weights in the decoder (default: as --dtype)")
    parser.add_argument("--adapter", metavar="DIR", help="a low-rank adapter in PEFT's files")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=f"device mesh over {', '.join(MESH_AXES)}")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at a time (default: what fits)")
    args = parser.parse_args(argv)
    return commands.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    for name in ("samples", "limit", "batch_size"):
        if getattr(args, name) is not None:
            check_count("--" + name.replace("_", "-"), getattr(args, name))
    out = local_only(args.out)
    read, samples = BENCHMARKS[args.benchmark]
    samples = args.samples or samples
    every = read(args.prompts, out, samples)
    drawings = every[: args.limit]
    folder = resolve(args.model)
    dtype = args.dtype or default_dtype(first_device(None))
    weights = args.weights or open_checkpoint(folder, quantized=True).weights
    identity = model_identity(args.model, folder, dtype=dtype, weights=weights, adapter=args.adapter)
    how = {"cfg_weight": args.cfg_weight, "temperature": args.temperature, "seed": args.seed}
    texts = "\0".join(each.prompt for each in every).encode("utf-8", "surrogatepass")
    about = {"benchmark": args.benchmark, "samples": samples, **how}
    settle(out, {**identity, **about, "prompts": hashlib.sha256(texts).hexdigest()[:16]})
    compilation_cache.enable()
    janus = load(args.model, mesh=mesh_of(args.mesh), dtype=args.dtype, weights=args.weights, adapter=args.adapter)

    def draw(prompts: Sequence[str], count: int) -> Sequence[Image.Image]:
        return janus.generate_images(prompts, count, batch_size=args.batch_size, progress=False, **how)

    draw_all(drawings, draw, args.benchmark, max(_PER_CALL, args.batch_size or 0))
    if args.benchmark == "geneval2":
        write_map(out, drawings)
    print(f"{len(drawings):,} of {len(every):,} prompts are drawn in {one_line(out)}")


if __name__ == "__main__":
    commands.leave(main())
