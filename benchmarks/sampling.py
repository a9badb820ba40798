"""Seconds of text-to-image, here and in transformers' port on torch, and the share of the bandwidth that a step uses.

`python -m benchmarks.sampling --preset janus_pro_1b --images 1 4 --vs torch` draws images with guidance, two rows each:
prefill of a prompt of 32 tokens, decoding steps, and the VQ decoder, apart, in each framework and dtype, and here for
int8 and int4 weights, for fused products and not, and for both layouts of the decoder's layers. Steps are timed in the
middle of an image, and if our cache grows, in the middle of each of its sizes. On torch there are three loops: the
reference script's (a growing cache, one call of the model per step), the same compiled by torch.compile over a static
cache, and the port's own `generate`. Weights are random, and prompts are new in every repetition.

The roofline is the time in which a step's bytes (all weights of decoder and image head once, and the filled part of the
cache once) pass at the bandwidth that a copy of 1 GiB has on the same device, measured in the same process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from typing import Any

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common

OURS = (
    *(f"jax float32{how}" for how in ("", " int8", " int4", " fused", " apart", " scanned", " unstacked")),
    *(f"jax bfloat16{how}" for how in ("", " int8", " int4", " fused", " apart", " scanned", " unstacked")),
)
TORCH = (
    "torch float32",
    "torch bfloat16",
    "torch float32 generate",
    "torch bfloat16 generate",
    "torch bfloat16 compiled",
)
_PROMPT = 32  # tokens
_SHORT = 60  # seconds that images may take to be drawn as a whole, too


def prompts(preset: str, images: int, length: int, repeats: int) -> list[np.ndarray]:
    """New prompts [images, 2, length] for each repetition and one."""
    from janus_jax.config import get_preset

    vocab = get_preset(preset).language.vocab_size
    rng = np.random.default_rng(images)
    return [rng.integers(10, vocab, (images, 2, length)).astype(np.int32) for _ in range(repeats + 1)]


def step_bytes(model: Any, params: Any, rows: int, context: int) -> int:
    """Bytes that a step has to read of weights, and of a cache filled with `context` tokens in each of `rows`."""
    import jax

    from janus_jax.model.kv_cache import cache_bytes
    from janus_jax.weights.quantize import array_bytes

    language = {k: v for k, v in params["language_model"].items() if k not in ("embed_tokens", "lm_head")}
    weights = jax.tree.leaves((language, params["gen_head"], params["gen_aligner"]))
    read = sum(array_bytes(leaf.shape, leaf.dtype) for leaf in weights)
    return read + cache_bytes(model.config.language, rows, context, model.cache_dtype)


def time_jax(args: argparse.Namespace, dtype: str, how: str) -> common.Run:
    """Times the calls of `janus_jax.sampling.images` that the pipeline makes."""
    import jax
    import jax.numpy as jnp

    from janus_jax.config import get_preset
    from janus_jax.sampling.cache import cache_sizes
    from janus_jax.sampling.images import ImageState, continue_image, decode_images, generate_codes, start_image
    from janus_jax.sampling.sampler import make_sampler

    config = get_preset(args.preset)
    run: common.Run = {"bandwidth": _device.copy_bandwidth(), "dtype": dtype}
    model, params = _device.random_model(config, dtype, how)
    num_tokens = config.gen_vision.num_tokens
    guidance, sampler = jnp.float32(5), make_sampler()
    first, begin, end = (jnp.int32(i) for i in (1, 2, 2 + args.steps))

    def steps(images: int, slots: int, filled: int) -> float:
        """Seconds a step over a cache of so many slots."""
        codes, failed = jnp.zeros((images, num_tokens), jnp.int32), jnp.full((images,), -1, jnp.int32)
        state = ImageState(_device.filled_cache(model, 2 * images, slots, filled - 1), codes, failed, None)
        rest = (jax.random.split(jax.random.key(0), images), guidance, sampler)
        state = jax.block_until_ready(continue_image(model, params, state, *rest, first, begin))
        return _device.timed(continue_image, model, params, state, *rest, begin, end)[0] / args.steps

    def whole(*prompts: jax.Array) -> jax.Array:
        codes, _ = generate_codes(model, params, *prompts, guidance=5, sampler=sampler)
        return decode_images(model, params, codes)[0]

    for images in args.images:
        read = step_bytes(model, params, 2 * images, _PROMPT + num_tokens // 2)
        sizes = cache_sizes(model, params, 2 * images, _PROMPT, num_tokens)
        # A smaller size is full when it is left, the last one when the image is done.
        middles = [(sum(pair) - args.steps) // 2 for pair in itertools.pairwise([_PROMPT, *sizes])]
        for number, ids in enumerate(map(jnp.asarray, prompts(args.preset, images, _PROMPT, args.repeats))):
            mask, keys = jnp.ones(ids.shape, bool), jax.random.split(jax.random.key(number), images)
            drawing = (keys, guidance, sampler, num_tokens, False, sizes[0])
            prefill, state = _device.timed(start_image, model, params, ids, mask, *drawing)
            del state
            step = statistics.mean(steps(images, *given) for given in zip(sizes, middles, strict=True))
            codes = jax.random.randint(jax.random.key(number), (images, num_tokens), 0, config.gen_vision.codebook_size)
            vq, _ = _device.timed(decode_images, model, params, codes)
            image = prefill + (num_tokens - 1) * step + vq
            if image < _SHORT:
                image, _ = _device.timed(whole, ids, mask, keys)
            if number:
                note(run, images, prefill=prefill, step=step, vq=vq, image=image)
                note(run, images, share=100 * read / run["bandwidth"] / step)
    return run


def time_torch(args: argparse.Namespace, dtype: str, how: str) -> common.Run:
    """Times the reference loop over transformers' port: language model, image head, guidance, draw, embed."""
    import torch
    import transformers

    from benchmarks.common import torch as _torch

    model = _torch.build(args.preset, dtype)
    head, embed = model.model.generation_head, model.prepare_embeddings_for_image_generation
    text_config, language = model.config.text_config, model.model.language_model
    num_tokens = model.config.vision_config.num_image_tokens
    half = num_tokens // 2
    if how == "compiled":
        # One program for the steps; prefills run as they are.
        compiled = torch.compile(language, mode="reduce-overhead", fullgraph=True)
    run: common.Run = {"dtype": dtype}

    def forward(x: torch.Tensor, cache: Any) -> torch.Tensor:
        call = compiled if how == "compiled" and x.shape[1] == 1 else language
        output = call(inputs_embeds=x, past_key_values=cache, use_cache=True)
        logits = head(output.last_hidden_state[:, -1]).float()
        conditional, unconditional = logits[0::2], logits[1::2]
        logits = unconditional + 5 * (conditional - unconditional)
        code = torch.multinomial(torch.softmax(logits, -1), 1)
        return embed(code.repeat_interleave(2, dim=0))

    def start(ids: np.ndarray, slots: int) -> tuple[torch.Tensor, Any]:
        if how == "compiled":
            cache = transformers.StaticCache(config=text_config, max_cache_len=slots)
        else:
            cache = transformers.DynamicCache(config=text_config)
        tokens = torch.from_numpy(ids.reshape(-1, ids.shape[-1])).long().to(model.device)
        return forward(model.get_input_embeddings()(tokens), cache), cache

    def loop(x: torch.Tensor, cache: Any, steps: int) -> torch.Tensor:
        for _ in range(steps):
            x = forward(x, cache)
        return x

    def generate(ids: np.ndarray, tokens: int) -> float:
        """Seconds of the port's `generate` in image mode, which makes the unconditional rows by itself."""
        model.model.vision_model.config.num_image_tokens = tokens
        settings = transformers.GenerationConfig(
            do_sample=True, top_k=0, guidance_scale=5, bos_token_id=0, pad_token_id=1, eos_token_id=2,
            max_length=ids.shape[-1] + tokens, generation_kwargs={"boi_token_id": 3},
        )  # fmt: skip
        rows = torch.from_numpy(ids[:, 0]).long().to(model.device)
        given = {"generation_mode": "image", "generation_config": settings}
        return _torch.timed(lambda: model.generate(rows, torch.ones_like(rows), **given))[0]

    def once(ids: np.ndarray, long: np.ndarray) -> dict[str, float]:
        if how == "generate":
            prefill, begun = generate(ids, 1), generate(long, 1)
            return {"prefill": prefill, "step": (generate(long, 1 + args.steps) - begun) / args.steps}
        prefill, (x, cache) = _torch.timed(lambda: start(ids, _PROMPT + num_tokens))
        if how != "compiled":  # whose cache is read as a whole in every step
            shape = (len(x), text_config.num_key_value_heads, half, text_config.head_dim)
            half_image = torch.zeros(shape, dtype=model.dtype, device=model.device)
            for layer in range(text_config.num_hidden_layers):
                cache.update(half_image, half_image, layer)
        x = loop(x, cache, 3 if how == "compiled" else 1)  # torch captures its graph in these
        steps, _ = _torch.timed(lambda: loop(x, cache, args.steps))
        codes = torch.randint(0, model.config.vq_config.num_embeddings, (len(ids), num_tokens))
        codes = codes.to(model.device)
        vq, _ = _torch.timed(lambda: model.model.vqmodel.decode(codes))
        step = steps / args.steps
        return {"prefill": prefill, "step": step, "vq": vq, "image": prefill + (num_tokens - 1) * step + vq}

    with torch.inference_mode():
        for images in args.images:
            for number in range(args.repeats + 1):
                given = (prompts(args.preset, images, n, args.repeats)[number] for n in (_PROMPT, _PROMPT + half))
                parts = once(*given)
                if number:
                    note(run, images, **parts)
    return run


