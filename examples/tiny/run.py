"""A tiny training run: prepared data of all three kinds, and a config over them."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import JanusConfig, LlamaConfig, SiglipConfig, VQConfig
from janus_jax.io.stores import as_path
from janus_jax.processing.chat import Processor
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params, read_now
from train.config import DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from train.prepare import prepare
from train.raw.sources import RawSample
from train.step.earlier import open_run

WORDS = [
    "red",
    "blue",
    "green",
    "tall",
    "small",
    "bright",
    "round",
    "old",
    "house",
    "tree",
    "cat",
    "dog",
    "bird",
    "boat",
]
MODEL = JanusConfig(
    vision=SiglipConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2),
    gen_vision=VQConfig(ch=32, ch_mult=(1, 1), num_res_blocks=2, z_channels=16, codebook_size=64, grid=4),
    language=LlamaConfig(
        vocab_size=416, width=48, mlp_dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, max_positions=512
    ),
    gen_head_width=32,
    dtype="float32",
)


def some_image(rng: np.random.Generator) -> Image.Image:
    """A random picture of random proportions."""
    return Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8))


def encode(images: np.ndarray, model: JanusConfig = MODEL) -> np.ndarray:
    """Stands in for the VQ encoder: codes that depend on the image."""
    rngs = [np.random.default_rng(zlib.crc32(np.ascontiguousarray(image))) for image in np.asarray(images)]
    g = model.gen_vision
    return np.stack([rng.integers(0, g.codebook_size, g.num_tokens) for rng in rngs]).astype(np.int32)


def write_data(
    folder: pathlib.Path, count: int = 24, seed: int = 0, model: JanusConfig = MODEL, context: int = 128
) -> dict[str, str]:
    """Prepares `count` samples of each kind under `folder`; returns the folder of each kind, and 'tokenizer'."""
    rng = np.random.default_rng(seed)
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer, image_size=model.vision.image_size, num_image_tokens=model.vision.num_patches)
    processor = Processor.from_folder(tokenizer, model)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    def conversation(i: int) -> RawSample:
        images = [some_image(rng) for _ in range(1 + i % 2)]
        turns = [
            {"role": "user", "content": "<image>\n" * len(images) + words(1, 6)},
            {"role": "assistant", "content": words(1, 5)},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": words(1, 4)}, {"role": "assistant", "content": words(1, 4)}]
        return RawSample(place=f"und {i}", messages=turns, images=tuple(images))

    def drawing(i: int) -> RawSample:
        return RawSample(place=f"gen {i}", caption=f"{words(2, 8)}. {words(2, 5)}.", images=(some_image(rng),))

    def text(i: int) -> RawSample:
        if i % 2:
            return RawSample(place=f"text {i}", text=words(5, 40))
        turns = [{"role": "user", "content": words(2, 9)}, {"role": "assistant", "content": words(2, 20)}]
        return RawSample(place=f"text {i}", messages=turns)

    made = {"understanding": conversation, "text": text, "generation": drawing}
    folders = {"tokenizer": str(tokenizer)}
    for kind, make in made.items():
        folders[kind] = str(folder / kind)
        options = {"encode": functools.partial(encode, model=model)} if kind == "generation" else {}
        prepare(
            [make(i) for i in range(count)], folders[kind], kind, processor, context=context, batch_size=8,
            progress=False, system_prompt="", **options,
        )  # fmt: skip
    return folders


def write_checkpoint(folder: pathlib.Path, model: JanusConfig = MODEL, seed: int = 0) -> pathlib.Path:
    """A converted checkpoint of `model` with `random_params`."""
    checkpoint.save(folder, model, random_params(model, seed))
    return folder


def random_params(model: JanusConfig = MODEL, seed: int = 0) -> dict[str, Any]:
    """Random parameters, layers stacked: made by numpy, since compiling an init takes long."""
    rng = np.random.default_rng(seed)

    def draw(leaf) -> np.ndarray:
        scale = 1 / np.sqrt(leaf.shape[-1]) if len(leaf.shape) > 1 else 0.1
        return (rng.normal(size=leaf.shape) * scale + (len(leaf.shape) == 1)).astype(np.float32)

    return jax.tree.map(draw, abstract_params(model))


def params_of(workdir: pathlib.Path | str) -> dict[str, np.ndarray]:
    """The newest parameters of the run in `workdir`, by path."""
    _, leaves = open_run(as_path(workdir))
    return {"/".join(path): read_now(leaf) for path, leaf in leaves.items()}


def tiny_config(folders: dict[str, str], workdir: pathlib.Path | str, **changes: Any) -> TrainConfig:
    """A float32 run over `write_data`'s folders; `changes` are fields of TrainConfig."""
    kinds = {kind: (folders[kind],) for kind in ("understanding", "text", "generation")}
    config = TrainConfig(
        name="tiny",
        workdir=str(workdir),
        model=MODEL,
        stage=3,
        tokenizer=folders["tokenizer"],
        steps=4,
        batch_size=8,
        data=DataConfig(**kinds, ratio=(2, 1, 2), context=128, images_per_row=4, workers=0, guidance_dropout=0.25),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        loss_chunk=32,
        evaluation=EvalConfig(**kinds, every=2, batches=1),
        log_every=1,
        save_every=2,
    )
    return dataclasses.replace(config, **changes)
