"""janus_jax against transformers' port of Janus, in float32 with random weights: python -m benchmarks.parity --preset P

The port is built and run in a separate process, which writes a checkpoint and the reference outputs to a temporary
folder; then the checkpoint is loaded here and the same outputs are computed. Prints a table of the largest errors,
relative to the reference's largest value, and of differing tokens; exits with 1 if an error is above 1e-3 or a token
differs. A full-size preset takes 9 GB of memory (two copies in float32), and as much disk, for each billion parameters;
everything is deleted again.

With `--forms int8 int4 bfloat16` the model in float32 is compared with itself in these forms instead, by its logits.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import forms
from janus_jax.config import PRESETS, JanusConfig, get_preset
from janus_jax.io.messages import print_any_text
from janus_jax.model.janus import Janus
from janus_jax.sampling.images import generate_codes
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.text import embed_prompt
from janus_jax.weights.torch_weights import read_params

TOLERANCE = 1e-3
GUIDANCE, STEPS = 5.0, 64
BOS, PAD = 1, 2

Row = tuple[str, str, bool]  # what was compared, what came out, whether that is within bounds


def log(message: str):
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def inputs(config: JanusConfig, seed: int) -> dict[str, np.ndarray]:
    """Random inputs: two prompts of different lengths with an image each, two pairs of text-to-image rows, images."""
    rng = np.random.default_rng(seed)
    v, g, vocab = config.vision, config.gen_vision, config.language.vocab_size

    def text(count: int) -> list[int]:
        return list(rng.integers(5, vocab - 5, count))

    def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        length = max(map(len, rows))
        ids = np.array([[PAD] * (length - len(row)) + row for row in rows], np.int32)
        return ids, np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])

    image = [vocab - 1] * v.num_patches
    ids, mask = padded([[BOS, *text(4), *image, *text(20)], [BOS, *image, *text(6)]])
    pairs = []
    for count in (18, 9):
        pairs += [[BOS, *text(count), vocab - 3], [BOS, *[PAD] * count, vocab - 3]]
    pair_ids, pair_mask = padded(pairs)
    return {
        "pixels": rng.uniform(-1, 1, (2, v.image_size, v.image_size, 3)).astype(np.float32),
        "images": rng.uniform(-1, 1, (1, g.image_size, g.image_size, 3)).astype(np.float32),
        "codes": rng.integers(0, g.codebook_size, (1, g.num_tokens)).astype(np.int32),
        "ids": ids,
        "mask": mask,
        "pair_ids": pair_ids.reshape(2, 2, -1),
        "pair_mask": pair_mask.reshape(2, 2, -1),
    }


def num_steps(config: JanusConfig) -> int:
    """Codes that are drawn: the prefill's and up to 64 more."""
    return min(STEPS + 1, config.gen_vision.num_tokens)


# ---------------------------------------------------------------- the reference


