"""Settings of both sizes: your own pictures to draw and to talk about, on one device of 16 GB."""

from __future__ import annotations

from janus_jax.config import PRESETS
from train.config import AdapterConfig, DataConfig, Layout, MeshConfig, OptimizerConfig, SampleConfig, TrainConfig

_DEVICES = ("v5e-1", "t4-1")


def adapter_run(size: str, model: str, weights: str | None) -> TrainConfig:
    return TrainConfig(
        name=f"lora_{size.lower()}",
        workdir=f"runs/lora_{size.lower()}",
        model=PRESETS[model],
        stage=3,
        adapter=AdapterConfig(rank=16, alpha=32.0, targets=("decoder",), weights=weights),
        init_from=f"deepseek-ai/Janus-Pro-{size}",
        steps=1000,
        batch_size=8,
        accumulate=8,
        data=DataConfig(
            understanding=("data/prepared/own_understanding",),
            generation=("data/prepared/own_generation",),
            ratio=(1, 0, 1),
            context=2048,
            images_per_row=2,
            text_loss="answers",
            workers=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=50, b2=0.99),
        samples=SampleConfig(every=250, prompts=("a red bicycle leaning against a white wall",), images=2),
        layouts=tuple(Layout(name, MeshConfig(), accumulate=8) for name in _DEVICES),
        save_every=200,
        keep=1,
    )
