"""Janus-Pro 7B with a low-rank adapter over int4 kernels (QLoRA, arXiv 2305.14314, with this project's int4)."""

from __future__ import annotations

from configs.lora._shared import adapter_run
from train.config import TrainConfig


def get_config() -> TrainConfig:
    return adapter_run("7B", "janus_pro_7b", weights="int4")
