"""Questions/s of an evaluation, here, one question at a time, and in transformers' port on torch in batches.

`python -m benchmarks.evals --preset janus_pro_1b --vs torch` asks POPE's kind of questions, several about each picture,
on sizes of a preset with fewer layers: as `python -m evals.main` asks them, by `janus.chat` in the obvious loop, and by
the port's own `generate` on batches, each row with its picture. Pictures are decoded and resized in all of them.
Weights are random, answers have a fixed length, and a first round over the same shapes does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common

SHARED, ALONE, TORCH = "jax float32 evals", "jax float32 one at a time", "torch float32 batches"
_OBJECTS = ("a dog", "a traffic light", "a dining table", "a wine glass", "a person", "a skateboard")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A random picture."""

    key: str
    data: bytes
    name = "a random picture"

    def read(self) -> bytes:
        return self.data


def make_items(args: argparse.Namespace) -> list[Any]:
    """`args.questions` questions about each of `args.pictures` pictures, as POPE asks them."""
    from PIL import Image

    from evals.items import Item

    rng, items = np.random.default_rng(0), []
    for picture in range(args.pictures):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (480, 640, 3), np.uint8)).save(encoded, "JPEG")
        image = Drawn(str(picture), encoded.getvalue())
        for number in range(args.questions):
            text = f"Is there {_OBJECTS[number % len(_OBJECTS)]} in the image?"
            asked = f"{text}\nAnswer the question using a single word or phrase."
            prompt = f"User: <image_placeholder>\n{asked}\n\nAssistant:"
            items.append(Item(f"{picture}-{number}", prompt, (image,), args.tokens, {"question": asked}))
    return items


def make_processor(config: Any, folder: str) -> Any:
    """A processor of the sizes of `config` with a small tokenizer."""
    from examples.tiny.tokenizer import write_tokenizer
    from janus_jax.processing.chat import Processor

    vision = config.vision
    write_tokenizer(folder, image_size=vision.image_size, num_image_tokens=vision.num_patches)
    return Processor.from_folder(folder, config)


def shortened(args: argparse.Namespace) -> Any:
    """The preset with `args.layers` layers in SigLIP and in the decoder."""
    from janus_jax.config import get_preset

    config = get_preset(args.preset)
    vision = dataclasses.replace(config.vision, layers=min(args.layers, config.vision.layers))
    language = dataclasses.replace(config.language, layers=min(args.layers, config.language.layers))
    return dataclasses.replace(config, vision=vision, language=language)


def time_jax(args: argparse.Namespace, together: bool) -> common.Run:
    """Seconds of all questions, together as `evals` asks them or one at a time."""
    from evals.asking.answers import Respondent
    from janus_jax.pipeline import JanusPipeline

    config = shortened(args)
    model, params = _device.random_model(config, "float32")
    with tempfile.TemporaryDirectory() as folder:
        janus = JanusPipeline(config, params, model, make_processor(config, folder))
    # An answer ends by itself as rarely as on torch, where it may not.
    janus.processor.tokenizer.eos_id = -1
    items = make_items(args)

    def shared(items: Sequence[Any]) -> int:
        respondent = Respondent(janus, args.batch)
        return sum(len(replies.texts) for replies in respondent.ask(items))

    def alone(items: Sequence[Any]) -> int:
        for item in items:
            janus.chat(item.fields["question"], [item.images[0].read()], item.max_new_tokens, system_prompt="")
        return len(items)

    return timed(shared if together else alone, items, items if together else items[:1])


def time_torch(args: argparse.Namespace) -> common.Run:
    """The same on transformers' port, in batches of `args.batch` rows."""
    import torch

    from benchmarks.common import torch as _torch

    config = shortened(args)
    model = _torch.build(config, "float32")
    with tempfile.TemporaryDirectory() as folder:
        processor = make_processor(config, folder)
    placeholder = processor.tokenizer.image_placeholder_id

    def ask(items: Sequence[Any]) -> int:
        for start in range(0, len(items), args.batch):
            rows = items[start : start + args.batch]
            ids, mask = processor.left_pad([processor.prompt_ids(item.prompt, 1) for item in rows])
            # 0 is the image's token there.
            ids = np.where(ids == placeholder, 0, np.maximum(ids, 1))
            pixels = processor.understanding_pixels([item.images[0].read() for item in rows]).transpose(0, 3, 1, 2)
            model.generate(
                torch.tensor(ids).long().to(model.device),
                attention_mask=torch.tensor(mask).to(model.device),
                pixel_values=torch.tensor(pixels.copy()).to(model.device),
                do_sample=False, pad_token_id=1, max_new_tokens=args.tokens, min_new_tokens=args.tokens,
            )  # fmt: skip
        return len(items)

    with torch.inference_mode():
        items = make_items(args)
        return timed(ask, items, items[: args.batch])


def timed(ask: Callable[[Sequence[Any]], int], items: Sequence[Any], first: Sequence[Any]) -> common.Run:
    """Seconds that `ask` takes for `items`, after it has compiled what it needs for `first`."""
    ask(first)
    began, busy = time.perf_counter(), time.process_time()
    count = ask(items)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    if count != len(items):
        raise RuntimeError(f"{count} of {len(items)} questions were answered")
    return {"seconds": seconds, "processor": busy, "questions": count}


def table(runs: common.Runs) -> common.Table:
    """A row for each variant: questions/s, and how many times as fast as each other one we are.

    The processor's time, of all threads, tells more where other programs are running.
    """
    good = common.done(runs)
    others = [variant for variant in good if variant != SHARED]
    names = (f"x {variant}{of}" for variant in others for of in ("", ", processor"))
    rows = [("", "questions/s", "processor s a question", *names)]
    for variant, own in good.items():
        seconds, busy = (common.median(own, key) / own[0]["questions"] for key in ("seconds", "processor"))
        ratios = [common.ratio(good[other], own, key) for other in others for key in ("seconds", "processor")]
        rows.append((variant, *map(common.cell, (1 / seconds, busy, *ratios))))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table of all variants; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("evals", __doc__)
    parser.add_argument("--vs", choices=["torch"], help="measure transformers' port beside ours")
    parser.add_argument("--layers", type=common.count, default=4, help="of SigLIP and decoder (default %(default)s)")
    parser.add_argument("--pictures", type=common.count, default=8, help="(default %(default)s)")
    parser.add_argument("--questions", type=common.count, default=6, help="about each (default %(default)s)")
    parser.add_argument("--batch", type=common.count, default=24, help="rows at a time (default %(default)s)")
    parser.add_argument("--tokens", type=common.count, default=4, help="of an answer (default %(default)s)")
    args = parser.parse_args(arguments)
    if args.json:
        if args.json == TORCH:
            return _device.answer(time_torch(args), "torch")
        return _device.answer(time_jax(args, together=args.json == SHARED))
    variants = common.chosen(parser, args, (SHARED, ALONE, TORCH) if args.vs else (SHARED, ALONE))
    runs = common.run_rounds("evals", arguments, variants, args.rounds)
    about = (
        f"{args.preset} with {args.layers} layers in SigLIP and decoder, {args.questions} questions about each of "
        f"{args.pictures} pictures, answers of {args.tokens} tokens, {args.batch} rows at a time; median of "
        f"{args.rounds} rounds, ratios are medians over the rounds."
    )
    return common.publish("evals", "Evaluation", about, table(runs), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
