"""Seconds to the first token about an image and tokens/s after it, here and in transformers' port on torch.

`python -m benchmarks.understanding --preset janus_pro_1b --vs torch` asks about one image per row, for each size of
`--batch`: SigLIP alone, everything up to the decoder (SigLIP, adapter, embeddings), the prefill with the first token,
and greedy decoding; and decodes VQ codes, for each framework and dtype. Here prompts are left-padded to the length that
the pipeline uses, on torch they are not padded. On torch there are two loops: a growing cache, one call of the model
per token (eager), and the port's own `generate` with a static cache, which compiles the model on a GPU. Weights are
random, inputs new in every repetition, and the first repetition of a process does not count.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common

OURS = ("jax float32", "jax bfloat16")
TORCH = ("torch float32 eager", "torch bfloat16 eager", "torch float32 static", "torch bfloat16 static")
PARTS = {
    "siglip": "SigLIP",
    "vq": "VQ decode",
    "embed": "up to the decoder",
    "prefill": "prefill",
    "first": "first token",
}
_TEXT = 62  # tokens of the prompt beside the image's: a system prompt and a question


def inputs(preset: str, batch: int, repeats: int) -> Iterator[dict[str, np.ndarray]]:
    """New pixels [B, h, w, 3], prompts [B, T] with 0 where the image goes, and codes, for each repetition and one."""
    from janus_jax.config import get_preset

    config = get_preset(preset)
    patches, size, vocab = config.vision.num_patches, config.vision.image_size, config.language.vocab_size
    rng = np.random.default_rng(batch)
    for _ in range(repeats + 1):
        ids = rng.integers(10, vocab, (batch, patches + 2 + _TEXT)).astype(np.int32)
        ids[:, 8 : 8 + patches] = 0
        codes = rng.integers(0, config.gen_vision.codebook_size, (batch, config.gen_vision.num_tokens))
        yield {
            "pixels": rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32),
            "ids": ids,
            "codes": codes.astype(np.int32),
        }


def collect(args: argparse.Namespace, once: Callable[[dict[str, np.ndarray]], dict[str, float]]) -> common.Run:
    """{'<batch> <part>': seconds of each repetition} of all batches; `once` measures the parts of one repetition."""
    run: common.Run = {}
    for batch in args.batch:
        for number, new in enumerate(inputs(args.preset, batch, args.repeats)):
            seconds = once(new)
            for part, value in seconds.items() if number else ():
                run.setdefault(f"{batch} {part}", []).append(value)
    return run


def time_jax(args: argparse.Namespace, dtype: str) -> common.Run:
    """Times the calls of `janus_jax.sampling.text` that the pipeline makes."""
    import jax
    import jax.numpy as jnp

    from janus_jax.config import get_preset
    from janus_jax.processing.chat import bucket
    from janus_jax.sampling.images import decode_images
    from janus_jax.sampling.sampler import make_sampler
    from janus_jax.sampling.text import continue_text, embed_prompt, start_text

    model, params = _device.random_model(get_preset(args.preset), dtype)
    siglip = jax.jit(lambda params, pixels: model.apply({"params": params}, pixels, method="image_features"))
    sampler, slots = make_sampler(0), bucket(args.tokens + 1)
    begin, end, never = jnp.int32(1), jnp.int32(1 + args.tokens), jnp.int32(-1)

    def once(new: dict[str, np.ndarray]) -> dict[str, float]:
        length = new["ids"].shape[1]
        padding = ((0, 0), (bucket(length) - length, 0))
        mask = np.pad(np.ones_like(new["ids"], bool), padding)
        ids = np.pad(new["ids"], padding, constant_values=1)
        arrays = (ids, ids == 0, mask, new["pixels"], new["codes"], jax.random.split(jax.random.key(0), len(ids)))
        ids, where, mask, pixels, codes, keys = jax.block_until_ready(jax.device_put(arrays))
        seconds = {"siglip": _device.timed(siglip, params, pixels)[0]}
        if len(ids) in args.vq_batch:
            seconds["vq"] = _device.timed(decode_images, model, params, codes)[0]
        seconds["embed"], x = _device.timed(embed_prompt, model, params, ids, where, pixels[:, None])
        rest = (keys, never, sampler)
        seconds["prefill"], state = _device.timed(start_text, model, params, x, mask, *rest, slots)
        seconds["first"] = seconds["embed"] + seconds["prefill"]
        loop, _ = _device.timed(continue_text, model, params, state, *rest, begin, end)
        return seconds | {"step": loop / args.tokens}

    return collect(args, once)


def time_torch(args: argparse.Namespace, dtype: str, static: bool) -> common.Run:
    """Times the same on transformers' port."""
    import torch
    import transformers

    from benchmarks.common import torch as _torch

    model = _torch.build(args.preset, dtype)
    janus, text_config, embed_tokens = model.model, model.config.text_config, model.get_input_embeddings()

    def decode(codes: torch.Tensor) -> torch.Tensor:
        pixels = janus.vqmodel.decode(codes).permute(0, 2, 3, 1).float()
        return ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)

    def embed(ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        features = janus.get_image_features(pixels).pooler_output
        return embed_tokens(ids).masked_scatter((ids == 0)[..., None], features)

    def generate(ids: torch.Tensor, pixels: torch.Tensor, tokens: int) -> torch.Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False, pad_token_id=1,
            max_new_tokens=tokens, min_new_tokens=tokens, cache_implementation="static",
        )  # fmt: skip

    def next_token(x: torch.Tensor, cache: Any) -> torch.Tensor:
        hidden = janus.language_model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        return model.lm_head(hidden[:, -1:]).argmax(-1)

    def loop(token: torch.Tensor, cache: Any) -> torch.Tensor:
        for _ in range(args.tokens):
            token = next_token(embed_tokens(token), cache)
        return token

    def once(new: dict[str, np.ndarray]) -> dict[str, float]:
        pixels = torch.tensor(new["pixels"].transpose(0, 3, 1, 2).copy()).to(model.device, model.dtype)
        ids, codes = (torch.tensor(new[name]).long().to(model.device) for name in ("ids", "codes"))
        if static:
            first, _ = _torch.timed(lambda: generate(ids, pixels, 1))
            whole, _ = _torch.timed(lambda: generate(ids, pixels, 1 + args.tokens))
            return {"first": first, "step": (whole - first) / args.tokens}
        seconds = {"siglip": _torch.timed(lambda: janus.vision_model(pixels))[0]}
        if len(ids) in args.vq_batch:
            seconds["vq"] = _torch.timed(lambda: decode(codes))[0]
        cache = transformers.DynamicCache(config=text_config)
        seconds["embed"], x = _torch.timed(lambda: embed(ids, pixels))
        seconds["prefill"], token = _torch.timed(lambda: next_token(x, cache))
        seconds["first"] = seconds["embed"] + seconds["prefill"]
        return seconds | {"step": _torch.timed(lambda: loop(token, cache))[0] / args.tokens}

    with torch.inference_mode():
        return collect(args, once)


