"""Digits of 12 x 12 codes, nine times as many as in `digits`: long enough to measure how fast images are drawn.

Otherwise as `digits`, but for a shorter stage 3 alone; a code stands for 2 x 2 pixels of 24 x 24.
"""

from __future__ import annotations

import dataclasses

from configs import digits
from examples.digits.config import DigitsConfig
from janus_jax.config import SiglipConfig, VQConfig
from train.vq import VQTrainConfig

VQ = VQConfig(
    ch=8, ch_mult=(1, 4), num_res_blocks=1, z_channels=32, codebook_size=256, codebook_dim=8, grid=12, norm_groups=8
)
MODEL = dataclasses.replace(
    digits.MODEL,
    vision=SiglipConfig(image_size=VQ.image_size, patch_size=8, width=96, layers=2, heads=4),
    gen_vision=VQ,
)
_STEPS = 4000


def get_config() -> DigitsConfig:
    # Stages 1 and 2 bring next to nothing at this size.
    stage = dataclasses.replace(
        digits.get_config().stages[-1],
        model=MODEL,
        steps=_STEPS,
        save_every=250,
        batch_size=24,
    )
    # A row holds the 144 codes of one image.
    data = dataclasses.replace(stage.data, ratio=(1, 0, 3), context=192, images_per_row=4)
    samples = dataclasses.replace(stage.samples, every=_STEPS)
    return dataclasses.replace(
        digits.get_config(),
        workdir="runs/digits_large",
        vq=VQTrainConfig(model=VQ, steps=600, batch_size=24, learning_rate=3e-3, reseed_every=50, reseed_until=400),
        stages=(dataclasses.replace(stage, data=data, samples=samples),),
        images_per_class=40,
    )
