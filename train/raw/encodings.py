"""Detects UTF-8, UTF-16 and UTF-32 by the byte order mark, or by the bytes if there is none."""

from __future__ import annotations

import codecs

import numpy as np

_MARKS = (
    # UTF-32's mark begins with UTF-16's.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LOOK = 4096  # bytes from which an encoding is detected
WIDTH = {"utf-8": 1, "utf-16-le": 2, "utf-16-be": 2, "utf-32-le": 4, "utf-32-be": 4}  # bytes of a code unit


def encoding_of(start: bytes) -> tuple[str, int]:
    """Codec, and size of the byte order mark, of a text that begins with `start`; UTF-8 unless another is detected."""
    for mark, codec in _MARKS:
        if start.startswith(mark):
            return codec, len(mark)
    # UTF-8 text has no zero bytes; in wider encodings, ASCII characters (spaces, quotes, digits) do.
    look = np.frombuffer(start[: min(len(start), LOOK) // 2 * 2], np.uint8)
    if 0 not in look:
        return "utf-8", 0
    if len(look) >= 4:
        quads = look[: len(look) // 4 * 4].reshape(-1, 4)
        if not quads[:, 3].any() and (quads[:, 2] <= 0x10).all() and quads[:, :2].any(axis=1).all():
            return "utf-32-le", 0
        if not quads[:, 0].any() and (quads[:, 1] <= 0x10).all() and quads[:, 2:].any(axis=1).all():
            return "utf-32-be", 0
    even, odd = (look.reshape(-1, 2) == 0).mean(axis=0)
    if odd >= 0.05 and odd > 4 * even:
        return "utf-16-le", 0
    if even >= 0.05 and even > 4 * odd:
        return "utf-16-be", 0
    return "utf-8", 0


def decode_text(data: bytes, codec: str | None = None) -> str:
    """`data` decoded with `codec`, by default that of `encoding_of`; ValueError says where it fails."""
    begin = 0
    if codec is None:
        codec, begin = encoding_of(data[:LOOK])
    try:
        return data[begin:].decode(codec)
    except UnicodeDecodeError as error:
        byte = begin + error.start
        if codec != "utf-8":
            raise ValueError(f"not {codec.upper()} text: {error.reason} at byte {byte}") from None
        raise ValueError(
            f"not UTF-8 text: byte 0x{data[byte]:02x} at {byte}; it may be Windows-1252, Latin-1 or another older "
            "encoding; convert the file to UTF-8, for example with iconv -f windows-1252 -t utf-8"
        ) from None
