"""A trained Janus of handwritten digits, for notebooks: what a run has left, or a short run of a few minutes."""

from __future__ import annotations

import pathlib

from examples.digits.config import DigitsConfig
from examples.digits.run import prepare_data, train_tokenizer
from train.overrides import load_config
from train.run.loop import train

RUN, SHORT_RUN = "runs/digits", "runs/digits_short"
# A third of the recipe, in updates of fewer rows: more than half of the digits are drawn well, and most are read.
_SHORTER = (
    "vq.steps=450", "stages.0.steps=5", "stages.1.steps=20", "stages.2.steps=750", "stages.2.samples.every=0",
    "stages.2.log_every=75", "images_per_class=10", *(f"stages.{i}.batch_size=16" for i in range(3)),
    *(f"stages.{i}.optimizer.warmup_steps=5" for i in range(2)),
)  # fmt: skip


def short_config(workdir: str = SHORT_RUN) -> DigitsConfig:
    """The config `digits` cut to a third: three to four minutes on two cores instead of ten."""
    return load_config("digits", [f"workdir={workdir}", *_SHORTER])


def trained() -> pathlib.Path:
    """A checkpoint of handwritten digits: the export in `RUN`, else that in `SHORT_RUN`, which is made if need be.

    Both are relative to the current folder. `python -m train.main --config digits` makes the first. Killed and called
    again, the short run goes on where it was.
    """
    for workdir in (RUN, SHORT_RUN):
        exports = [path.parent for path in pathlib.Path(workdir, "stage3", "export").glob("*/config.json")]
        if exports:
            return max(exports, key=lambda path: int(path.name))
    config = short_config()
    train_tokenizer(config)
    prepare_data(config)
    return [train(stage) for stage in config.run_stages][-1]
