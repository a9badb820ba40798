"""MMMU's own rules for replies, and lmms-eval's change of them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_ENDS = ",.!?;:'"
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def letter(reply: str, options: Mapping[str, str], chance: random.Random, lmms: bool = False) -> tuple[str, bool]:
    """The letter that a reply means, and whether `chance` has chosen it since the reply means none.

    (X), else X between blanks, else with more than five words the text of an option; of several the last. lmms-eval
    takes an X before a blank also at the end of a word, and then an X before a period.
    """
    for sign in _ENDS:
        reply = reply.strip(sign)
    reply = f" {reply} "
    if said := [each for each in options if f"({each})" in reply]:
        return _last(said, reply, "({})"), False
    if said := [each for each in options if (f"{each} " if lmms else f" {each} ") in reply]:
        return _last(said, reply, " {} "), False
    if lmms and (said := [each for each in options if f"{each}." in reply]):
        return _last(said, reply, " {} "), False
    if len(reply.split()) > 5:
        low = reply.lower()
        if said := [each for each, text in options.items() if text.lower() in low]:
            return max(said, key=lambda each: low.rfind(options[each].lower())), False
    return chance.choice(list(options)), True


def _last(letters: Sequence[str], reply: str, form: str) -> str:
    """The one that occurs last in this form; the first of the letters if none does."""
    return max(letters, key=lambda each: reply.rfind(form.format(each)))


def open_answer_is_right(reply: str, gold: str | Sequence[str]) -> bool:
    """Whether an open reply has one of the gold answers: as a number of two decimals, or as a text within it."""
    golds = [gold] if isinstance(gold, str) else gold
    right = [each for answer in golds for each in _normal(answer)]
    for said in open_answers(reply):
        if isinstance(said, str):
            if any(isinstance(each, str) and each in said for each in right):
                return True
        elif said in right:
            return True
    return False


def open_answers(reply: str) -> list[str | float]:
    """What an open reply may say: the tails of its lines after words that announce a result, and numbers in these."""
    tails = _tails(reply)
    numbers = [found for tail in tails for form in _NUMBERS for found in form.findall(tail)]
    return list(dict.fromkeys(each for said in [*tails, *numbers] for each in _normal(said)))


def _tails(reply: str) -> list[str]:
    # In lower case, so that the original's split at sentences (a period before a capital) never happens: lines it is.
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    tails = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                tail = line.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    return tails or [reply]


def _normal(text: str) -> list[str | float]:
    """A number of two decimals, or the text in lower case, with a blank at either end if it is one character."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
