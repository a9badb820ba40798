"""GRPO of Janus-Pro 7B, all parameters that draw: on a TPU v5p-64, or on eight H100."""

from __future__ import annotations

from configs.rl._shared import grpo_run
from train.config import Layout, MeshConfig, TrainConfig
from train.plan.topologies import COMPILER_OPTIONS


def get_config() -> TrainConfig:
    layouts = (
        # Drawing reads all weights for each code, so that four chips share them.
        Layout(
            "v5p-64", MeshConfig(data=1, fsdp=8, tensor=4), accumulate=1, remat="dots",
            compiler_options=COMPILER_OPTIONS["v5p"],
        ),
        Layout("h100-8", MeshConfig(data=1, fsdp=8), accumulate=1, remat="dots"),
    )  # fmt: skip
    return grpo_run("7B", 128, layouts, accumulate=1)
