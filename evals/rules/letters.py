"""Multiple choice: the letter that each tool takes a reply to mean. Options are a mapping of letters to texts.

Every rule returns a letter, "Z" for a refusal, or "" where it finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

NO_OPTION = "Z"
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"(?:correct )?answer is\s*\**([A-D])\**", re.IGNORECASE)

_LMMS_LETTERS = "ABCDE"
_LMMS_FORMS = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def vlmevalkit(reply: str, options: Mapping[str, str]) -> str:
    """VLMEvalKit's `can_infer`: a letter among the last words, `answer is X`, or the one option whose text is there."""
    return _by_letter(reply, options) or _by_text(reply, options, bounded=True)


def _by_letter(reply: str, options: Mapping[str, str]) -> str:
    if _FAILED in reply:
        return ""
    if any(refusal in reply for refusal in _REFUSALS):
        return NO_OPTION
    words = reply.translate(_BLANKED).split()
    said = [letter for letter in options if letter in words]
    if len(said) == 1 and words.index(said[0]) >= len(words) - _LAST_WORDS:
        return said[0]
    if not said and NO_OPTION in words:
        return NO_OPTION
    found = _ANSWER_IS.search(reply)
    return found[1] if found and found[1] in options else ""


def _by_text(reply: str, options: Mapping[str, str], bounded: bool) -> str:
    reply = reply.lower()
    if bounded and len(reply) > 2 * sum(map(len, options.values())):
        return ""
    said = [letter for letter, text in options.items() if text.lower() in reply]
    return said[0] if len(said) == 1 else ""


def lmms_mmbench(reply: str, options: Mapping[str, str]) -> str:
    """lmms-eval on MMBench: a letter anywhere, bare or in one of its marks, else the one option whose text is there."""
    if _FAILED not in reply:
        words = reply.split()
        if len(bare := _in(words, "", "")) == 1 and not ("A" in words and len(words) > 3):  # A may be the article
            return bare[0]
        for before, after in _LMMS_FORMS:
            if len(marked := _in(words, before, after)) == 1:
                return marked[0]
    return _by_text(reply, {letter: text for letter, text in options.items() if letter in "ABCD"}, bounded=False)


def _in(words: Iterable[str], before: str, after: str) -> list[str]:
    words = set(words)
    return [letter for letter in _LMMS_LETTERS if f"{before}{letter}{after}" in words]


def first_character(reply: str) -> str:
    """lmms-eval on SEED-Bench: the first character, whatever it is, in upper case."""
    return reply.strip()[:1].upper()
