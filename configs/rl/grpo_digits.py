"""GRPO, DPO, a reward to be wary of, and GRPO of answers, on the trained digits: minutes on two cores."""

from __future__ import annotations

from configs.digits import MODEL
from examples.digits.rl.config import DigitsRlConfig
from train.config import DataConfig, DpoConfig, GrpoConfig, OptimizerConfig, RewardConfig, TrainConfig


def get_config() -> DigitsRlConfig:
    judge = RewardConfig("examples.digits.rl.judges:Recognized", workers=0, batch_size=1024)
    grpo = GrpoConfig(rewards=(judge,), group=8, loss="none", guidance=1.0, epochs=1, updates=2, clip=0.2, kl=0.02)
    match = RewardConfig("train.rl.rewards.answers:Match", workers=0, batch_size=1024, options=("rule=exact",))
    # The trained model is sure of its answers, right or wrong: a higher temperature makes them differ.
    answers = GrpoConfig(
        rewards=(match,), rollouts="answers", max_new_tokens=8, group=8, temperature=1.5, top_k=10, updates=2, kl=0.02
    )
    return DigitsRlConfig(
        workdir="runs/grpo_digits",
        grpo=_run("grpo", steps=42, batch_size=320, learning_rate=3e-4, grpo=grpo),
        dpo=_run("dpo", steps=100, batch_size=64, learning_rate=1e-4, dpo=DpoConfig(beta=0.1)),
        answers=_run(
            "answers", steps=40, batch_size=160, learning_rate=2e-4, grpo=answers, stage=3, loss_chunk=8,
            data=DataConfig(context=32, images_per_row=1, workers=0),
        ),
    )  # fmt: skip


def _run(name: str, steps: int, batch_size: int, learning_rate: float, **how) -> TrainConfig:
    return TrainConfig(
        name=name,
        workdir=f"runs/grpo_digits/{name}/run",
        model=MODEL,
        steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=5, b2=0.99),
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        log_every=5,
        save_every=steps,
        keep=1,
        **{"stage": 2, "loss_chunk": 16, "data": DataConfig(context=48, workers=0)} | how,
    )
