"""GRPO, DPO and a reward to be wary of, on the trained digits: minutes on two cores."""

from __future__ import annotations

from configs.digits import MODEL
from examples.digits.rl.config import DigitsRlConfig
from train.config import DataConfig, DpoConfig, GrpoConfig, OptimizerConfig, RewardConfig, TrainConfig


def get_config() -> DigitsRlConfig:
    judge = RewardConfig("examples.digits.rl.judges:Recognized", workers=0, batch_size=1024)
    grpo = GrpoConfig(rewards=(judge,), group=8, loss="none", guidance=1.0, epochs=1, updates=2, clip=0.2, kl=0.02)
    return DigitsRlConfig(
        workdir="runs/grpo_digits",
        grpo=_run("grpo", steps=42, batch_size=320, learning_rate=3e-4, grpo=grpo),
        dpo=_run("dpo", steps=100, batch_size=64, learning_rate=1e-4, dpo=DpoConfig(beta=0.1)),
    )


def _run(name: str, steps: int, batch_size: int, learning_rate: float, **how) -> TrainConfig:
    return TrainConfig(
        name=name,
        workdir=f"runs/grpo_digits/{name}/run",
        model=MODEL,
        stage=2,
        steps=steps,
        batch_size=batch_size,
        data=DataConfig(context=48, workers=0),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=5, b2=0.99),
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        loss_chunk=16,
        log_every=5,
        save_every=steps,
        keep=1,
        **how,
    )
