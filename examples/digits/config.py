"""What `python -m train.main --config digits` does: a VQ tokenizer, then the three stages, on handwritten digits."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar, Literal

from train.config import KINDS, EvalConfig, TrainConfig
from train.vq import VQTrainConfig


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """A whole run.

    Attributes:
      workdir: everything that the run writes goes here.
      seed: of data, VQ tokenizer and all stages; those of `vq` and `stages` are not looked at.
      noise: standard deviation, in 255ths, of the noise on training images to be understood.
      vq: training of the VQ tokenizer.
      stages: one after the other; `run_stages` fills in where each finds what it reads.
      guidance, temperature: at which the digits to be judged are drawn.
      images_per_class: digits drawn of each class to be judged.
      split: the images that the final figures are read on. Settings are chosen on 'validation', which counts among
        the training images once 'held_out' is read.
    """

    RUNNER: ClassVar[str] = "examples.digits.run:run"  # what `train.main` calls with the config and `steal`

    workdir: str
    vq: VQTrainConfig
    stages: tuple[TrainConfig, ...]
    seed: int = 0
    noise: float = 12.0
    guidance: float = 3.0
    temperature: float = 1.0
    images_per_class: int = 40
    split: Literal["held_out", "validation"] = "held_out"

    def __post_init__(self):
        for stage in self.stages:
            if stage.model.gen_vision != self.vq.model:
                raise ValueError(f"the VQ model of {stage.name} is not that of vq; change both alike")
        if self.image_size % 8:
            raise ValueError(f"the VQ model draws {self.image_size} pixels a side; digits need a multiple of their 8")

    @property
    def training_splits(self) -> tuple[str, ...]:
        """What models and judge are trained on."""
        return ("train",) if self.split == "validation" else ("train", "validation")

    @property
    def image_size(self) -> int:
        """Pixels a side of the digits: as many as the VQ model draws."""
        return self.vq.model.image_size

    # ------------------------------------------------------------ where everything lies

    @property
    def sources(self) -> pathlib.Path:
        """Of `digits_data.write_sources`, a folder for each split."""
        return pathlib.Path(self.workdir) / "sources"

    @property
    def tokenizer(self) -> pathlib.Path:
        return pathlib.Path(self.workdir) / "tokenizer"

    @property
    def vq_folder(self) -> pathlib.Path:
        return pathlib.Path(self.workdir) / "vq"

    def prepared(self, split: str, kind: str) -> pathlib.Path:
        """The folder that `train.prepare` writes for a split and kind."""
        return pathlib.Path(self.workdir) / "prepared" / split / kind

    # ------------------------------------------------------------ what runs

    @property
    def run_vq(self) -> VQTrainConfig:
        """`vq` with this run's seed."""
        return dataclasses.replace(self.vq, seed=self.seed)

    @property
    def run_stages(self) -> tuple[TrainConfig, ...]:
        """`stages` with this run's seed and folders, each but the first starting where the one before it ended."""
        made: list[TrainConfig] = []
        for stage in self.stages:
            read = [kind for kind, part in zip(KINDS, stage.data.ratio, strict=True) if part]
            folders = {kind: (str(self.prepared("train", kind)),) if kind in read else () for kind in KINDS}
            held = {k: (str(self.prepared("validation", k)),) for k in ("understanding", "generation")}
            evaluation = stage.evaluation
            made.append(
                dataclasses.replace(
                    stage,
                    workdir=str(pathlib.Path(self.workdir) / stage.name),
                    seed=self.seed,
                    data=dataclasses.replace(stage.data, **folders),
                    evaluation=EvalConfig(**held, every=evaluation.every, batches=evaluation.batches),
                    tokenizer=str(self.tokenizer),
                    init_from=made[-1].workdir if made else "",
                    vq_from="" if made else str(self.vq_folder),
                )
            )
        return tuple(made)
