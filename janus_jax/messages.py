"""What a person reads when something is wrong: one line, whatever the names and values in it hold."""

from __future__ import annotations

import sys
import unicodedata

MAX_ERROR = 2000  # characters of a message; names and values in it are cut far below that


def one_line(text: object, limit: int = 200) -> str:
    """`text` as one printable line of at most `limit` characters, for a name or a value inside a message.

    Control characters (newlines, escape sequences), marks that reorder text and lone surrogates are written as escapes,
    so that a name cannot end the line, color a terminal or pass for other words; the middle of a long text is left out.
    """
    text = str(text)
    # Cut before it is cleaned: a value may have millions of characters.
    if len(text) > 4 * limit:
        text = text[: 2 * limit] + text[-2 * limit :]
        long = True
    else:
        long = False
    text = "".join(_printable(character) for character in text)
    if not long and len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[: limit - 3 - half]}...{text[len(text) - half :]}"


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def print_error(error: BaseException | str):
    """Prints `error` on standard error as the one line `error: ...` that a command ends with."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        # "[Errno 2] No such file or directory: 'a'" says the number first and the file last.
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        error = f"{names}: {error.strerror}"
    line = one_line(str(error) or type(error).__name__, MAX_ERROR)
    encoding = sys.stderr.encoding or "utf-8"
    print("error: " + line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)
