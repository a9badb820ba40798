"""Janus 1.3B, stage 3: fine-tuning of all but the generation encoder (Janus, arXiv 2410.13848, table 1)."""

from __future__ import annotations

from configs import _shared
from janus_jax.config import PRESETS
from train.config import DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="janus_stage3",
        workdir="runs/janus_stage3",
        model=PRESETS["janus_1_3b"],
        stage=3,
        init_from="runs/janus_stage2",
        tokenizer="checkpoints/janus_1_3b",
        steps=24_000,
        batch_size=256,
        data=DataConfig(
            understanding=_shared.STAGE3_UNDERSTANDING,
            text=_shared.STAGE3_TEXT,
            generation=_shared.STAGE3_GENERATION,
            ratio=(7, 3, 10),
            context=_shared.CONTEXT,
            # 900 tokens per sample with an image, 600 per text, 650 per drawn image: 2 images per row on average.
            images_per_row=3,
            guidance_dropout=0.1,
            text_loss="answers",
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, schedule="constant", warmup_steps=0, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0
        ),
        evaluation=_shared.HELD_OUT,
        samples=_shared.SAMPLES,
        layouts=_shared.layouts(
            {"v5e-256": 1, "v5p-128": 1, "v6e-256": 1, "2xv5e-256": 1, "2xv5p-128": 1}, 16, {"2xv5e-256": 2}
        ),
        sampling_layouts=_shared.DRAWING,
        save_every=1000,
    )
