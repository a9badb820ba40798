"""Who looks at drawn pictures: detectors for GenEval, and for DPG-Bench whoever answers questions about them.

All of them are asked as a model is: items in, replies out, as they come.
"""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from evals.asking.answers import Replies
from evals.asking.identity import fingerprint
from evals.generation.detector import CLIP, DETECTOR, LABEL, ColorClassifier, Detector, loaded
from evals.generation.vqa import Answerer
from evals.hosts import is_first, together
from evals.items import Attempt, Item, Problem
from evals.judging import Judge, said_of
from evals.tasks.geneval import seen
from janus_jax.io.messages import error_text, one_line
from janus_jax.processes import from_first
from janus_jax.processing.images import open_image
from janus_jax.sampling.memory import OutOfMemory

_AT_A_TIME = 8  # items, for models of transformers
_TOKENS = 16  # of an endpoint's reply
_KEPT = 32  # replies between two writes
SELF, ENDPOINT = "self", "endpoint"

Ask = Callable[[Sequence[Item]], Iterator[Replies]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Who looks at pictures.

    Attributes:
      about: what tells its replies from others'.
      label: stands beside the figures.
      ask: see `Respondent.ask`.
      alone: whether the first of several processes asks it, see `only_first`; else all of them do.
    """

    about: Mapping[str, Any]
    label: str
    ask: Ask
    alone: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its replies from others', and the label."""
        return {**self.about, "scorer": self.label}


def detectors(detector: str | None, clip: str | None) -> Scorer:
    """GenEval's, in transformers. ValueError if not both are given, or torch or transformers is not there."""
    for option, given, published in (("--detector", detector, DETECTOR), ("--clip", clip, CLIP)):
        if given is None:
            raise ValueError(
                f"geneval needs {option}: a folder or hub id, such as {published} (huggingface.co/{published}); "
                "or draw alone, with evals.generation.draw"
            )
    assert detector is not None and clip is not None
    _check("geneval", (detector, "mask2former"), (clip, "clip"))

    def ask(items: Sequence[Item]) -> Iterator[Replies]:
        detect, classify = Detector.load(detector), ColorClassifier.load(clip)

        def say(item: Item) -> str:
            image = _picture(item)
            return seen(item.fields["row"], detect(image), lambda name, objects: classify(image, name, objects))

        for some in _some(items):
            yield _replies(some, lambda each: [say(item) for item in each])

    return Scorer({"detector": _of(detector), "clip": _of(clip)}, LABEL, ask)


def answerer(path_or_hub_id: str) -> Scorer:
    """A model of transformers that answers questions about pictures. ValueError if torch or transformers is missing."""
    _check("dpg", (path_or_hub_id, ""))

    def ask(items: Sequence[Item]) -> Iterator[Replies]:
        model = Answerer.load(path_or_hub_id)

        def say(some: Sequence[Item]) -> list[str]:
            return model([_picture(item) for item in some], [item.fields["question"] for item in some])

        for some in _some(items):
            yield _replies(some, say)

    return Scorer({"vqa": _of(path_or_hub_id)}, _name(path_or_hub_id), ask)


def endpoint(judge: Judge | None) -> Scorer:
    """A judge behind an endpoint, which is sent the picture and the question. ValueError if there is none."""
    if judge is None:
        raise ValueError(f"--vqa {ENDPOINT} needs --judge and --judge-model")

    def ask(items: Sequence[Item]) -> Iterator[Replies]:
        texts: dict[str, str] = {}
        problems: list[Problem] = []
        unjudged: list[str] = []

        def say(item: Item) -> str | Problem:
            try:
                data = base64.b64encode(item.images[0].read()).decode()
            except (ValueError, OSError) as error:
                return Problem(item.id, error_text(error), item)
            picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
            text = {"type": "text", "text": f"{item.fields['question']} Please answer yes or no."}
            return judge.ask(Attempt([{"role": "user", "content": [picture, text]}], 0, _TOKENS))

        for item, told in said_of(items, say, "dpg", judge):
            if not told:
                unjudged.append(item.id)
            elif isinstance(told[0], Problem):
                problems.append(told[0])
            else:
                texts[item.id] = told[0]
            if len(texts) + len(problems) + len(unjudged) == _KEPT:
                yield Replies(texts, problems, unjudged)
                texts, problems, unjudged = {}, [], []
        yield Replies(texts, problems, unjudged)

    return Scorer({"vqa": judge.model}, f"{one_line(judge.model)} at an endpoint", ask)


def only_first(ask: Ask) -> Ask:
    """`ask` by the first process alone, which tells the others what came of it."""

    def asked(items: Sequence[Item]) -> Iterator[Replies]:
        known = {item.id: item for item in items}
        own = iter(ask(items)) if is_first() and items else iter(())
        while True:
            with together():
                batch = next(own, None)
            told = from_first(
                None
                if batch is None
                else [batch.texts, [[each.id, each.reason] for each in batch.problems], batch.unjudged]
            )
            if told is None:
                return
            texts, problems, unjudged = told
            yield Replies(texts, [Problem(name, reason, known[name]) for name, reason in problems], unjudged)

    return asked


def _picture(item: Item) -> Image.Image:
    (picture,) = item.images
    try:
        return open_image(picture.read())
    except (ValueError, OSError) as error:
        raise ValueError(f"{picture.name}: {error_text(error)}") from None


def _some(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _AT_A_TIME):
        yield items[start : start + _AT_A_TIME]


def _replies(some: Sequence[Item], say: Callable[[Sequence[Item]], Sequence[str]]) -> Replies:
    """What `say` says of `some`; if a picture cannot be read, of each alone."""
    try:
        return Replies(dict(zip([item.id for item in some], say(some), strict=True)), [])
    except (ValueError, OSError) as error:
        if len(some) == 1:
            return Replies({}, [Problem(some[0].id, error_text(error), some[0])])
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise OutOfMemory(
            "what looks at the pictures does not fit in memory beside the model; start again with --rescore, which "
            "does not load the model"
        ) from error
    each = [_replies([item], say) for item in some]
    texts = {name: text for one in each for name, text in one.texts.items()}
    return Replies(texts, [problem for one in each for problem in one.problems])


def _check(task: str, *models: tuple[str, str]) -> None:
    """ValueError if one of `models`, names with their types, is another or none, before anything is drawn for it."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ValueError(f"scoring {task} needs {error.name}; pip install torch transformers") from None
    for each, wanted in models:
        kind = loaded(transformers.AutoConfig, each).model_type
        if wanted not in ("", kind):
            raise ValueError(f"{one_line(each)} is a {one_line(kind)}; {task} needs a {wanted} there")


def _name(path_or_hub_id: str) -> str:
    is_folder = os.path.isdir(path_or_hub_id)
    return one_line(os.path.basename(os.path.abspath(path_or_hub_id)) if is_folder else path_or_hub_id)


def _of(path_or_hub_id: str) -> str:
    """What tells a model from others: a folder's fingerprint, or the hub id."""
    return fingerprint(path_or_hub_id) if os.path.isdir(path_or_hub_id) else path_or_hub_id
