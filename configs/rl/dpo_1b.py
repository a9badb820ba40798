"""DPO of Janus-Pro 1B on prepared pairs (`train.prepare --kind preference`): on eight chips or GPUs."""

from __future__ import annotations

from configs.rl._shared import dpo_run
from train.config import Layout, MeshConfig, TrainConfig


def get_config() -> TrainConfig:
    layouts = tuple(
        Layout(name, MeshConfig(data=1, fsdp=8), accumulate=count, remat="dots")
        for name, count in (("v5e-8", 2), ("h100-8", 1))
    )
    return dpo_run("1B", layouts)
