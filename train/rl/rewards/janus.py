"""Janus as the judge: how sure it is that a picture shows what its prompt says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import janus_jax
from janus_jax.io.messages import one_line
from janus_jax.model.janus import Janus, run
from janus_jax.processing.tokenizer import Tokenizer
from janus_jax.sampling.text import embed_prompt
from train.rl.rewards.functions import Metadata

QUESTION = 'Does this image accurately show "{prompt}"? Please answer yes or no.'


class YesNo:
    """The probability of yes as the answer's first word, among yes and no; from 0 to 1.

    The judge is a checkpoint of its own, which does not change while the run does: one that judged itself would learn
    to say yes. Use `workers=0`, so that it computes on the device, where it needs room beside the run (int8 takes half
    of it); in a worker process it computes on the CPU.

    Args:
      model: a checkpoint's folder or hub id.
      question: what it is asked about each picture; `{prompt}` stands for the prompt.
      weights, dtype, adapter: as for `janus_jax.load`.
    Raises: ValueError or OSError in one line if it cannot be loaded, or its tokens do not tell yes from no.
    """

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        weights: str | None = None,
        dtype: str | None = None,
        adapter: str | None = None,
    ):
        if "{prompt}" not in question:
            raise ValueError(f"the question must have {{prompt}} in it, got {one_line(question)!r}")
        self._question = question
        self._janus = janus_jax.load(model, dtype, weights=weights, adapter=adapter, progress=False)
        if self._janus.processor is None:
            raise ValueError(f"{one_line(model)} has no tokenizer.json, which is needed for a question")
        self._processor = self._janus.processor
        self._yes, self._no = first_tokens(self._processor.tokenizer)

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `train.rl.rewards`; float64 [N]."""
        janus = self._janus
        asked = [self._question.replace("{prompt}", prompt) for prompt in prompts]
        ids, where, pixels, mask = self._processor.understanding_batch(asked, [[each] for each in pictures], "", 1)
        logits = np.asarray(_last_logits(janus.model, janus.params, ids, where, pixels, mask), np.float64)
        yes, no = (np.logaddexp.reduce(logits[:, tokens], axis=1) for tokens in (self._yes, self._no))
        return 1 / (1 + np.exp(no - yes))


def first_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """With what answers of yes and of no begin: ids that only one of the two has. ValueError if there are none."""
    found = []
    for word in ("yes", "no"):
        forms = [f"{space}{form}" for space in ("", " ") for form in (word, word.capitalize(), word.upper())]
        found.append({tokenizer.encode(form, add_bos=False)[0] for form in forms})
    yes, no = found[0] - found[1], found[1] - found[0]
    if not (yes and no):
        raise ValueError("the tokenizer begins yes and no with the same tokens, so that the model cannot be the judge")
    return sorted(yes), sorted(no)


@functools.partial(jax.jit, static_argnames=("model",))
def _last_logits(
    model: Janus, params: dict[str, Any], ids: jax.Array, where: jax.Array, pixels: jax.Array, mask: jax.Array
) -> jax.Array:
    """Logits [B, vocabulary] after prompts that end at the last position."""
    x = embed_prompt(model, params, ids, where, pixels)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden = run(model, params, "hidden", x, positions, mask.astype(jnp.int32))
    return run(model, params, "text_logits", hidden[:, -1:])[:, 0]
