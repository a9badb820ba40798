"""The exact text that the model reads, by protocol.

All protocols share the conversation of VLMEvalKit's wrapper for Janus: the roles "User" and "Assistant" (also for
Janus-Pro, whose chat has others), no system prompt unless the benchmark gives one, and all pictures first. Protocols
differ in the question's text. lmms-eval and the official scripts know no Janus, so the conversation around their texts
is this one too, with a newline after the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping

from janus_jax.processing.chat import IMAGE_PLACEHOLDER, format_conversation

# VLMEvalKit's wrapper, for MM-Vet alone.
THINK_STEP_BY_STEP = (
    "You are a helpful assistant. Please answer truthfully and write out your thinking step by step to be sure you get "
    "the right answer."
)
YES_OR_NO = " Please answer yes or no."
SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."
LONGEST_REPLY = 2048  # tokens, as VLMEvalKit's wrapper sets


def conversation(text: str, images: int, system: str = "") -> str:
    """What the model reads for one user turn of `images` pictures and then `text`.

    ValueError for a text that has the tag of a picture in it, which would be one picture too many.
    """
    if IMAGE_PLACEHOLDER in text:
        raise ValueError(f"the question has {IMAGE_PLACEHOLDER} in its text")
    turns = [("User", IMAGE_PLACEHOLDER * images + text), ("Assistant", "")]
    return format_conversation(turns, system)


def lettered(options: Mapping[str, str], form: str = "{}. {}") -> str:
    """A line for each option, without a newline at the end."""
    return "\n".join(form.format(letter, text) for letter, text in options.items())


def yes_no(question: str) -> str:
    """VLMEvalKit's text for questions of yes or no."""
    return f"\n{question}\n{SINGLE_WORD}"


def multiple_choice(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """VLMEvalKit's text for multiple choice, or for open questions where there are no options."""
    start = f"\nHint: {hint}\n" if hint else "\n"
    if not options:
        return f"{start}{question}\nAnswer the question directly. "
    return f"{start}{question}\n{lettered(options)}\n\n{LETTER_DIRECTLY}"
