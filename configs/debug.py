"""A few steps of a tiny model in float32, for tests and smoke runs: prepare any data into the folders named here."""

from __future__ import annotations

from janus_jax.config import PRESETS
from train.config import DataConfig, EvalConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> TrainConfig:
    folders = {
        "understanding": ("data/debug/understanding",),
        "text": ("data/debug/text",),
        "generation": ("data/debug/generation",),
    }
    return TrainConfig(
        name="debug",
        workdir="runs/debug",
        model=PRESETS["janus_tiny"],
        stage=3,
        tokenizer="data/debug/tokenizer",
        steps=8,
        batch_size=8,
        data=DataConfig(**folders, ratio=(2, 1, 2), context=256, images_per_row=4, workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        compute_dtype="float32",
        frozen_dtype="float32",
        loss_chunk=64,
        evaluation=EvalConfig(**folders, every=4, batches=1),
        samples=SampleConfig(every=8, prompts=("a red bicycle",), images=2),
        log_every=1,
        save_every=4,
    )
