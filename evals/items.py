"""What a benchmark is to the rest of `evals`: items to ask, and scores of the replies.

A task knows nothing of models. It turns files into `Item`s, each with the exact text that the model reads, and replies
into `Scores`. A judge, where one is needed, is a list of `JudgeRequest`s that somebody else sends and brings back.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from janus_jax.io.messages import did_you_mean

Predictions = Mapping[str, str | None]
Judgements = Mapping[str, Any]


class ImageRef(Protocol):
    """A picture that is read when it is needed."""

    key: str  # equal for the same picture, different for different ones
    name: str  # where it is, for messages

    def read(self) -> bytes:
        """The bytes of the image file. Raises ValueError or OSError, in one line that names the picture."""
        ...


@dataclass(frozen=True)
class Item:
    """One question.

    `prompt` is what the model reads before tokenizing, roles and system prompt included, with one `<image_placeholder>`
    for each of `images`. `fields` are what scoring and reports need; all tasks have `question` and `answer` there.
    Items of one `group` are scored together (the two questions about a picture of MME, the rotations of a question of
    MMBench), so a part of a benchmark is taken by groups.
    """

    id: str
    prompt: str
    images: tuple[ImageRef, ...]
    max_new_tokens: int
    fields: Mapping[str, Any]
    group: str = ""


@dataclass(frozen=True)
class Problem:
    """A question that is not asked; `item` is there if it could be scored as wrong all the same.

    It is not there where the data have no answer to score by.
    """

    id: str
    reason: str
    item: Item | None = None


@dataclass(frozen=True)
class Loaded:
    """A benchmark as read: `source` says from which files and how many items, in one line."""

    items: list[Item]
    problems: list[Problem]
    source: str


@dataclass(frozen=True)
class Number:
    """A figure over `count` items, and the 95% interval of a bootstrap over them (None where there is none)."""

    value: float
    count: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of one reply: `extracted` is what the rules took it to say, "" for nothing.

    `outcome` is "right", "wrong", "scored", or "unjudged": a judge has to say, and has not. Until then such a reply
    counts as wrong, or where all replies are judged it is left out of the figures, and a note of the scores says so.
    """

    extracted: str
    outcome: str
    score: float


@dataclass(frozen=True)
class Scores:
    """Figures by name, the variants side by side, in the order in which to show them.

    `headline` is the name of the figure that reports publish under the protocol; `published` has that figure of others,
    by model. A figure over nothing is not in `numbers`, the headline neither. `unanswered` counts items without a
    prediction, which are left out.
    """

    numbers: dict[str, Number]
    verdicts: dict[str, Verdict]
    headline: str
    published: dict[str, float]
    unanswered: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Attempt:
    """One call of a judge: `messages` as OpenAI's chat completions take them."""

    messages: list[dict[str, Any]]
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class JudgeRequest:
    """A judgement to get: `attempts` in turn until `Task.parse_judgement` takes a reply, else `fallback` is it.

    `id` is the key of the judgement in `judged`; `form` tells `parse_judgement` how a reply is read. An attempt that
    gets no reply at all is no attempt: the item stays unjudged.
    """

    id: str
    item: Item
    attempts: list[Attempt]
    fallback: Any
    form: str = ""


def answered(items: Sequence[Item], predictions: Predictions) -> tuple[list[Item], int]:
    """The items that have a prediction, and how many have none."""
    there = [item for item in items if item.id in predictions]
    return there, len(items) - len(there)


class Task(abc.ABC):
    """A benchmark. `predictions` are replies by the item's id; None is an item that could not be asked and is wrong."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]  # what the headline is, in words
    protocols: ClassVar[tuple[str, ...]]  # the first is the default
    absent: ClassVar[Mapping[str, str]] = {}  # why it has no protocol that others have
    needs_judge: ClassVar[bool] = False  # whether nothing is scored without one

    @abc.abstractmethod
    def load(self, data: pathlib.Path, protocol: str) -> Loaded:
        """The items in `data`, a folder. Raises ValueError or OSError in one line."""

    def score(
        self,
        items: Sequence[Item],
        predictions: Mapping[str, str | None],
        protocol: str,
        judged: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Scores of `predictions`, a pure function.

        `judged` has judgements by the id of their request; None is scoring without a judge, which calls a reply that
        the rules do not understand wrong, as opposed to unjudged.
        """
        self.check_protocol(protocol)
        there, unanswered = answered(items, predictions)
        return replace(self.scored(there, predictions, protocol, judged), unanswered=unanswered)

    def scored(
        self, items: Sequence[Item], predictions: Predictions, protocol: str, judged: Judgements | None
    ) -> Scores:
        """What `score` says of items that all have a prediction; for a task that does not write `score` itself."""
        raise NotImplementedError

    def judge_requests(
        self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
    ) -> list[JudgeRequest]:
        """What a judge would have to say; [] if the rules decide everything."""
        return []

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        """The judgement (JSON) in a judge's reply; None if the reply has none."""
        return None

    def export(self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str) -> dict[str, str]:
        """Files that the official evaluator reads: text by file name; {} if there is no such evaluator."""
        return {}

    def check_protocol(self, protocol: str) -> None:
        """ValueError for a protocol that this task does not have."""
        if protocol not in self.protocols:
            if protocol in self.absent:
                raise ValueError(f"{self.name} has no protocol {protocol}: {self.absent[protocol]}")
            hint = did_you_mean(protocol, self.protocols)
            raise ValueError(
                f"{self.name} has no protocol {protocol!r}{hint}; its protocols: {', '.join(self.protocols)}"
            )
