"""Settings of both sizes: groups of eight pictures, guided as they are drawn, and rewards by a model of preferences."""

from __future__ import annotations

from janus_jax.config import PRESETS
from train.config import (
    AdapterConfig,
    DataConfig,
    DpoConfig,
    GrpoConfig,
    Layout,
    OptimizerConfig,
    RewardConfig,
    SampleConfig,
    TrainConfig,
)

# A prompt of up to 192 tokens beside the 576 codes of a picture: whole blocks of attention's kernels.
_CONTEXT = 768
_SAMPLES = SampleConfig(
    every=100,
    prompts=(
        "a red bicycle leaning against a white wall",
        "two cats and three oranges on a wooden table",
        "a green cup to the left of a yellow book",
        "an astronaut riding a horse in a snowy forest",
    ),
    images=4,
)


def grpo_run(
    size: str, batch_size: int, layouts: tuple[Layout, ...], accumulate: int, adapter: AdapterConfig | None = None
) -> TrainConfig:
    """GRPO of Janus-Pro of `size` on a file of prompts."""
    reward = RewardConfig("train.rl.rewards.clip:PickScore", workers=2)
    return TrainConfig(
        name=f"grpo_{size.lower()}",
        workdir=f"runs/grpo_{size.lower()}",
        model=PRESETS[f"janus_pro_{size.lower()}"],
        stage=2 if adapter is None else 3,
        adapter=adapter,
        grpo=GrpoConfig(
            prompts=("data/prompts.jsonl",), rewards=(reward,), group=8, guidance=5.0, draw_batch=batch_size,
            updates=2, kl=0.01,
        ),
        init_from=f"deepseek-ai/Janus-Pro-{size}",
        steps=1600,
        batch_size=batch_size,
        accumulate=accumulate,
        data=DataConfig(context=_CONTEXT, workers=0),
        # Two updates of each rollout, so that the ratio is more than 1 in name.
        optimizer=OptimizerConfig(learning_rate=1e-6 if adapter is None else 2e-5, warmup_steps=20, b2=0.99),
        loss_chunk=192,
        samples=_SAMPLES,
        layouts=layouts,
        log_every=1,
        save_every=100,
    )  # fmt: skip


def dpo_run(size: str, layouts: tuple[Layout, ...]) -> TrainConfig:
    """DPO of Janus-Pro of `size` on prepared pairs."""
    return TrainConfig(
        name=f"dpo_{size.lower()}",
        workdir=f"runs/dpo_{size.lower()}",
        model=PRESETS[f"janus_pro_{size.lower()}"],
        stage=2,
        dpo=DpoConfig(pairs=("data/prepared/pairs",), beta=0.1),
        init_from=f"deepseek-ai/Janus-Pro-{size}",
        steps=2000,
        batch_size=64,
        data=DataConfig(context=_CONTEXT, workers=2),
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup_steps=100, b2=0.99),
        loss_chunk=192,
        samples=_SAMPLES,
        layouts=layouts,
        save_every=500,
    )


def answers_run(size: str, batch_size: int, layouts: tuple[Layout, ...], accumulate: int) -> TrainConfig:
    """GRPO of the answers of Janus-Pro of `size` to a file of questions about pictures, of which it has the answers."""
    reward = RewardConfig("train.rl.rewards.answers:Match", workers=0, batch_size=batch_size)
    return TrainConfig(
        name=f"grpo_answers_{size.lower()}",
        workdir=f"runs/grpo_answers_{size.lower()}",
        model=PRESETS[f"janus_pro_{size.lower()}"],
        stage=2,
        grpo=GrpoConfig(
            prompts=("data/questions.jsonl",), rewards=(reward,), rollouts="answers", max_new_tokens=256, group=8,
            updates=2, kl=0.01,
        ),
        init_from=f"deepseek-ai/Janus-Pro-{size}",
        steps=1000,
        batch_size=batch_size,
        accumulate=accumulate,
        # The tokens of one picture, 192 of a question with the system prompt, and the answer.
        data=DataConfig(context=1024, images_per_row=1, workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=20, b2=0.99),
        loss_chunk=128,
        layouts=layouts,
        log_every=1,
        save_every=100,
    )  # fmt: skip