def note(run: common.Run, images: int, **values: float):
    """Adds one repetition's values to `run`."""
    for name, value in values.items():
        run.setdefault(f"{images} {name}", []).append(value)


def table(runs: common.Runs, batches: list[int]) -> common.Table:
    """A row for each number of images and variant; ratios are of steps."""
    good = common.done(runs)
    theirs = [variant for variant in good if variant.startswith("torch")]
    dtypes = list(dict.fromkeys(variant.split()[1] for variant in theirs))
    versus = [*(f"torch {dtype}" for dtype in dtypes), "torch"] if theirs else []
    rows = [("images", "variant", "prefill s", "step ms", "VQ decode s", "all s", "% of roofline")]
    rows[0] += tuple(f"step x {base}'s best" for base in versus)
    for images in batches:
        for variant, own in good.items():
            value = {key: common.median(own, f"{images} {key}") for key in ("prefill", "step", "vq", "image", "share")}
            cells = [value["prefill"], 1e3 * value["step"], value["vq"], value["image"], value["share"]]
            for base in versus:
                among = [v for v in theirs if v.startswith(base)]
                best = min(among, key=lambda v: common.median(good[v], f"{images} step"))
                cells.append(common.ratio(good[best], own, f"{images} step"))
            rows.append((str(images), variant, *map(common.cell, cells)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table of all variants with their ratios to torch; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("sampling", __doc__)
    parser.add_argument("--vs", choices=["torch"], help="measure transformers' port beside ours")
    parser.add_argument("--images", type=common.count, nargs="+", default=[1, 4, 16], help="at once (default 1 4 16)")
    parser.add_argument("--steps", type=common.count, default=16, help="timed of each image (default %(default)s)")
    parser.add_argument("--repeats", type=common.count, default=2, help="in each process (default %(default)s)")
    args = parser.parse_args(arguments)
    if args.json:
        framework, dtype, *how = args.json.split()
        time_one = time_torch if framework == "torch" else time_jax
        return _device.answer(time_one(args, dtype, " ".join(how)), framework)
    variants = common.chosen(parser, args, (*OURS, *TORCH) if args.vs else OURS)
    runs = common.run_rounds("sampling", arguments, variants, args.rounds)
    bandwidth = common.median([run for own in common.done(runs).values() for run in own], "bandwidth")
    about = (
        f"{args.preset}, guidance, prompts of {_PROMPT} tokens; a step is the mean of {args.steps} from the middle of "
        f"the image (of each size of the cache), the median of {args.rounds} rounds of {args.repeats}; all s: prefill, "
        f"every step and VQ decode, added up for torch, and for ours where they take over {_SHORT} s. "
        f"Roofline: {common.cell(bandwidth / 1e9)} GB/s, a copy of 1 GiB."
    )
    return common.publish("sampling", "Text to image", about, table(runs, args.images), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
