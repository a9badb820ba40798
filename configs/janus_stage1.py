"""Janus 1.3B, stage 1: adapters and image head, on captions and ImageNet (Janus, arXiv 2410.13848, table 1)."""

from __future__ import annotations

import dataclasses

from configs import _shared
from janus_jax.config import PRESETS
from train.config import DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="janus_stage1",
        workdir="runs/janus_stage1",
        model=PRESETS["janus_1_3b"],
        stage=1,
        # The paper starts from DeepSeek-LLM 1.3B, SigLIP and LlamaGen's VQ-16 with random adapters. For that:
        #   init_from= language_from=LLAMA vision_from=SIGLIP vq_from=VQ16 tokenizer=FOLDER
        # A whole Janus checkpoint starts from trained parts instead, adapters included.
        init_from="checkpoints/janus_1_3b",
        tokenizer="checkpoints/janus_1_3b",
        steps=10_000,
        batch_size=256,
        data=DataConfig(
            understanding=_shared.CAPTIONS,
            generation=_shared.IMAGENET,
            ratio=(1, 0, 1),
            context=_shared.CONTEXT,
            # About 650 tokens per caption sample and 590 per ImageNet one: 3.3 images per row on average.
            images_per_row=4,
            guidance_dropout=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=300, b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0
        ),
        evaluation=dataclasses.replace(_shared.HELD_OUT, text=()),
        samples=_shared.CATEGORY_SAMPLES,
        layouts=_shared.layouts(
            {"v5e-256": 1, "v5p-128": 1, "v6e-256": 1, "2xv5e-256": 1, "2xv5p-128": 1}, 16, {"2xv5e-256": 2}
        ),
        save_every=1000,
    )
