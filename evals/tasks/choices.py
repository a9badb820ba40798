"""What benchmarks of multiple choice share: VLMEvalKit's judge of replies whose letter the rules do not find."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from typing import Any

from evals.items import Attempt, Item, JudgeRequest, Verdict
from evals.rules import letters
from janus_jax.io.messages import one_line

_TRIES, _TOKENS = 3, 128
_JUDGE = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice question. "
    "You are provided with a question, several options, and an answer, and you need to find which option is most "
    "similar to the answer. If the meaning of all options are significantly different from the answer, output Z. "
    "Your should output a single uppercase character in A, B, C, D (if they are valid options), and Z. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: Z\n"
    "Example 3: \nQuestion: {question}?\nOptions: {options}\nAnswer: {answer}\nYour output: "
)


def options_of(cells: Mapping[str, str]) -> dict[str, str]:
    """The options in the columns A to Z of a table, those that are there."""
    return {letter: cells[letter] for letter in string.ascii_uppercase if letter in cells}


def no_option(answer: str, options: Mapping[str, str]) -> str:
    """The flaw of a question whose answer is none of its options; "" if it is one."""
    return "" if answer in options else f"its answer {one_line(answer)!r} is none of its options {', '.join(options)}"


def requests(items: Sequence[Item], predictions: Mapping[str, str | None]) -> list[JudgeRequest]:
    """A request for each reply in which VLMEvalKit's rules find no letter."""
    wanted = []
    for item in items:
        reply = predictions.get(item.id)
        if reply is None or letters.vlmevalkit(reply.strip(), options(item)):
            continue
        listed = "There are several options: \n" + "".join(f"{k}. {v}\n" for k, v in options(item).items())
        text = _JUDGE.format(question=item.fields["question"], options=listed, answer=reply.strip())
        attempt = Attempt([{"role": "user", "content": text}], 0.0, _TOKENS)
        # VLMEvalKit draws one of these, unseeded.
        chosen = random.Random(item.id).choice([*options(item), letters.NO_OPTION])
        wanted.append(JudgeRequest(item.id, item, [attempt] * _TRIES, chosen))
    return wanted


def parse(request: JudgeRequest, reply: str) -> str | None:
    """The letter in a judge's reply."""
    return letters.vlmevalkit(reply, options(request.item)) or None


def options(item: Item) -> dict[str, str]:
    """An item's options by letter, as scoring takes them (MMMU gives open questions two)."""
    return item.fields.get("scored_options") or item.fields["options"]


def verdict(item: Item, reply: str | None, judged: Mapping[str, Any] | None) -> Verdict:
    """By VLMEvalKit's rules, then by the judge; without a judge, what the rules do not find is wrong."""
    if reply is None:
        return Verdict("", "wrong", 0.0)
    said = letters.vlmevalkit(reply.strip(), options(item))
    if not said and judged is not None:
        if item.id not in judged:
            return Verdict("", "unjudged", 0.0)
        said = str(judged[item.id])
    return plain_verdict(said, item.fields.get("scored_answer", item.fields["answer"]))


def plain_verdict(said: str, answer: str) -> Verdict:
    """Right if `said` is the answer."""
    right = bool(said) and said == answer
    return Verdict(said, "right" if right else "wrong", float(right))
