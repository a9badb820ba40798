"""Seconds a step of text to image, here and in transformers' port on torch, in one run on this machine.

`python -m benchmarks.sampling --preset janus_pro_1b --steps 32` times images with guidance (two rows each) on constant
weights: prefill of a fresh prompt, then `steps` decoding steps, in each framework and dtype, and here for both layouts
of the decoder's layers. Each row runs in a process of its own, one after the other, twice around, so that a drift of
the machine shows; the table gives the median step. On torch there are two loops: the reference script's (a growing
cache, one call of the model a step), and the port's own `generate` (a static cache), whose step is the mean of a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

PROMPT_TOKENS = 32
VARIANTS = (
    "jax float32 unstacked",
    "jax float32 scanned",
    "jax bfloat16 unstacked",
    "torch float32",
    "torch bfloat16",
    "torch float32 generate",
)


def time_jax(preset: str, dtype: str, scan_layers: bool, steps: int, images: int) -> dict[str, Any]:
    """Times `sampling.start_image` and single steps of `continue_image`."""
    import jax
    import jax.numpy as jnp

    from janus_jax import sampling
    from janus_jax.config import get_preset
    from janus_jax.model import Janus
    from janus_jax.torch_weights import abstract_params

    config = get_preset(preset)
    model = Janus(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), scan_layers=scan_layers)
    # Timing sees no difference between values, as long as none is zero, denormal or infinite.
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, dtype), abstract_params(config, scan_layers))
    ids = jax.random.randint(jax.random.key(1), (images, 2, PROMPT_TOKENS), 0, config.language.vocab_size)
    mask, keys = jnp.ones(ids.shape, bool), jax.random.split(jax.random.key(0), images)
    guidance, sampler = jnp.float32(5), sampling.make_sampler()
    num_tokens = config.gen_vision.num_tokens

    def prefill() -> sampling.ImageState:
        state = sampling.start_image(model, params, ids, mask, keys, guidance, sampler, num_tokens)
        return jax.block_until_ready(state)

    began = time.perf_counter()
    prefill()
    compiled = time.perf_counter() - began
    began = time.perf_counter()
    state = prefill()
    result: dict[str, Any] = {"prefill": time.perf_counter() - began, "steps": []}
    for i in range(1, steps + 2):
        began = time.perf_counter()
        index = jnp.int32(i)
        state = sampling.continue_image(model, params, state, keys, guidance, sampler, index, index + 1)
        jax.block_until_ready(state)
        if i == 1:
            result["compile"] = compiled + time.perf_counter() - began
        else:
            result["steps"].append(time.perf_counter() - began)
    return result


def build_torch(preset: str, dtype: str) -> Any:
    """transformers' port with every parameter 0.01."""
    import torch
    import transformers

    from janus_jax.config import get_preset, transformers_config

    config = get_preset(preset)
    raw = transformers_config(config, image_token_id=0)
    hf_config = transformers.JanusConfig(**{k: v for k, v in raw.items() if k not in ("model_type", "torch_dtype")})
    with torch.device("meta"):
        model = transformers.JanusForConditionalGeneration(hf_config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        # Buffers have no values after to_empty: the rotary frequencies are made again as the module makes them.
        rotary = model.model.language_model.rotary_emb
        model.model.language_model.rotary_emb = type(rotary)(hf_config.text_config)
    return model


def time_torch(preset: str, dtype: str, steps: int, images: int) -> dict[str, Any]:
    """Times the reference loop over transformers' port: language model, image head, guidance, draw, embed."""
    import torch
    import transformers

    model = build_torch(preset, dtype)
    head, embed = model.model.generation_head, model.prepare_embeddings_for_image_generation
    text_config = model.config.text_config
    ids = torch.randint(0, text_config.vocab_size, (2 * images, PROMPT_TOKENS))

    result: dict[str, Any] = {"compile": 0.0, "steps": []}
    with torch.inference_mode():
        for warm in (False, True):
            cache = transformers.DynamicCache(config=text_config)
            x = model.get_input_embeddings()(ids)
            for i in range(steps + 2 if warm else 2):
                began = time.perf_counter()
                output = model.model.language_model(inputs_embeds=x, past_key_values=cache, use_cache=True)
                logits = head(output.last_hidden_state[:, -1]).float()
                conditional, unconditional = logits[0::2], logits[1::2]
                logits = unconditional + 5 * (conditional - unconditional)
                code = torch.multinomial(torch.softmax(logits, -1), 1)
                x = embed(code.repeat_interleave(2, dim=0))
                took = time.perf_counter() - began
                if i == 0:
                    result["prefill"] = took
                elif warm and i > 1:
                    result["steps"].append(took)
    return result


def time_torch_generate(preset: str, dtype: str, steps: int, images: int) -> dict[str, Any]:
    """Times the port's own `generate` in image mode; a step is what each code after the first adds."""
    import torch
    import transformers

    model = build_torch(preset, dtype)
    ids = torch.randint(10, model.config.text_config.vocab_size, (images, PROMPT_TOKENS))
    settings = transformers.GenerationConfig(
        do_sample=True, top_k=0, guidance_scale=5, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        max_length=PROMPT_TOKENS + model.config.vision_config.num_image_tokens, generation_kwargs={"boi_token_id": 3},
    )  # fmt: skip

    def seconds(num_tokens: int) -> float:
        model.model.vision_model.config.num_image_tokens = num_tokens
        began = time.perf_counter()
        model.generate(ids, torch.ones_like(ids), generation_mode="image", generation_config=settings)
        return time.perf_counter() - began

    seconds(1)
    prefill = seconds(1)
    return {"compile": 0.0, "prefill": prefill, "steps": [(seconds(steps + 1) - prefill) / steps]}


def run_variant(variant: str, preset: str, steps: int, images: int) -> dict[str, Any]:
    """One row, timed in this process."""
    framework, dtype, *how = variant.split()
    if framework == "torch":
        return (time_torch_generate if how else time_torch)(preset, dtype, steps, images)
    return time_jax(preset, dtype, how == ["scanned"], steps, images)


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table of all variants with their ratios to torch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="janus_pro_1b")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--images", type=int, default=1, help="images drawn at once, two rows each (default 1)")
    parser.add_argument("--rounds", type=int, default=2, help="times around all variants (default 2)")
    parser.add_argument(
        "--variant", choices=VARIANTS, action="append", help="only this one; may be given several times"
    )
    parser.add_argument("--json", action="store_true", help="print one variant's raw seconds, timed in this process")
    args = parser.parse_args(argv)
    variants = args.variant or list(VARIANTS)
    if args.json:
        print(json.dumps(run_variant(variants[0], args.preset, args.steps, args.images)))
        return 0

    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for number in range(args.rounds):
        for variant in variants:
            print(f"round {number + 1} of {args.rounds}: {variant}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.sampling", "--json", "--variant", variant]
            command += ["--preset", args.preset, "--steps", str(args.steps), "--images", str(args.images)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
    print_table(f"{args.preset}, {args.images} images at once, {args.steps} steps", runs)
    return 0


def print_table(title: str, runs: dict[str, list[dict[str, Any]]]):
    """Median seconds a step of each variant, and how many times faster than torch in float32 and in its best dtype."""
    import importlib.metadata as metadata

    median = {variant: statistics.median([s for run in done for s in run["steps"]]) for variant, done in runs.items()}
    torch_times = [median[variant] for variant in median if variant.startswith("torch")]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    print(f"{title}, with guidance, {platform.machine()} CPU, {packages}")
    print("| variant | prefill s | step s | step s of each round | compile s | x torch float32 | x torch's best |")
    print("|---|---|---|---|---|---|---|")
    for variant, done in runs.items():
        rounds = " ".join(f"{statistics.median(run['steps']):.3f}" for run in done)
        prefill, compiled = (statistics.median(run[key] for run in done) for key in ("prefill", "compile"))
        ratios = [median["torch float32"]] if "torch float32" in median else []
        ratios = [f"{base / median[variant]:.2f}" for base in (*ratios, *([min(torch_times)] if torch_times else []))]
        cells = [variant, f"{prefill:.2f}", f"{median[variant]:.3f}", rounds, f"{compiled:.1f}", *ratios]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
