"""GRPO of Janus-Pro 1B on answers to questions whose right answers are known: on eight chips or GPUs."""

from __future__ import annotations

from configs.rl._shared import answers_run
from train.config import Layout, MeshConfig, TrainConfig


def get_config() -> TrainConfig:
    layouts = (
        Layout("v5e-8", MeshConfig(data=1, fsdp=8), accumulate=4, remat="dots"),
        Layout("h100-8", MeshConfig(data=1, fsdp=8), accumulate=2, remat="dots"),
    )
    return answers_run("1B", 128, layouts, accumulate=2)