def table(runs: common.Runs, batches: list[int]) -> common.Table:
    """A row for each part and batch: seconds, or tokens/s; and how many times as fast as torch we are."""
    good = common.done(runs)
    ours, theirs = ([v for v in good if v.startswith(name)] for name in ("jax", "torch"))
    pairs = [(v, base) for v in ours for base in (v.replace("jax", "torch"), "torch") if theirs]
    names = [f"{v} x {base}'s best" for v, base in pairs]
    rows = [("batch", "", *good, *names)]
    for batch in batches:
        for part, name in (*PARTS.items(), ("step", "tokens/s")):
            key = f"{batch} {part}"
            median = {variant: common.median(own, key) for variant, own in good.items()}
            cells = [batch / value if part == "step" else value for value in median.values()]
            if np.isnan(cells).all():
                continue
            for variant, base in pairs:
                known = [v for v in theirs if v.startswith(base) and not np.isnan(median[v])]
                best = min(known, key=median.get, default=None)
                cells.append(common.ratio(good[best], good[variant], key) if best else np.nan)
            rows.append((str(batch), f"{name}{'' if part == 'step' else ' s'}", *map(common.cell, cells)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table of all variants with their ratios; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("understanding", __doc__)
    parser.add_argument("--vs", choices=["torch"], help="measure transformers' port beside ours")
    parser.add_argument("--batch", type=common.count, nargs="+", default=[1, 8], help="rows at once (default 1 8)")
    parser.add_argument("--vq-batch", type=common.count, nargs="+", default=[1], help="of these: VQ too (default 1)")
    parser.add_argument("--tokens", type=common.count, default=32, help="decoded after the first (default %(default)s)")
    parser.add_argument("--repeats", type=common.count, default=2, help="in each process (default %(default)s)")
    args = parser.parse_args(arguments)
    if args.json:
        framework, dtype, *how = args.json.split()
        time_one = functools.partial(time_torch, static=how == ["static"]) if framework == "torch" else time_jax
        return _device.answer(time_one(args, dtype), framework)
    variants = common.chosen(parser, args, (*OURS, *TORCH) if args.vs else OURS)
    runs = common.run_rounds("understanding", arguments, variants, args.rounds)
    about = (
        f"{args.preset}, one image and {_TEXT + 2} tokens of text a row; a token's time is the mean of {args.tokens}; "
        f"median of {args.rounds} rounds of {args.repeats}; ratios are medians over the rounds."
    )
    return common.publish(
        "understanding", "Understanding, SigLIP and VQ", about, table(runs, args.batch), runs, arguments, args.record
    )


if __name__ == "__main__":
    sys.exit(main())
