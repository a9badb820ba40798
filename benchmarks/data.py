"""Measures how fast data are prepared and assembled, how full rows are, and how many cores a pod needs.

    python -m benchmarks.data

Writes synthetic photographs (JPEG, 640 x 480) and texts in every format, prepares each on one core, and assembles rows
of `7b_stage3` (4096 tokens, images of 384 pixels) from the result. All figures are for one core, in CPU seconds rather
than wall-clock time. VQ encoding is left out, since it runs on the accelerator.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import tarfile
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.io.messages import print_any_text
from janus_jax.processing.chat import Processor
from train.config import TASKS
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.overrides import load_config
from train.plan.flops import peak_flops, step_flops
from train.prepare import prepare
from train.raw.sources import open_source

SAMPLES = 192  # of each kind and format
CHIPS, HOSTS = 128, 32  # a v5p-256 has 256 cores on 128 chips, four chips a host
MFU = 0.5
_STEPS = 6
_ROWS = 16  # assembled a step
_WORDS = (
    "a",
    "small",
    "red",
    "house",
    "stands",
    "beside",
    "the",
    "river",
    "where",
    "many",
    "birds",
    "fly",
    "at",
    "night",
)


def main() -> None:
    print_any_text()
    config = load_config("7b_stage3")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder / "tokenizer", image_size=384, num_image_tokens=576)
        processor = Processor.from_folder(folder / "tokenizer", config.model)
        print(f"{SAMPLES} samples a format; JPEG photographs of 640 x 480, {len(_photo(0)) / 1024:.0f} KiB each\n")
        print("| source | kind | samples/s per core |\n|---|---|---|")
        prepared = _prepare_all(folder, processor)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **prepared))
        _assemble(config, processor)


def _prepare_all(folder: pathlib.Path, processor: Processor) -> dict[str, tuple[str, ...]]:
    """Prepares every format, prints its rate; returns a prepared folder of each kind."""
    kept: dict[str, tuple[str, ...]] = {}
    codes = np.zeros((32, processor.config.gen_vision.num_tokens), np.int32)
    for number, (kind, format, write) in enumerate(_FORMATS):
        path = write(folder / f"source{number}")
        source = open_source(path, format)
        out = folder / f"prepared{number}"
        options = {"encode": lambda images: codes} if kind == "generation" else {}
        start = time.process_time()
        report = prepare(source, out, kind, processor, workers=1, progress=False, **options)
        rate = report.read / (time.process_time() - start)
        print(f"| {format} | {kind} | {rate:.0f} |", flush=True)
        kept.setdefault(kind, (str(out),))
    return kept


def _assemble(config, processor: Processor) -> None:
    data = config.data
    print("\n| rows assembled from | rows/s per core | samples a row | fill |\n|---|---|---|---|")
    rates = {}
    ratios = {"understanding": (1, 0, 0), "text": (0, 1, 0), "generation": (0, 0, 1), "7b_stage3": data.ratio}
    for name, ratio in ratios.items():
        mixture = Mixture(
            dataclasses.replace(data, ratio=ratio), _ROWS if name != "7b_stage3" else config.batch_size, 0
        )
        assembler = Assembler(
            mixture, processor.settings, processor.tokenizer.pad_id, processor.tokenizer.image_placeholder_id
        )
        fill, seconds = [], 0.0
        for step in range(_STEPS):
            start = time.process_time()
            mixture.plan(step)
            planned = time.process_time()
            _, report = assembler(step, range(_ROWS))
            # The assembler plans once more, which is counted apart.
            seconds += (time.process_time() - planned) - (planned - start)
            fill.append(report["tokens"] / (mixture.batch_size * data.context))
        rates[name] = _STEPS * _ROWS / seconds
        print(
            f"| {name} | {rates[name]:.1f} | {report['samples'] / mixture.batch_size:.2f} | {np.mean(fill):.1%} |",
            flush=True,
        )
    start = time.process_time()
    for step in range(_STEPS):
        mixture.plan(100 + step)
    planning = (time.process_time() - start) / _STEPS

    batch, report = assembler(0, range(_ROWS))
    share = config.batch_size / _ROWS
    image_targets = (batch["tasks"] == TASKS["generation"]).sum() * share
    text_targets = (batch["tasks"] > 0).sum() * share - image_targets
    flops = step_flops(config, report["tokens"], report["images"], text_targets, image_targets, report["sample_length"])
    seconds = flops / (CHIPS * MFU * peak_flops("TPU v5p"))
    # Every host plans whole steps and then makes its own rows of them.
    needed = (config.batch_size / rates["7b_stage3"] + HOSTS * planning) / seconds
    print(
        f"\n7b_stage3 on a v5p-256 ({CHIPS} chips, {HOSTS} hosts) at {MFU:.0%} MFU: {flops / 1e15:.1f} PFLOP and "
        f"{seconds:.2f} s a step, {config.batch_size / seconds:.0f} rows/s\n"
        f"planning a step of {config.batch_size} rows: {planning * 1e3:.0f} ms\n"
        f"cores needed: {needed:.1f} over all hosts, {needed / HOSTS:.2f} a host"
    )


# ---------------------------------------------------------------- synthetic sources


@functools.cache
def _photo(number: int) -> bytes:
    """A JPEG about as hard to decode as a photograph: smooth shapes and some grain."""
    rng = np.random.default_rng(number % 16)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    pixels = np.clip(np.asarray(coarse, np.int16) + rng.normal(0, 6, (480, 640, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(_WORDS, words))


def _lines(
    path: pathlib.Path, record: Callable[[int, np.random.Generator], dict], samples: int = SAMPLES
) -> pathlib.Path:
    rng = np.random.default_rng(0)
    path.write_text("".join(json.dumps(record(i, rng)) + "\n" for i in range(samples)), encoding="utf-8")
    return path


def _photos(folder: pathlib.Path, samples: int = SAMPLES):
    folder.mkdir(parents=True)
    for i in range(samples):
        (folder / f"{i}.jpg").write_bytes(_photo(i))


def _llava(folder: pathlib.Path) -> pathlib.Path:
    _photos(folder)

    def record(i: int, rng: np.random.Generator) -> dict:
        turns = [{"from": "human", "value": "<image>\n" + _text(rng, 10)}]
        turns.append({"from": "gpt", "value": _text(rng, int(rng.integers(5, 120)))})
        return {"image": f"{i}.jpg", "conversations": turns}

    return _lines(folder / "llava.jsonl", record)


def write_captions(folder: pathlib.Path, samples: int = SAMPLES) -> pathlib.Path:
    """Photographs in `folder`, and the file with their captions, which is returned."""
    _photos(folder, samples)
    return _lines(folder / "captions.jsonl", lambda i, rng: {"image": f"{i}.jpg", "caption": _text(rng, 12)}, samples)


def _webdataset(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(SAMPLES):
            for suffix, content in (("jpg", _photo(i)), ("txt", _text(rng, 12).encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "00000.tar"


def _parquet(folder: pathlib.Path) -> pathlib.Path:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    columns = {"image": [_photo(i) for i in range(SAMPLES)], "caption": [_text(rng, 12) for _ in range(SAMPLES)]}
    parquet.write_table(pyarrow.table(columns), folder / "part.parquet")
    return folder / "part.parquet"


def _folders(folder: pathlib.Path) -> pathlib.Path:
    for i in range(SAMPLES):
        path = folder / ("goldfish", "volcano")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_photo(i))
    return folder


def _chat(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)

    def record(i: int, rng: np.random.Generator) -> dict:
        answer = {"role": "assistant", "content": _text(rng, int(rng.integers(20, 500)))}
        return {"messages": [{"role": "user", "content": _text(rng, 12)}, answer]}

    return _lines(folder / "chat.jsonl", record)


def _plain(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    return _lines(folder / "text.jsonl", lambda i, rng: {"text": _text(rng, int(rng.integers(20, 600)))})


_FORMATS = (
    ("understanding", "llava", _llava),
    ("understanding", "captions", write_captions),
    ("text", "chat", _chat),
    ("text", "text", _plain),
    ("generation", "captions", write_captions),
    ("generation", "webdataset", _webdataset),
    ("generation", "parquet", _parquet),
    ("generation", "folders", _folders),
)

if __name__ == "__main__":
    main()
