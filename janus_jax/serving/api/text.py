"""The text of an answer as it comes: what is certain, without the space around it, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from janus_jax.processing.tokenizer import Tokenizer


class Answer:
    """Text of tokens that come one by one; the pieces join to what `Tokenizer.answer` makes of all, up to a stop.

    Attributes:
      stopped: whether a stop string was met; what comes after it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._decoder, self._stops = tokenizer.stream(), tuple(stops)
        self._held, self._begun = "", False
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with `token`, and was not before."""
        return "" if self.stopped else self._take(self._decoder.push(token), final=False)

    def finish(self) -> str:
        """The rest."""
        return "" if self.stopped else self._take(self._decoder.finish(), final=True)

    def _take(self, text: str, final: bool) -> str:
        held = self._held + text
        ends = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            held, self.stopped = held[: min(ends)], True
        if not self._begun:
            held = held.lstrip()
        done = len(held) if final or self.stopped else len(held) - self._begun_stop(held)
        certain = held[:done]
        # Space is certain only when something follows it.
        certain = certain[: len(certain.rstrip())]
        self._begun = self._begun or bool(certain)
        self._held = held[len(certain) :]
        return certain

    def _begun_stop(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        most = max((len(stop) - 1 for stop in self._stops), default=0)
        lengths = range(min(most, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
