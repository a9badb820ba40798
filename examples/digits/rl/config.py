"""What `python -m train.main --config grpo_digits` does: GRPO, DPO, a bad reward, and answers, on trained digits."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar

from train.config import RewardConfig, TrainConfig

QUESTIONS = "questions.jsonl"
PARTS = ("grpo", "dpo", "brightness", "answers")
BRIGHTNESS = RewardConfig("train.rl.rewards.brightness:brightness", workers=0, batch_size=1024)


@dataclasses.dataclass(frozen=True)
class DigitsRlConfig:
    """A demonstration in parts, each of which starts from the same trained digits.

    Attributes:
      workdir: everything that is written goes here, a folder for each part.
      model: a checkpoint of `python -m train.main --config digits`; empty for the one in runs/digits, or a short run's.
      grpo: the run with the judge's verdict as the reward; `run` fills in where it finds what it reads.
      dpo: the run on pairs that the judge has made of the model's own pictures.
      brightness: the run of `grpo` with the mean brightness as the reward instead, for so many steps.
      answers: the run on questions about dark pictures, with right answers as the reward.
      dark: how bright these are, as a share of those that the model was trained on.
      parts: which of `PARTS` are run.
      rewarded: how many of the wordings of a prompt are rewarded; pictures of the others are what is judged.
      images: pictures that are judged before and after.
      pairs: pairs for DPO, at most.
      temperature: at which they are drawn, without guidance.
      seed: of everything.
    """

    RUNNER: ClassVar[str] = "examples.digits.rl.run:run"  # what `train.main` calls with the config and `steal`

    workdir: str
    grpo: TrainConfig
    dpo: TrainConfig
    answers: TrainConfig
    model: str = ""
    brightness: int = 60
    dark: float = 0.5
    parts: tuple[str, ...] = ("grpo",)
    rewarded: int = 4
    images: int = 1000
    pairs: int = 4000
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts must be among {', '.join(PARTS)}, got {part}")
        if self.images % 10 or not self.images:
            raise ValueError(f"images must be a multiple of 10, as many of each digit, got {self.images}")

    @property
    def prompts(self) -> pathlib.Path:
        """The file of the wordings that are rewarded."""
        return pathlib.Path(self.workdir) / "prompts.jsonl"

    @property
    def questions(self) -> pathlib.Path:
        """The folder of the questions, and the pictures that they are about."""
        return self.folder("answers") / "questions"

    @property
    def pairs_folder(self) -> pathlib.Path:
        """The prepared pairs."""
        return self.folder("dpo") / "pairs"

    def folder(self, part: str) -> pathlib.Path:
        return pathlib.Path(self.workdir) / part

    def runs(self, model: str) -> dict[str, TrainConfig]:
        """The run of each of `parts`, which starts from `model`."""
        grpo = dataclasses.replace(self.grpo.grpo, prompts=(str(self.prompts),))
        bright = dataclasses.replace(grpo, rewards=(BRIGHTNESS,))
        asked = dataclasses.replace(self.answers.grpo, prompts=(str(self.questions / QUESTIONS),))
        runs = {
            "grpo": dataclasses.replace(self.grpo, grpo=grpo),
            "dpo": dataclasses.replace(
                self.dpo, dpo=dataclasses.replace(self.dpo.dpo, pairs=(str(self.pairs_folder),))
            ),
            "brightness": dataclasses.replace(self.grpo, name="brightness", steps=self.brightness, grpo=bright),
            "answers": dataclasses.replace(self.answers, grpo=asked),
        }
        return {
            part: dataclasses.replace(
                runs[part], workdir=str(self.folder(part) / "run"), init_from=model, seed=self.seed
            )
            for part in self.parts
        }

    @property
    def run_stages(self) -> tuple[TrainConfig, ...]:
        """All runs."""
        return tuple(self.runs(self.model or "runs/digits").values())
