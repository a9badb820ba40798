"""Checks a folder of reference outputs: `python -m benchmarks.golden DIR`.

DIR has the files of tests/golden/janus_tiny: config.json and model.safetensors of a checkpoint, golden.npz with inputs
and outputs of the reference implementation in float32, preprocess.npz and templates.json. Prints the largest error of
each array, relative to the array's largest value, and exits with 1 if one is missing or out of tolerance.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import janus_jax
from janus_jax.io.messages import print_any_text
from janus_jax.processing.chat import format_conversation
from janus_jax.processing.images import ImageSettings, understanding_pixels_uint8
from janus_jax.sampling.images import generate_codes
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.text import embed_prompt, generate_tokens

TOLERANCE = 1e-4
# What golden.npz gives, and what it asks for. Anything else in it would go unchecked, and is an error.
INPUTS = ("pixels", "vq_image", "code_ids", "und_ids", "und_mask", "und_pixels", "t2i_prompt")
OUTPUTS = (
    *("siglip", "aligned", "vq_ids", "vq_quant", "vq_decoded", "gen_embeds"),
    *("und_embeds", "und_hidden", "und_logits", "und_gen_logits", "und_text"),
    *(f"t2i_{what}_w{weight}" for weight in (1, 5) for what in ("tokens", "logits", "pixels")),
)
Row = tuple[str, float, bool, str]


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the reference's largest absolute value; infinite for another shape or NaN."""
    if ours.shape != reference.shape:
        return float("inf")
    scale = float(np.abs(reference).max())
    error = float(np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).max())
    return float("inf") if np.isnan(error) else error / (scale or 1.0)


