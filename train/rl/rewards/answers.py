"""Whether an answer is the right one: a verifiable reward, from the `answer` that a prompt's line gives."""

from __future__ import annotations

import decimal
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from janus_jax.io.fields import shown
from janus_jax.io.messages import did_you_mean, one_line
from train.rl.rewards.functions import Metadata

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
_ENDS = " .,;:!?\"'`*()[]"


def _exact(answer: str, right: str) -> bool:
    return answer.strip() == right.strip()


def _normalized(answer: str, right: str) -> bool:
    return _plain(answer) == _plain(right)


def _same_number(answer: str, right: str) -> bool:
    said, wanted = _numbers(answer), _numbers(right)
    return bool(said and wanted) and said[-1] == wanted[-1]


_RULES = {"exact": _exact, "normalized": _normalized, "number": _same_number}


class Match:
    """1 for an answer that is the right one, or one of several, else 0.

    The metadata of each prompt have an `answer`: a text, a number, or a list of these of which any is right.

    Args:
      rule: 'normalized' compares without regard to case, blanks, and punctuation at the ends; 'exact' without regard to
        blanks at the ends only; 'number' compares the last number of the answer with that of the right one.
      pattern: a regular expression, of whose last match in the answer the first group (or all of it, if it has none) is
        what counts: an answer without a match is wrong. Empty for the whole answer.
    Raises: ValueError in one line for an unknown rule, or a pattern that is none.
    """

    def __init__(self, rule: str = "normalized", pattern: str = ""):
        if rule not in _RULES:
            raise ValueError(f"rule must be among {', '.join(_RULES)}, got {shown(rule)}{did_you_mean(rule, _RULES)}")
        try:
            self._pattern = re.compile(pattern, re.DOTALL) if pattern else None
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern {shown(pattern)} is no regular expression ({one_line(error)})") from None
        self._same = _RULES[rule]

    def __call__(self, answers: Sequence[str], prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `train.rl.rewards`; float64 [N]. ValueError for a prompt without a right answer."""
        rows = zip(answers, prompts, metadata, strict=True)
        return np.array([self._right(answer, _right_ones(prompt, each)) for answer, prompt, each in rows], np.float64)

    def _right(self, answer: str, right: Sequence[str]) -> bool:
        if self._pattern is not None:
            found = list(self._pattern.finditer(answer))
            if not found:
                return False
            answer = (found[-1][1] if self._pattern.groups else found[-1][0]) or ""
        return any(self._same(answer, each) for each in right)


def _right_ones(prompt: str, metadata: Mapping[str, Any]) -> list[str]:
    given = metadata.get("answer")
    several = given if isinstance(given, list) else [given]
    if not several or not all(isinstance(each, str | int | float) for each in several):
        raise ValueError(f"the line of the prompt {one_line(prompt, 60)!r} has no answer, a text or a number")
    return [str(each) for each in several]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_ENDS)


def _numbers(text: str) -> list[decimal.Decimal]:
    found = (match[0] for match in _NUMBER.finditer(text) if any(map(str.isdecimal, match[0])))
    return [decimal.Decimal(each.replace(",", "")) for each in found]
