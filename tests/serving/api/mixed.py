"""200 requests of all kinds, from 32 clients at a time, each of which checks that what it gets is the library's."""

import base64
import concurrent.futures
import dataclasses
import io
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_jax import JanusPipeline
from tests.library.tiny_janus import LONG, OTHER, QUESTION, SHORT, nearly_equal
from tests.serving.api.on_loopback import data_url

openai = pytest.importorskip("openai")

REQUESTS, CLIENTS = 200, 32
ANSWERED, DRAWN, LEFT, REFUSED, NOT_SERVED = "answered", "drawn", "left", "refused", "not served"
# Pictures in a question, its text, and the most tokens of its answer.
QUESTIONS = ((0, QUESTION, 20), (0, LONG, 8), (1, QUESTION, 20), (2, QUESTION, 12), (3, QUESTION, 20), (3, LONG, 8))
# Greedy, and two of which each seed gives an answer of its own.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
)
BAD: tuple[dict[str, Any], ...] = (
    {"n": 0},
    {"temperature": -1},
    {"max_tokens": 5000},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:text/plain,hello"}}]}]},
)


@dataclasses.dataclass
class Mixed:
    """The requests to a server of `janus` under the name `model`, and what they must give."""

    janus: JanusPipeline
    model: str

    def __post_init__(self):
        rng = np.random.default_rng(4)
        sizes = ((40, 60), (64, 64), (30, 90))
        self.pictures = [
            rng.integers(low, low + 100, (*size, 3), np.uint8) for low, size in zip((0, 80, 155), sizes, strict=True)
        ]
        self.answers = {
            (which, how): self.janus.chat(
                text, self.pictures[:count], limit, system_prompt="", **SETTINGS[how]
            )
            for which, (count, text, limit) in enumerate(QUESTIONS)
            for how in range(len(SETTINGS))
        }  # fmt: skip
        self.images = {prompt: self.janus.generate_images(prompt, 4) for prompt in (SHORT, OTHER)}
        assert len(set(self.answers.values())) > len(QUESTIONS), "mixing up would not be noticed"

    def kinds(self) -> list[str]:
        """What each of the requests is; the same every time."""
        return random.Random(0).choices((ANSWERED, DRAWN, LEFT, REFUSED), (55, 25, 10, 10), k=REQUESTS)

    def ask(self, client: Any, index: int, kind: str) -> str:
        """Makes a request; returns what became of it, after checking that it is right."""
        dice = random.Random(index)
        try:
            return getattr(self, f"_{kind}")(client, dice)
        except openai.APIConnectionError:
            return NOT_SERVED  # what the client tries again, unless it is told not to

    def _chat(self, client: Any, which: int, **how: Any) -> Any:
        count, text, limit = QUESTIONS[which]
        parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in self.pictures[:count]]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        messages = [{"role": "system", "content": ""}, user]
        asked: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": limit}
        return client.chat.completions.create(**asked | how)

    def _answered(self, client: Any, dice: random.Random) -> str:
        which, how, stream = dice.randrange(len(QUESTIONS)), dice.randrange(len(SETTINGS)), dice.random() < 0.5
        made = self._chat(client, which, stream=stream, **SETTINGS[how])
        if stream:
            chunks = list(made)
            assert chunks[-1].choices[0].finish_reason, "a stream that breaks off has no such end"
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            said = made.choices[0].message.content
        assert said == self.answers[which, how], (which, how, said)
        return ANSWERED

    def _drawn(self, client: Any, dice: random.Random) -> str:
        prompt, n = dice.choice([SHORT, OTHER]), dice.randrange(1, 5)
        if n == 1 and dice.random() < 0.5:
            *_, last = client.images.generate(prompt=prompt, stream=True, partial_images=2, extra_body={"seed": 0})
            assert last.type == "image_generation.completed"
            files = [last.b64_json]
        else:
            made = client.images.generate(prompt=prompt, n=n, extra_body={"seed": 0})
            files = [datum.b64_json for datum in made.data]
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]
        assert len(pictures) == n and all(map(nearly_equal, pictures, self.images[prompt]))
        return DRAWN

    def _left(self, client: Any, dice: random.Random) -> str:
        """A client that goes away in the middle."""
        stream = self._chat(client, dice.randrange(len(QUESTIONS)), stream=True, max_tokens=200, temperature=1.0)
        for _ in itertools.islice(stream, dice.randrange(1, 6)):
            pass
        stream.close()
        return LEFT

    def _refused(self, client: Any, dice: random.Random) -> str:
        try:
            self._chat(client, dice.randrange(len(QUESTIONS)), **dice.choice(BAD))
        except openai.BadRequestError as error:
            assert error.body["message"]
            return REFUSED
        raise AssertionError("it was not refused")


def ask_all(mixed: Mixed, client: Any, meanwhile: Callable[[list], Any] = lambda futures: None):
    """Makes the requests; returns their kinds, what became of them, and what `meanwhile` gave, told their futures."""
    kinds = mixed.kinds()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
        futures = [threads.submit(mixed.ask, client, index, kind) for index, kind in enumerate(kinds)]
        result = meanwhile(futures)
        return kinds, [future.result() for future in futures], result
