"""Janus-Pro 1B, stage 3: fine-tuning of all but the generation encoder (Janus-Pro, arXiv 2501.17811, table 2)."""

from __future__ import annotations

from configs import _shared
from janus_jax.config import PRESETS
from train.config import DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="1b_stage3",
        workdir="runs/1b_stage3",
        model=PRESETS["janus_pro_1b"],
        stage=3,
        init_from="runs/1b_stage2",
        tokenizer="checkpoints/janus_pro_1b",
        steps=80_000,
        batch_size=128,
        data=DataConfig(
            understanding=_shared.STAGE3_UNDERSTANDING,
            text=_shared.STAGE3_TEXT,
            generation=_shared.STAGE3_GENERATION,
            ratio=(5, 1, 4),
            context=_shared.CONTEXT,
            # 900 tokens per sample with an image, 600 per text, 650 per drawn image: 2.6 images per row on average.
            images_per_row=4,
            guidance_dropout=0.1,
            text_loss="answers",
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-5, schedule="constant", warmup_steps=0, b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0
        ),
        evaluation=_shared.HELD_OUT,
        samples=_shared.SAMPLES,
        layouts=_shared.layouts(
            {"v5e-256": 1, "v5p-128": 1, "v6e-256": 1, "2xv5e-256": 1, "2xv5p-128": 1},
            16,
            {"v5e-256": 2, "v6e-256": 2, "2xv5e-256": 4},
        ),
        sampling_layouts=_shared.DRAWING,
        save_every=1000,
    )
