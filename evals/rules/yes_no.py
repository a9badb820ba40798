"""Yes or no: what each tool takes a reply to say. Every rule returns "yes", "no", or "" where it finds neither."""

from __future__ import annotations

import re

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# As written in the evaluation of VQA: meant for periods between digits, it spares those before a digit.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # `re.UNICODE`, passed where `re.sub` takes the number of replacements


def vlmevalkit(reply: str) -> str:
    """VLMEvalKit: one of the two words among the lower-case words after VQA's treatment of punctuation."""
    words = set(vqa_punctuation(reply.lower()).split())
    said = {"yes", "no"} & words
    return said.pop() if len(said) == 1 else ""


def vqa_punctuation(text: str) -> str:
    """VQA's treatment of punctuation: a sign that stands next to a blank anywhere is deleted, else made a blank.

    Asterisks, colons and apostrophes are no signs here: `**Yes**` stays as it is.
    """
    made = text
    for sign in _SIGNS:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        made = made.replace(sign, "" if beside_blank or _DIGIT_COMMA.search(text) else " ")
    return _PERIOD.sub("", made, _MOST_PERIODS)


def pope(reply: str) -> str:
    """POPE's own script (and LLaVA's): no, if the first sentence has no or not as a word; anything else is yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def whole_reply(reply: str) -> str:
    """lmms-eval on POPE: the whole reply has to be the word, in any case; `yes.` is neither."""
    said = reply.lower().strip()
    return said if said in ("yes", "no") else ""


def first_characters(reply: str) -> str:
    """lmms-eval on MME, from Otter, like MME's own script: the word, its letter, or the word in four characters."""
    said = reply.lower().strip().replace(".", "")
    if said in ("yes", "no"):
        return said
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "")
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else ""
