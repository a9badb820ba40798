"""Messages for people: always one printable line, whatever names and values they contain."""

from __future__ import annotations

import difflib
import io
import sys
import unicodedata
from collections.abc import Iterable

MAX_ERROR = 2000  # characters of a message; names and values in it are cut much shorter
_LONGEST_NAME = 200


def one_line(text: object, limit: int = 200) -> str:
    r"""`text` as one printable line of at most `limit` characters, for a name or a value inside a message.

    Control characters (newlines, escape sequences), marks that reorder text and lone surrogates become escapes, so that
    a name cannot end the line, color the terminal or disguise itself. The middle of a long text is left out.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    text = str(text)
    if len(text) <= limit and text.isprintable():
        return text
    # Cut before cleaning: a value may have millions of characters.
    long = len(text) > 4 * limit
    if long:
        text = text[: 2 * limit] + text[-2 * limit :]
    text = "".join(_printable(character) for character in text)
    if not long and len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[: limit - 3 - half]}...{text[len(text) - half :]}"


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def print_any_text():
    """Makes standard output and error accept any text, whatever their encoding; a command calls it before it prints.

    The model's answer, a user's caption or a file name may contain lone surrogates, or characters that the terminal's
    code page lacks. They are written as escapes, instead of ending the program in the middle of a line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, which takes any text
            stream.reconfigure(errors="backslashreplace")


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The names in `known` that `name` may be a misspelling of, nearest first; never `name` itself."""
    name = name[:_LONGEST_NAME]  # comparing takes time in the product of the lengths
    candidates = [other for other in dict.fromkeys(known) if other != name]
    return [one_line(other) for other in difflib.get_close_matches(name, candidates, most)]


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """`; did you mean ...?`, or an empty string if no name is close.

    >>> did_you_mean("temperture", ["temperature", "top_k"])
    '; did you mean temperature?'
    """
    near = nearest(name, known, most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def error_text(error: BaseException | str) -> str:
    """The message of `error`, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        # Python's own "[Errno 2] No such file or directory: 'a'" puts the number first and the file last.
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        error = f"{names}: {error.strerror}"
    return one_line(str(error) or type(error).__name__, MAX_ERROR)


def print_line(text: str):
    """Prints `text` on standard error as one line; characters that the terminal lacks become escapes."""
    encoding = sys.stderr.encoding or "utf-8"
    line = one_line(text, MAX_ERROR + 20)
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)


def print_error(error: BaseException | str):
    """Prints `error` on standard error as the one line `error: ...` with which a command ends."""
    print_line(f"error: {error_text(error)}")


def print_note(text: str):
    """Prints `text` on standard error as the one line `note: ...`, for what is worth knowing but not an error."""
    print_line(f"note: {text}")
