"""Strips the metadata of cameras and editors from image files, and reads their orientation.

Decoders refuse whole images over a resolution that is text or a color profile with a wrong checksum. So they get the
pixels alone, and the one entry of the metadata that is visible, the orientation, is read here.
"""

from __future__ import annotations

import re
import struct
import zlib

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])\b")
_JPEG_KEPT = (0xE0, 0xEE)  # the segments of JFIF and Adobe say what the components mean
# TIFF tags that say where the samples are and what they mean.
_TIFF_KEPT = {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 290, 291, 292, 293, 317, 320, 322, 323}
_TIFF_KEPT |= {324, 325, 332, 333, 334, 336, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532, 50844}
# struct's format of each numeric TIFF type (5 and 10 are fractions).
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I"}


def bare(data: bytes) -> tuple[bytes, int | None]:
    """The image in `data` without its metadata, and its orientation by EXIF or XMP, 1 to 8.

    The orientation is None for formats whose decoder finds it (all but JPEG, PNG and TIFF), and 1 if none can be read.
    Data that is not understood is returned unchanged.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _bare_tiff(data)
    if data[4:8] == b"ftyp":
        return _bare_avif(data), None
    return data, None


def orientation(exif: bytes | None, xmp: bytes | str | None = None) -> int:
    """The orientation in `exif`, or else in `xmp`; 1 (upright) if neither can be read."""
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None and xmp:
        match = _XMP_ORIENTATION.search(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else bytes(xmp))
        found = int(match[1]) if match else None
    return found or 1


# ---------------------------------------------------------------- EXIF (stored as a TIFF)


def _exif_orientation(exif: bytes) -> int | None:
    exif = exif[len(_EXIF) :] if exif.startswith(_EXIF) else exif
    for entry in _entries(exif)[1]:
        tag, kind, count, value = entry
        if tag == _ORIENTATION and (found := _whole(exif, kind, count, value)) in range(1, 9):
            return found
    return None


def _order(tiff: bytes) -> str:
    return {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4], "")


def _entries(tiff: bytes) -> tuple[int, list[tuple[int, int, int, bytes]]]:
    """Where the first directory of `tiff` begins, and its entries (tag, type, count, value or its offset).

    Entries beyond the end of the data are left out.
    """
    order = _order(tiff)
    if not order or len(tiff) < 10:
        return 0, []
    start = struct.unpack_from(f"{order}I", tiff, 4)[0]
    if start + 2 > len(tiff):
        return start, []
    number = min(struct.unpack_from(f"{order}H", tiff, start)[0], (len(tiff) - start - 2) // 12)
    return start, [struct.unpack_from(f"{order}HHI4s", tiff, start + 2 + 12 * i) for i in range(number)]


def _whole(tiff: bytes, kind: int, count: int, value: bytes) -> int | None:
    """The value of an entry of any numeric type, or of digits, if it is an integer."""
    order, letters = _order(tiff), _TIFF_NUMBERS.get(kind, f"{min(count, 8)}s" if kind == 2 else "")
    size = struct.calcsize(order + letters)
    if not size or not count:
        return None
    if size > 4:
        offset = struct.unpack(f"{order}I", value)[0]
        value = tiff[offset : offset + size]
        if len(value) < size:
            return None
    first, *rest = struct.unpack(order + letters, value[:size])
    if isinstance(first, bytes):
        text = first.rstrip(b"\0 ").decode("latin-1")
        return int(text) if text.isascii() and text.isdigit() else None
    if rest:
        return first // rest[0] if rest[0] and first % rest[0] == 0 else None
    return int(first) if first == first and abs(first) < 100 and first == int(first) else None


# ---------------------------------------------------------------- formats


def _bare_jpeg(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [data[:2]], b"", b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA or marker == 0 or 0xD0 <= marker <= 0xD9:  # the pixels begin, or this is not a segment
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : end]
        if marker == 0xE1 and body.startswith(_EXIF):
            exif += body[len(_EXIF) :]  # long EXIF data continues in the next segment
        elif marker == 0xE1 and body.startswith(_XMP) and not xmp:
            xmp = body
        if marker in _JPEG_KEPT or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), orientation(exif, xmp)


def _bare_png(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [data[:8]], None, None, 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data) or not kind.isalpha():
            break  # truncated or damaged: left for the decoder to report
        body = memoryview(data)[at + 8 : end - 4]
        critical = kind[:1].isupper()
        whole = critical or zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end], "big")
        if critical or (kind == b"tRNS" and whole):
            kept.append(data[at:end])
        elif kind == b"eXIf" and whole:
            exif = bytes(body)
        elif kind == b"iTXt" and whole and bytes(body[:18]) == b"XML:com.adobe.xmp\0" and not any(body[18:20]):
            xmp = bytes(body[20:])
        elif kind in (b"zTXt", b"tEXt") and whole and bytes(body[:22]) == b"Raw profile type exif\0" and exif is None:
            exif = _raw_profile(bytes(body[22:]), kind == b"zTXt")
        at = end
    return b"".join([*kept, data[at:]]), orientation(exif, xmp)


def _raw_profile(text: bytes, packed: bool) -> bytes | None:
    """EXIF in the form that ImageMagick wrote before PNG had a chunk for it: three lines, then hexadecimal digits."""
    try:
        if packed:
            text = zlib.decompressobj().decompress(text[1:], 1 << 20)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (zlib.error, ValueError):
        return None


def _bare_tiff(data: bytes) -> tuple[bytes, int]:
    start, entries = _entries(data)
    turned = _exif_orientation(data)
    if turned is None:
        packets = ((count, value) for tag, kind, count, value in entries if tag == 700 and kind in (1, 7) and count > 4)
        offsets = ((struct.unpack(f"{_order(data)}I", value)[0], count) for count, value in packets)
        turned = orientation(None, b"".join(data[at : at + count] for at, count in offsets))
    kept = [entry for entry in entries if entry[0] in _TIFF_KEPT]
    if len(kept) == len(entries):
        return data, turned
    order, end = _order(data), start + 2 + 12 * len(entries)
    packed = [struct.pack(f"{order}HHI4s", *entry) for entry in kept]
    # In place, since offsets count from the beginning of the file. The directory ends with the next page's offset.
    directory = b"".join([struct.pack(f"{order}H", len(kept)), *packed, data[end : end + 4]])
    return b"".join([data[:start], directory, data[start + len(directory) :]]), turned


def _bare_avif(data: bytes) -> bytes:
    """`data` with its EXIF items relabeled, so that decoders skip them; orientation is a property of the image item."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"meta":
            boxes = re.sub(rb"(infe[\x02\x03]\0\0.{5,7})Exif", rb"\1none", data[at : at + size], flags=re.DOTALL)
            return b"".join([data[:at], boxes, data[at + size :]])
        if size < 8:
            break
        at += size
    return data
