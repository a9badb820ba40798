"""Janus 1.3B, stage 2: unified pretraining of all but the encoders (Janus, arXiv 2410.13848, table 1)."""

from __future__ import annotations

from configs import _shared
from janus_jax.config import PRESETS
from train.config import DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="janus_stage2",
        workdir="runs/janus_stage2",
        model=PRESETS["janus_1_3b"],
        stage=2,
        init_from="runs/janus_stage1",
        tokenizer="checkpoints/janus_1_3b",
        steps=180_000,
        batch_size=512,
        data=DataConfig(
            understanding=_shared.STAGE2_UNDERSTANDING,
            text=_shared.STAGE2_TEXT,
            generation=_shared.STAGE2_GENERATION,
            # ImageNet's category names are the prompts of the first 120 000 steps.
            early_generation=_shared.IMAGENET,
            early_steps=120_000,
            ratio=(2, 3, 5),
            context=_shared.CONTEXT,
            # 900 tokens per sample with an image, 1000 per text, 650 per drawn image: 1 images per row on average.
            images_per_row=2,
            guidance_dropout=0.1,
            caption_cut=0.25,
            text_loss="all",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=5000, b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0
        ),
        evaluation=_shared.HELD_OUT,
        samples=_shared.SAMPLES,
        layouts=_shared.layouts({"v5e-256": 2, "v5p-128": 2, "v6e-256": 2, "2xv5e-256": 1, "2xv5p-128": 1}, 16),
        save_every=1000,
    )
