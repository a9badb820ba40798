"""What GRPO draws in a step: pictures of prompts, or answers to them, as arrays of `train.rl.loss`."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence

import jax
import numpy as np

from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import understanding_pixels
from janus_jax.sampling.sampler import Options
from janus_jax.sampling.text import Asked
from train.config import TrainConfig
from train.raw.storage import machine_error, patiently
from train.rl.config import GrpoConfig
from train.rl.prompts import Prompt, padded, read_prompts
from train.rl.rewards.functions import Judged

Arrays = dict[str, np.ndarray]


class Rollouts(abc.ABC):
    """Draws in the steps of a run, and has read its prompts.

    Raises: as `read_prompts` does.
    """

    def __init__(self, config: TrainConfig, processor: Processor):
        self.config, self.processor, self.options = config, processor, drawing_options(config.grpo)
        self.longest = config.data.context - config.drawn
        images = config.data.images_per_row if config.answers else -1
        self.prompts = read_prompts(config.grpo.prompts, processor, self.longest, config.seed, images)

    @abc.abstractmethod
    def given(self, prompts: Sequence[Prompt]) -> tuple[Arrays, dict[int, str]]:
        """The arrays of prompts, a row for each, and of those that are damaged the row and what is wrong."""

    @abc.abstractmethod
    def draw(self, pipeline: JanusPipeline, given: Arrays, keys: jax.Array, batch_size: int | None) -> Arrays:
        """What is drawn for the rows of `given` with `keys`, a row for each. NotFinite if the model fails."""

    @abc.abstractmethod
    def judged(self, pipeline: JanusPipeline, drawn: Arrays) -> Judged:
        """What rewards see of it."""

    @abc.abstractmethod
    def figures(self, drawn: Arrays) -> dict[str, float]:
        """Metrics of all that was drawn in a step."""


class Pictures(Rollouts):
    """Draws pictures."""

    def given(self, prompts: Sequence[Prompt]) -> tuple[Arrays, dict[int, str]]:
        return padded([each.ids for each in prompts], self.processor, self.longest, self.config.grpo.guided), {}

    def draw(self, pipeline: JanusPipeline, given: Arrays, keys: jax.Array, batch_size: int | None) -> Arrays:
        window = self.config.grpo.speculate
        codes = pipeline.sample_codes(
            given["ids"], given["mask"], keys, self.options, batch_size=batch_size, progress=False,
            speculate="auto" if window == 0 else window > 1 and window,
        )  # fmt: skip
        return {"codes": codes}

    def judged(self, pipeline: JanusPipeline, drawn: Arrays) -> Judged:
        return pipeline.decode_codes(drawn["codes"])

    def figures(self, drawn: Arrays) -> dict[str, float]:
        return {"distinct": _distinct(drawn["codes"])}


class Answers(Rollouts):
    """Draws answers, from the conversations that `JanusPipeline.chat` would have."""

    def given(self, prompts: Sequence[Prompt]) -> tuple[Arrays, dict[int, str]]:
        """A picture that cannot be read stays blank. OSError if the machine cannot read, see `patiently`."""
        arrays = padded([each.ids for each in prompts], self.processor, self.longest, guided=False)
        placeholder = self.processor.tokenizer.image_placeholder_id
        arrays["where"] = (arrays["ids"][:, 0] == placeholder) & arrays["mask"][:, 0]
        most, size, problems = self.config.data.images_per_row, self.config.model.vision.image_size, {}
        if not most:
            return arrays, problems
        arrays["pixels"] = np.zeros((len(prompts), most, size, size, 3), np.float32)
        for row, prompt in enumerate(prompts):
            for number, image in enumerate(prompt.images):
                read = functools.partial(understanding_pixels, image, self.processor.settings)
                try:
                    arrays["pixels"][row, number] = patiently(read)
                except (OSError, ValueError) as error:
                    if machine_error(error):
                        raise
                    problems[row] = str(error)
        return arrays, problems

    def draw(self, pipeline: JanusPipeline, given: Arrays, keys: jax.Array, batch_size: int | None) -> Arrays:
        prompts = given["ids"][:, 0], given["where"], given.get("pixels"), given["mask"][:, 0]
        asked = Asked((*prompts, keys), self.config.drawn, self.options.sampler)
        tokens = pipeline.sample_tokens(asked, batch_size)
        ends = tokens == self.processor.tokenizer.eos_id
        # Up to the first EOS.
        return {"tokens": tokens, "said": np.cumsum(ends, axis=1) - ends == 0}

    def judged(self, pipeline: JanusPipeline, drawn: Arrays) -> Judged:
        return [self.processor.tokenizer.answer(row) for row in drawn["tokens"].tolist()]

    def figures(self, drawn: Arrays) -> dict[str, float]:
        ended = (drawn["tokens"] == self.processor.tokenizer.eos_id).any(1)
        return {
            "distinct": _distinct(drawn["tokens"]),
            "answer_length": float(drawn["said"].sum(1).mean()),
            "unfinished": float(1 - ended.mean()),
        }


def rollouts_of(config: TrainConfig, processor: Processor) -> Rollouts:
    """What `config` draws."""
    return (Answers if config.answers else Pictures)(config, processor)


def drawing_options(grpo: GrpoConfig) -> Options:
    """The settings with which pictures or answers are drawn."""
    weight = grpo.guidance if grpo.guided else 1.0
    return Options(temperature=grpo.temperature, top_k=grpo.top_k or None, top_p=grpo.top_p, cfg_weight=weight)


def _distinct(drawn: np.ndarray) -> float:
    return len(np.unique(drawn, axis=0)) / len(drawn)
