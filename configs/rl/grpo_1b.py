"""GRPO of Janus-Pro 1B, all parameters that draw: on eight chips or GPUs."""

from __future__ import annotations

from configs.rl._shared import grpo_run
from train.config import Layout, MeshConfig, TrainConfig


def get_config() -> TrainConfig:
    layouts = (
        Layout("v5e-8", MeshConfig(data=1, fsdp=8), accumulate=2, remat="dots"),
        Layout("h100-8", MeshConfig(data=1, fsdp=8), accumulate=1, remat="dots"),
    )
    return grpo_run("1B", 64, layouts, accumulate=1)