def write_reference(config: JanusConfig, seed: int, folder: pathlib.Path):
    """Writes the port's checkpoint, and reference.npz with its outputs, to `folder`."""
    from benchmarks.common import oracle

    log("torch: building the port with random weights")
    model = oracle.build(config, seed)
    x = inputs(config, seed)
    outputs = {}
    log("torch: encoders")
    outputs["features"] = oracle.image_features(model, x["pixels"])
    outputs["aligned"] = oracle.embed_images(model, x["pixels"])
    outputs["vq_features"] = oracle.vq_features(model, x["images"])
    outputs["vq_codes"] = oracle.encode_codes(model, x["images"])
    outputs["decoded"] = oracle.decode_codes(model, x["codes"])
    log("torch: understanding")
    outputs["text_logits"] = oracle.text_logits(model, x["ids"], x["mask"], x["pixels"])
    log(f"torch: {num_steps(config)} codes")
    outputs["drawn"], outputs["image_logits"] = oracle.generate_codes(
        model, x["pair_ids"], x["pair_mask"], GUIDANCE, num_steps(config)
    )
    np.savez(folder / "reference.npz", **outputs)
    log("torch: writing the checkpoint")
    model.save_pretrained(folder, max_shard_size="4GB")
    log(f"torch: done, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


# ---------------------------------------------------------------- ours


def error_row(what: str, ours: Any, reference: np.ndarray) -> Row:
    scale = np.abs(reference).max()
    error = np.abs(np.asarray(ours, np.float64) - reference).max() / scale if ours.shape == reference.shape else np.inf
    return what, f"{error:.1e}", bool(error <= TOLERANCE)


def token_row(what: str, ours: Any, reference: np.ndarray) -> Row:
    differ = int((np.asarray(ours) != reference).sum()) if ours.shape == reference.shape else reference.size
    return what, f"{differ} of {reference.size} differ", differ == 0


def compare(config: JanusConfig, seed: int, folder: pathlib.Path) -> list[Row]:
    """Reads the checkpoint in `folder` and compares with its reference.npz."""
    x, reference = inputs(config, seed), np.load(folder / "reference.npz")
    log("jax: reading the checkpoint")
    params, _ = read_params(folder, config, dtype="float32", scan_layers=False)
    model = Janus(config, scan_layers=False)

    @functools.partial(jax.jit, static_argnames="method")
    def apply(params, *args, method):
        return model.apply({"params": params}, *args, method=method)

    def run(method, *args):
        log(f"jax: {method if isinstance(method, str) else method.__name__}")
        return jax.block_until_ready(apply(params, *args, method=method))

    def vq_features(module: Janus, images):
        return module.gen_vision_model.quant_conv(module.gen_vision_model.encoder(images))

    def text_logits(module: Janus, embeddings, mask):
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return module.text_logits(module.hidden(embeddings, positions, mask.astype(jnp.int32)))

    rows = [
        error_row("SigLIP features", run("image_features", x["pixels"]), reference["features"]),
        error_row("aligned features", run("embed_images", x["pixels"]), reference["aligned"]),
        error_row("VQ encoder and quant_conv", run(vq_features, x["images"]), reference["vq_features"]),
        token_row("VQ codes", run("encode_codes", x["images"]), reference["vq_codes"]),
        error_row("decoded pixels, full grid", run("decode_codes", x["codes"]), reference["decoded"]),
    ]
    where = x["ids"] == config.language.vocab_size - 1
    embeddings = embed_prompt(model, params, x["ids"], where, x["pixels"][:, None])
    logits = np.asarray(run(text_logits, embeddings, x["mask"]))
    what = "text logits, two prompts with an image, one left-padded"
    rows.append(error_row(what, logits[x["mask"]], reference["text_logits"][x["mask"]]))

    steps = num_steps(config)
    log(f"jax: {steps} codes")
    keys = jax.random.split(jax.random.key(0), 2)
    codes, logits = generate_codes(
        model, params, x["pair_ids"], x["pair_mask"], keys,
        guidance=GUIDANCE, sampler=make_sampler(0), num_tokens=steps, keep_logits=True,
    )  # fmt: skip
    # Where a code differs, what follows answers another question: those logits are not compared.
    same = np.cumprod(np.asarray(codes) == reference["drawn"], axis=1).astype(bool)
    comparable = np.pad(same, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    logits, expected = np.asarray(logits), reference["image_logits"]
    rows += [
        error_row("image logits at prefill, guidance 5", logits[:, 0], expected[:, 0]),
        error_row(f"image logits, {steps - 1} cached steps", logits[comparable], expected[comparable]),
        token_row(f"greedy codes, {steps} steps of 2 images", codes, reference["drawn"]),
    ]
    log(f"jax: done, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return rows


def measured(command: str, packages: tuple[str, ...], how: str) -> list[str]:
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    device = f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)"
    return [f"Command: `python -m benchmarks.parity {command}`", f"Device: {device}; {versions}; {how}."]


def table(rows: list[Row], command: str) -> str:
    """The rows in markdown, with what they were measured on."""
    how = f"float32 on both sides, random weights; bound {TOLERANCE:.0e}"
    lines = [
        *measured(command, ("jax", "flax", "torch", "transformers"), how),
        "",
        "| compared with transformers | largest relative error | |",
        "|---|---|---|",
        *(f"| {what} | {result} | {'ok' if good else 'FAILED'} |" for what, result, good in rows),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="janus_tiny", choices=PRESETS)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the inputs")
    parser.add_argument("--forms", nargs="+", choices=forms.FORMS, help="compare these with float32, without torch")
    parser.add_argument("--tokens", type=int, default=64, help="whose logits --forms compares (default %(default)s)")
    parser.add_argument("--reference", type=pathlib.Path, help=argparse.SUPPRESS)  # the torch side's own process
    args = parser.parse_args(argv)
    config = get_preset(args.preset)
    if args.reference:
        write_reference(config, args.seed, args.reference)
        return 0
    jax.config.update("jax_default_matmul_precision", "float32")
    command = ["--preset", args.preset, "--seed", str(args.seed)]
    if args.forms:
        most = config.language.max_positions
        if not 1 <= args.tokens <= most:
            parser.error(f"--tokens must be from 1 to {most}, got {args.tokens}")
        found = forms.compare(config, args.forms, args.seed, args.tokens, lambda form: log(f"jax: {form}"))
        command += ["--tokens", str(args.tokens), "--forms", *args.forms]
        print("\n".join([*measured(" ".join(command), ("jax", "flax"), "random weights"), "", forms.table(found)]))
        return 0
    with tempfile.TemporaryDirectory(prefix="janus_parity_") as folder:
        # In another process, so that torch's memory is given back before ours is taken.
        subprocess.run([sys.executable, "-m", "benchmarks.parity", *command, "--reference", folder], check=True)
        rows = compare(config, args.seed, pathlib.Path(folder))
    print(table(rows, " ".join(command)))
    return 0 if all(good for *_, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
