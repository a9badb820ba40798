"""The class that lmms-eval makes of `--model janus_jax`; needs lmms-eval, see `janus_jax.lmms_eval`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from janus_jax import compilation_cache
from janus_jax.io.messages import one_line
from janus_jax.lmms_eval.questions import Question, answer_all, question_of
from janus_jax.loading import load
from janus_jax.sharding import batch_shards

_AT_A_TIME = 64  # questions on each shard of the mesh, unless the command says how many


class JanusJax(lmms):
    """A loaded Janus that answers lmms-eval's requests, in batches.

    `--model_args` are these arguments; `batch_size` is that of the command, where "auto" is `_AT_A_TIME` a shard, or as
    many as fit in memory.

    Args:
      pretrained: a checkpoint's folder, or hub id.
      dtype, weights, adapter, roles: see `janus_jax.load`; roles default to those of the reports' evaluations.
      mesh: sizes of a mesh's axes, such as `data=8`, with semicolons between several.
      max_new_tokens: of an answer, where a task does not say.
      system_prompt: in front of all questions, where a task has none; default none, as in the reports.
      seed: of answers that are drawn.
    Raises: ValueError in one line for arguments that are wrong or unknown, and as `janus_jax.load`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        adapter: str | None = None,
        mesh: str | None = None,
        roles: str = "old",
        max_new_tokens: int = 512,
        system_prompt: str = "",
        seed: int = 0,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"--model_args: unknown {one_line(', '.join(sorted(unknown)))}")
        if device is not None:
            raise ValueError("--device is not for janus_jax: JAX takes the accelerator, or what JAX_PLATFORMS names")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "janus_jax has all devices in one process: start lmms-eval without accelerate or torchrun, with "
                "mesh=data=N in --model_args"
            )
        count, axes = _count(batch_size, max_batch_size), _mesh(mesh)
        compilation_cache.enable()
        given = {"dtype": dtype, "weights": weights, "adapter": adapter, "roles": roles}
        self.janus = load(pretrained, mesh=axes, **given)
        self.batch_size = count or _AT_A_TIME * batch_shards(self.janus.mesh)
        if self.janus.processor is None:
            raise ValueError(f"{one_line(pretrained)} has no tokenizer.json, which is needed to ask it")
        tag = self.janus.processor.tokenizer.image_placeholder
        self._how = {"max_new_tokens": int(max_new_tokens), "system_prompt": str(system_prompt), "image_tag": tag}
        self._seed = int(seed)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to the requests, in order."""
        questions = [self._question(request) for request in requests]
        with tqdm(total=len(requests), desc="answering") as bar:
            answers = answer_all(self.janus, questions, self.batch_size, self._seed, bar.update)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _question(self, request: Instance) -> Question:
        _, messages_of, settings, number, task, split = request.args
        messages = messages_of(self.task_dict[task][split][number])
        return question_of(f"{task} {number}", messages, settings, **self._how)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: ValueError."""
        raise ValueError("janus_jax answers in words; tasks that compare likelihoods have a variant that generates")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: ValueError."""
        raise ValueError("janus_jax has no tasks of several rounds")


def _mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    try:
        return {axis.strip(): int(size) for axis, size in (each.split("=") for each in str(text).split(";"))}
    except ValueError:
        raise ValueError(f"mesh must look like data=8, or data=2;tensor=4, got {one_line(text)!r}") from None


def _count(batch_size: int | str | None, most: int | str | None) -> int | None:
    """Questions at a time; None for as many as fit, up to `most`."""
    chosen = most if batch_size is None or str(batch_size).startswith("auto") else batch_size
    if chosen is None:
        return None
    if not str(chosen).isdigit() or int(chosen) < 1:
        raise ValueError(f"--batch_size must be auto or a number from 1, got {one_line(chosen)!r}")
    return int(chosen)
