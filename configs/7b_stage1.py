"""Janus-Pro 7B, stage 1: adapters and image head, on captions and ImageNet (Janus-Pro, arXiv 2501.17811, table 2)."""

from __future__ import annotations

import dataclasses

from configs import _shared
from janus_jax.config import PRESETS
from train.config import DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="7b_stage1",
        workdir="runs/7b_stage1",
        model=PRESETS["janus_pro_7b"],
        stage=1,
        # The report starts from DeepSeek-LLM, SigLIP and LlamaGen's VQ-16 with random adapters. For that:
        #   init_from= language_from=LLAMA vision_from=SIGLIP vq_from=VQ16 tokenizer=FOLDER
        # A whole Janus checkpoint starts from trained parts instead, adapters included.
        init_from="checkpoints/janus_pro_7b",
        tokenizer="checkpoints/janus_pro_7b",
        steps=20_000,
        batch_size=256,
        data=DataConfig(
            understanding=_shared.CAPTIONS,
            generation=_shared.IMAGENET,
            ratio=(1, 0, 3),
            context=_shared.CONTEXT,
            # About 650 tokens per caption sample and 590 per ImageNet one: 1.7 images per row on average.
            images_per_row=2,
            guidance_dropout=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=600, b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0
        ),
        evaluation=dataclasses.replace(_shared.HELD_OUT, text=()),
        samples=_shared.CATEGORY_SAMPLES,
        layouts=_shared.layouts(
            {"v5e-256": 1, "v5p-128": 1, "v6e-256": 1, "2xv5e-256": 1, "2xv5p-128": 1},
            32,
            {"2xv5e-256": 2},
        ),
        save_every=1000,
    )
