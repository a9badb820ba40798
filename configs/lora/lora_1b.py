"""Janus-Pro 1B with a low-rank adapter over bfloat16 (on GPUs without bfloat16 units, set the dtypes to float16)."""

from __future__ import annotations

from configs.lora._shared import adapter_run
from train.config import TrainConfig


def get_config() -> TrainConfig:
    return adapter_run("1B", "janus_pro_1b", weights=None)