def nhwc(images: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(images, -3, -1)


def nchw(images: np.ndarray) -> np.ndarray:
    """Channels first, as the reference lays images out."""
    return np.moveaxis(np.asarray(images), -1, -3)


def outputs(janus: janus_jax.JanusPipeline, golden: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, our array) of everything in OUTPUTS, computed from the inputs in `golden`."""

    @functools.partial(jax.jit, static_argnames="method")
    def apply(params, *args, method):
        return janus.model.apply({"params": params}, *args, method=method)

    def run(method: str | Callable, *args) -> np.ndarray:
        return np.asarray(apply(janus.params, *(jnp.asarray(x) for x in args), method=method))

    config = janus.config
    yield "siglip", run("image_features", nhwc(golden["pixels"]))
    yield "aligned", run("embed_images", nhwc(golden["pixels"]))
    codes = run("encode_codes", nhwc(golden["vq_image"]))
    yield "vq_ids", codes
    grid = config.gen_vision.grid
    vectors = run(lambda model, x: model.gen_vision_model.quantize.lookup(x), codes)
    yield "vq_quant", nchw(vectors.reshape(len(codes), grid, grid, -1))
    yield "vq_decoded", nchw(run("decode_codes", golden["code_ids"]))
    yield "gen_embeds", run("embed_codes", golden["code_ids"])

    ids, mask, pixels = golden["und_ids"], golden["und_mask"].astype(bool), nhwc(golden["und_pixels"])
    where = (ids == config.language.vocab_size - 1) & mask
    x = embed_understanding(janus, ids, where, pixels)
    yield "und_embeds", np.asarray(x)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    hidden = run("hidden", x, positions, mask.astype(np.int32))
    yield "und_hidden", hidden
    yield "und_logits", run("text_logits", hidden)
    yield "und_gen_logits", run("image_logits", hidden)
    keys = jax.random.split(jax.random.key(0), len(ids))
    steps = golden["und_text"].shape[1] if "und_text" in golden else 1
    text = generate_tokens(janus.model, janus.params, x, jnp.asarray(mask), keys, eos_id=-1, max_new_tokens=steps)
    yield "und_text", np.asarray(text)

    prompts = golden["t2i_prompt"].reshape(-1, 2, golden["t2i_prompt"].shape[-1])
    keys = jax.random.split(jax.random.key(0), len(prompts))
    for weight in (1, 5):
        rows = jnp.asarray(prompts[:, :1] if weight == 1 else prompts, jnp.int32)
        codes, logits = generate_codes(
            janus.model,
            janus.params,
            rows,
            jnp.ones(rows.shape, bool),
            keys,
            guidance=weight,
            sampler=make_sampler(0),
            keep_logits=True,
        )
        yield f"t2i_tokens_w{weight}", np.asarray(codes)
        yield f"t2i_logits_w{weight}", np.asarray(logits)
        yield f"t2i_pixels_w{weight}", nchw(run("decode_codes", codes))


def embed_understanding(
    janus: janus_jax.JanusPipeline, ids: np.ndarray, where: np.ndarray, pixels: np.ndarray
) -> jax.Array:
    """Embeddings [B, T, D] of ids [B, T] with each row's images, pixels [B, M, h, w, 3], at its placeholders."""
    args = (jnp.asarray(ids, jnp.int32), jnp.asarray(where), jnp.asarray(pixels))
    return embed_prompt(janus.model, janus.params, *args)


def check_arrays(janus: janus_jax.JanusPipeline, golden: dict[str, np.ndarray]) -> Iterator[Row]:
    """(name, relative error, passed, remark) of every array."""
    missing = [name for name in (*INPUTS, *OUTPUTS) if name not in golden]
    for name in missing:
        yield name, float("inf"), False, "missing from golden.npz"
    for name in sorted(golden.keys() - {*INPUTS, *OUTPUTS}):
        yield name, float("inf"), False, "in golden.npz, but unknown to this check"
    if set(missing) & set(INPUTS):
        return
    mask = golden["und_mask"].astype(bool)
    for name, ours in outputs(janus, golden):
        if name in missing:
            continue
        reference = golden[name]
        exact = np.issubdtype(reference.dtype, np.integer)
        if name.startswith("und_") and not exact and ours.shape == reference.shape:
            ours, reference = ours[mask], reference[mask]  # padding is undefined
        error = relative_error(ours, reference)
        if exact:
            wrong = int(np.sum(ours != reference)) if ours.shape == reference.shape else reference.size
            yield name, error, wrong == 0, "identical" if wrong == 0 else f"{wrong} of {reference.size} differ"
        else:
            yield name, error, error <= TOLERANCE, ""


def check_preprocessing(stored: dict[str, np.ndarray]) -> Iterator[Row]:
    """Understanding images against the reference's uint8 pixels, exactly."""
    numbers = sorted({name.split("_", 1)[1] for name in stored if name.startswith(("image_", "pixels_"))})
    if not numbers:
        yield "preprocess", float("inf"), False, "preprocess.npz holds no image"
    for number in numbers:
        missing = [name for name in (f"image_{number}", f"pixels_{number}") if name not in stored]
        if missing:
            yield f"preprocess {number}", float("inf"), False, f"{missing[0]} is missing from preprocess.npz"
            continue
        reference = stored[f"pixels_{number}"]
        settings = ImageSettings(image_size=reference.shape[-1])
        ours = nchw(understanding_pixels_uint8(stored[f"image_{number}"], settings))
        same = np.array_equal(ours, reference)
        yield f"preprocess {number}", relative_error(ours, reference), same, "identical" if same else "differs"


def check_templates(templates: dict[str, dict]) -> Iterator[Row]:
    """Prompts against the reference's strings."""
    if not templates:
        yield "templates", float("inf"), False, "templates.json is empty"
    for name, case in templates.items():
        if missing := [key for key in ("messages", "system", "text") if key not in case]:
            yield f"template {name}", float("inf"), False, f"{missing[0]} is missing from templates.json"
            continue
        text = format_conversation([tuple(turn) for turn in case["messages"]], case["system"])
        same = text == case["text"]
        yield f"template {name}", 0.0 if same else float("inf"), same, "identical" if same else "differs"


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever they stumble over
        raise ValueError(f"{path} is not a readable .npz file ({error})") from None


def check(folder: pathlib.Path) -> list[Row]:
    """All rows of a folder. Raises OSError or ValueError where a file is absent or not what it should be."""
    if not folder.is_dir():
        # Else a mistyped path of two parts would be asked for on the hub.
        raise NotADirectoryError(f"{folder} is not a folder")
    janus = janus_jax.load(folder, dtype="float32")
    rows = list(check_arrays(janus, read_npz(folder / "golden.npz")))
    rows += check_preprocessing(read_npz(folder / "preprocess.npz"))
    rows += check_templates(json.loads((folder / "templates.json").read_text(encoding="utf-8")))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 0 when all is well, 1 when something is missing or off, 2 for a folder that cannot be read."""
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        rows = check(args.folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if not isinstance(error, FileNotFoundError) or not args.folder.is_dir() else 1
    width = max(len(name) for name, *_ in rows)
    for name, error, passed, remark in rows:
        print(f"{name:{width}}  {error:9.2e}  {'ok' if passed else 'FAIL'}  {remark}".rstrip())
    failures = sum(not passed for _, _, passed, _ in rows)
    print(
        f"{len(rows) - failures} of {len(rows)} within tolerance ({TOLERANCE:g} relative; ids, uint8, text: identical)"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
