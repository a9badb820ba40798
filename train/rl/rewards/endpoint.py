"""Scores by anybody's HTTP endpoint: pictures or answers, prompts and metadata are posted, and numbers come back.

POST {"images": ["<PNG in base64>", ...], "prompts": ["a cat", ...], "metadata": [{}, ...]}
POST {"answers": ["It is a cat.", ...], "prompts": ["What is it?", ...], "metadata": [{}, ...]}
200  {"scores": [0.5, ...]}
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from evals.posting import NoReply, address, post
from janus_jax.io.messages import one_line
from train.rl.rewards.functions import Judged, Metadata


class Endpoint:
    """Asks an endpoint; a null among its scores is for what it cannot score.

    Args:
      url: its address.
      timeout: seconds for one request.
      tries: requests for the same ones, where trying again can help: not for 400, 401, 403 and the like.
      wait: seconds before the second one; each next one waits twice as long.
      key: name of the environment's variable with the key for the header Authorization, if it is set.
    Raises: ValueError for an address that is none.
    """

    def __init__(
        self, url: str, timeout: float = 120, tries: int = 5, wait: float = 1, key: str = "REWARD_API_KEY"
    ):  # fmt: skip
        if address(url) is None:
            raise ValueError(f"url must be an address such as http://localhost:8000/score, got {one_line(url)}")
        if not (timeout > 0 and tries >= 1 and wait >= 0):
            raise ValueError("timeout must be above 0, tries at least 1 and wait at least 0")
        self._url = url
        self._post = functools.partial(
            post, url, key=os.environ.get(key), timeout=timeout, wait=wait, tries=tries
        )  # fmt: skip

    def __call__(self, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `train.rl.rewards`; float64 [N]. OSError in one line if there is no reply, or none with N scores."""
        pictures = isinstance(judged, np.ndarray)
        given = {"images": [_png(picture) for picture in judged]} if pictures else {"answers": list(judged)}
        what = f"{len(judged)} {'pictures' if pictures else 'answers'}"
        try:
            return self._post(
                given | {"prompts": list(prompts), "metadata": list(metadata)},
                lambda raw: _scores(raw, len(judged), what),
            )
        except NoReply as error:
            raise OSError(f"{one_line(self._url)}: {error}") from None


def _png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _scores(raw: bytes, count: int, what: str) -> np.ndarray:
    try:
        found = json.loads(raw)["scores"]
        scores = np.array([np.nan if each is None else each for each in found], np.float64)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError('the reply is not {"scores": [numbers]}') from None
    if scores.shape != (count,):
        raise ValueError(f"the reply has {len(found)} scores for {what}")
    return scores
