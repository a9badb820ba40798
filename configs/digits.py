"""All three stages on handwritten digits, from nothing, in minutes on two cores."""

from __future__ import annotations

from examples.digits.config import DigitsConfig
from janus_jax.config import JanusConfig, LlamaConfig, SiglipConfig, VQConfig
from train.config import DataConfig, EvalConfig, OptimizerConfig, SampleConfig, TrainConfig
from train.vq import VQTrainConfig

VQ = VQConfig(
    ch=8, ch_mult=(1, 4, 4), num_res_blocks=1, z_channels=32, codebook_size=256, codebook_dim=8, grid=4, norm_groups=8
)
MODEL = JanusConfig(
    vision=SiglipConfig(image_size=16, patch_size=8, width=96, layers=3, heads=4),
    gen_vision=VQ,
    language=LlamaConfig(
        vocab_size=512, width=128, mlp_dim=352, layers=4, heads=2, kv_heads=2, head_dim=64, max_positions=256
    ),
    gen_head_width=128,
    dtype="float32",
)
# Chosen on the validation split: with less guidance another digit is drawn more often, and with more of it too.
GUIDANCE, TEMPERATURE = 2.25, 0.8


def get_config() -> DigitsConfig:
    # Stage 1 trains adapters on a random frozen decoder, which learns next to nothing at this scale.
    stages = (_stage(1, 20, (1, 0, 3)), _stage(2, 60, (2, 1, 4)), _stage(3, 850, (5, 1, 14), sample=True))
    return DigitsConfig(
        workdir="runs/digits",
        vq=VQTrainConfig(model=VQ, steps=900, batch_size=32, learning_rate=3e-3, reseed_every=50, reseed_until=500),
        stages=stages,
        guidance=GUIDANCE,
        temperature=TEMPERATURE,
        images_per_class=100,
    )


def _stage(stage: int, steps: int, ratio: tuple[int, int, int], sample: bool = False) -> TrainConfig:
    folders = {
        "understanding": ("runs/digits/prepared/train/understanding",),
        "text": ("runs/digits/prepared/train/text",),
        "generation": ("runs/digits/prepared/train/generation",),
    }
    prompts = tuple(f"a handwritten {digit}" for digit in range(10))
    return TrainConfig(
        name=f"stage{stage}",
        workdir=f"runs/digits/stage{stage}",
        model=MODEL,
        stage=stage,
        tokenizer="runs/digits/tokenizer",
        steps=steps,
        batch_size=40,
        data=DataConfig(**folders, ratio=ratio, context=64, images_per_row=2 if stage == 3 else 3, workers=0),
        # Constant in stages 1 and 2 as in the report; the last one ends at rest instead of being cut off.
        optimizer=OptimizerConfig(
            learning_rate=1e-3 if stage < 3 else 2e-3,
            schedule="cosine" if stage == 3 else "constant",
            warmup_steps=10 if stage < 3 else 50,
        ),
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        loss_chunk=64,
        evaluation=EvalConfig(
            understanding=("runs/digits/prepared/validation/understanding",),
            generation=("runs/digits/prepared/validation/generation",),
            every=0,
            batches=2,
        ),
        samples=SampleConfig(every=steps, prompts=prompts, images=8, guidance=GUIDANCE, temperature=TEMPERATURE)
        if sample
        else SampleConfig(),
        log_every=20,
        save_every=steps,
        keep=1,
    )
