"""Janus-Pro 7B, stage 2: unified pretraining of all but the encoders (Janus-Pro, arXiv 2501.17811, table 2)."""

from __future__ import annotations

from configs import _shared
from janus_jax.config import PRESETS
from train.config import DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="7b_stage2",
        workdir="runs/7b_stage2",
        model=PRESETS["janus_pro_7b"],
        stage=2,
        init_from="runs/7b_stage1",
        tokenizer="checkpoints/janus_pro_7b",
        # Planned 360 000, stopped early at 270 000 (report, section 3.1).
        steps=270_000,
        batch_size=512,
        data=DataConfig(
            understanding=_shared.STAGE2_UNDERSTANDING,
            text=_shared.STAGE2_TEXT,
            generation=_shared.STAGE2_GENERATION,
            generation_weights=(1.0, 1.0),
            ratio=(2, 3, 5),
            context=_shared.CONTEXT,
            # 900 tokens per sample with an image, 1000 per text, 650 per drawn image: 1 images per row on average.
            images_per_row=2,
            guidance_dropout=0.1,
            text_loss="all",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=5000, b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0
        ),
        evaluation=_shared.HELD_OUT,
        samples=_shared.SAMPLES,
        layouts=_shared.layouts(
            {"v5e-256": 2, "v5p-128": 2, "v6e-256": 2, "2xv5e-256": 1, "2xv5p-128": 1},
            32,
            remat={"v5e-256": "attention", "2xv5e-256": "attention"},
        ),
        save_every=1000,
    )
