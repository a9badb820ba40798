"""Questions as lmms-eval puts them, and the pipeline's answers to many of them.

A question is a list of messages with texts and pictures in any order, and settings of how the answer is drawn. Its
answer depends on nothing else: not on the batch, and not on how many questions there are.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_jax.io.messages import one_line
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import bucket, normalize_messages
from janus_jax.processing.tokenizer import IMAGE_PLACEHOLDER

# Settings of tasks by which answers are the same: how other models cut pictures, and where the likeliest word is taken
# those of drawing.
_OF_OTHERS = {"image_aspect_ratio", "use_cache"}
_OF_DRAWING = {"top_p", "top_k", "seed"}


@dataclass(frozen=True)
class Settings:
    """How an answer is drawn; it ends before the first of `until`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    until: tuple[str, ...] = ()
    system_prompt: str = ""


@dataclass(frozen=True)
class Question:
    """A question: `name` says which one it is, `messages` are as `JanusPipeline.chat` takes them."""

    name: str
    messages: list[dict[str, Any]]
    settings: Settings


def question_of(
    name: str,
    messages: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    max_new_tokens: int = 512,
    system_prompt: str = "",
    image_tag: str = IMAGE_PLACEHOLDER,
) -> Question:
    """A question from lmms-eval's messages and generation settings.

    Args:
      name: of the question, for messages.
      messages: {"role", "content"}, where content is a list of {"type": "text", "text"} and {"type": "image", "url"}.
      given: the task's generation_kwargs.
      max_new_tokens, system_prompt: where the task says nothing.
      image_tag: the tokenizer's word for a picture.
    Raises: ValueError in one line for sound or video, and for settings that would give other answers than asked for.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        text, images = _content(name, message.get("content"), image_tag)
        if message.get("role") == "system":
            system_prompt = text
        else:
            turns.append({"role": message.get("role"), "content": text, "images": images})
    return Question(name, turns, _settings(name, given, max_new_tokens, system_prompt))


def _content(name: str, content: Any, image_tag: str) -> tuple[str, list[Any]]:
    pieces, images = [], []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        kind = part.get("type")
        if kind == "text":
            if image_tag in part["text"]:
                raise ValueError(f"{name}: its text has {image_tag}, which stands for a picture")
            pieces.append(part["text"])
        elif kind == "image":
            pieces.append(f"{image_tag}\n")
            images.append(part["url"])
        else:
            raise ValueError(f"{name}: it has a part of type {one_line(kind)}; Janus takes texts and pictures")
    return "".join(pieces), images


def _settings(name: str, given: Mapping[str, Any], max_new_tokens: int, system_prompt: str) -> Settings:
    given = {key: value for key, value in given.items() if value is not None and key not in _OF_OTHERS}
    for neutral in ("num_beams", "repetition_penalty"):
        if given.pop(neutral, 1) != 1:
            raise ValueError(f"{name}: {neutral} must be 1; nothing else is implemented")
    draws = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1 if draws else 0))
    if draws is False or temperature == 0:
        temperature, given = 0.0, {key: value for key, value in given.items() if key not in _OF_DRAWING}
    until = [*_texts(given.pop("until", ())), *_texts(given.pop("stop_sequences", ()))]
    settings = Settings(
        int(given.pop("max_new_tokens", max_new_tokens)),
        temperature,
        float(given.pop("top_p", 1)),
        given.pop("top_k", None),
        tuple(until),
        system_prompt,
    )
    if given:
        raise ValueError(f"{name}: unknown generation settings {one_line(', '.join(sorted(given)))}")
    return settings


def _texts(given: str | Sequence[str]) -> list[str]:
    return [each for each in ([given] if isinstance(given, str) else given) if each]


def answer_all(
    janus: JanusPipeline,
    questions: Sequence[Question],
    batch_size: int,
    seed: int = 0,
    done: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """The answers, in order; questions that are alike are asked together, up to `batch_size` at a time.

    A question that is there several times, and is not greedy, gets an answer of another seed each time.

    Args:
      done: called with the number of answers that have come.
    Raises: ValueError that names the question that cannot be asked.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    seen: collections.Counter[str] = collections.Counter()
    for number, question in enumerate(questions):
        length, room = _room(janus, question)
        own = seed + seen[question.name] if question.settings.temperature else seed
        seen[question.name] += 1
        groups.setdefault((question.settings, room, own), []).append((length, number))
    answers = [""] * len(questions)
    for (settings, room, own), members in groups.items():
        # Long ones first: if one does not fit in memory, it is said at once.
        members.sort(reverse=True)
        for start in range(0, len(members), batch_size):
            some = [number for _, number in members[start : start + batch_size]]
            found = janus.chat_batch(
                [questions[number].messages for number in some],
                max_new_tokens=room,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                seed=own,
                system_prompt=settings.system_prompt,
            )
            for number, text in zip(some, found, strict=True):
                answers[number] = _cut(text, settings.until)
            done(len(some))
    return answers


def _room(janus: JanusPipeline, question: Question) -> tuple[int, int]:
    """Tokens of the prompt, and how many the answer may have: fewer than asked for where the context ends."""
    processor, settings = janus.processor, question.settings
    try:
        turns, images = normalize_messages(question.messages, (), processor.tokenizer.image_placeholder)
        length = len(processor.understanding_prompt(turns, len(images), settings.system_prompt, 1))
    except ValueError as error:
        raise ValueError(f"{question.name}: {error}") from None
    # By the padded length, so that few rooms differ.
    context = janus.config.language.max_positions
    room = context - bucket(length) if context > bucket(length) else context - length
    return length, min(settings.max_new_tokens, room)


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end, 1)[0]
    return text
