"""Pictures as others have them: odd metadata, odd depths, and files that would cost a machine its memory."""

import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from janus_jax.processing import image_files
from janus_jax.processing.image_files import open_image
from janus_jax.processing.image_metadata import bare, orientation

CASES = pathlib.Path(__file__).parents[1] / "cases"
ROOT = pathlib.Path(__file__).parents[2]
PICTURE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
TURNED = np.rot90(PICTURE, -1)  # what orientation 6 makes of it


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body, crc=None):
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)
    )


def png(width, height, depth, color, rows, *extra):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def rgb_png(*extra):
    return png(7, 9, 8, 2, [row.tobytes() for row in PICTURE], *extra)


def tiff(*entries, order="<", tail=b"", count=None):
    """A directory of entries (tag, type, count, 4 bytes), as EXIF holds it; `tail` begins at byte 100."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    body = struct.pack(f"{order}H", len(entries) if count is None else count)
    body += b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    return (head + body).ljust(100, b"\0") + tail


SIX = (0x0112, 3, 1, b"\6\0\0\0")
SHAPE = (SIX, (0x011A, 2, 4, b"72\0\0"))


def shown(source):
    image = open_image(source)
    assert image.mode == "RGB" and not image.info and not image.getexif()
    return np.asarray(image)


# ---------------------------------------------------------------- metadata


def test_the_cases_of_the_issue():
    for name in ("exif_ascii_resolution.jpg", "exif_nonsense.png"):
        plain = Image.open(CASES / name)
        plain.load()
        seen = shown(CASES / name)
        if "ascii" in name:  # its orientation is 6
            assert seen.shape == (plain.width, plain.height, 3)
            np.testing.assert_array_equal(seen, np.rot90(np.asarray(plain), -1))
        else:
            np.testing.assert_array_equal(seen, np.asarray(plain))


ORIENTED = {
    "plain": tiff(SIX),
    "header": b"Exif\0\0" + tiff(SIX),
    "big endian": tiff((0x0112, 3, 1, b"\0\6\0\0"), order=">"),
    "after a resolution that is text": tiff((0x011A, 2, 4, b"72\0\0"), SIX),
    "before entries that are cut off": tiff(SIX, count=60),
    "after an entry that points nowhere": tiff((0x010F, 2, 90, b"\xff\xff\xff\x7f"), SIX),
    "after a type that nobody knows": tiff((0x010F, 99, 1, bytes(4)), SIX),
    "with a folder that points at itself": tiff(SIX, (0x8769, 4, 1, b"\x08\0\0\0")),
    "long": tiff((0x0112, 4, 1, b"\6\0\0\0")),
    "byte": tiff((0x0112, 1, 1, b"\6\0\0\0")),
    "text": tiff((0x0112, 2, 2, b"6\0\0\0")),
    "rational": tiff((0x0112, 5, 1, b"\x64\0\0\0"), tail=struct.pack("<II", 12, 2)),
    "several": tiff((0x0112, 3, 2, b"\6\0\1\0")),
}
NOT_ORIENTED = {
    "empty": b"",
    "nonsense": b"Exif\0\0nonsense in here",
    "header alone": tiff()[:8],
    "beyond the end": b"II*\0" + struct.pack("<I", 1 << 31),
    **{f"value {value}": tiff((0x0112, 3, 1, struct.pack("<HH", value, 0))) for value in (0, 1, 9, 65535)},
    "words": tiff((0x0112, 2, 4, b"top\0")),
    "half": tiff((0x0112, 5, 1, b"\x64\0\0\0"), tail=struct.pack("<II", 13, 2)),
    "over zero": tiff((0x0112, 5, 1, b"\x64\0\0\0"), tail=struct.pack("<II", 6, 0)),
    "rational nowhere": tiff((0x0112, 5, 1, b"\xff\xff\xff\x7f")),
    "NaN": tiff((0x0112, 11, 1, struct.pack("<f", float("nan")))),
    "no value": tiff((0x0112, 3, 0, b"\6\0\0\0")),
}


@pytest.mark.parametrize("name", [*ORIENTED, *NOT_ORIENTED])
def test_exif_of_every_kind(name):
    """A picture whatever its EXIF says, upright where the orientation can be read, in each format that has EXIF."""
    exif = ORIENTED.get(name, NOT_ORIENTED.get(name))
    expected = TURNED if name in ORIENTED else PICTURE
    np.testing.assert_array_equal(shown(rgb_png(chunk(b"eXIf", exif))), expected)
    np.testing.assert_array_equal(shown(encoded(Image.fromarray(PICTURE), "WEBP", lossless=True, exif=exif)), expected)
    jpeg = encoded(Image.fromarray(PICTURE), "JPEG", quality=95)
    expected = np.rot90(shown(jpeg), -1) if name in ORIENTED else shown(jpeg)
    body = b"Exif\0\0" + exif.removeprefix(b"Exif\0\0")
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    np.testing.assert_array_equal(shown(jpeg[:2] + segment + jpeg[2:]), expected)


@pytest.mark.parametrize("value", range(1, 9))
def test_orientations_are_pillows(value):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = value
    for kind, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(Image.fromarray(PICTURE), kind, exif=exif, **options)
        theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(shown(data), theirs)
        opened = Image.open(io.BytesIO(data))  # by the caller
        np.testing.assert_array_equal(shown(opened), theirs)
        np.testing.assert_array_equal(shown(open_image(data)), theirs)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(5_000_000))),  # Pillow refuses such a profile, and the picture
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000))),
        chunk(b"zTXt", b"Comment\0\0nonsense"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0nonsense"),
        chunk(b"tEXt", b"Comment\0a", crc=7),
        chunk(b"pHYs", b"a"),
        chunk(b"acTL", bytes(8)),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"\xff"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\nzz"),
    ],
)
def test_damaged_chunks_beside_the_pixels(extra):
    np.testing.assert_array_equal(shown(rgb_png(extra)), PICTURE)
    np.testing.assert_array_equal(shown(rgb_png(extra, chunk(b"eXIf", tiff(SIX)))), TURNED)


def test_orientation_by_xmp_and_by_old_chunks():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    np.testing.assert_array_equal(shown(rgb_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))), TURNED)
    raw = b"\nexif\n" + str(len(tiff(SIX))).encode() + b"\n" + tiff(SIX).hex().encode()
    np.testing.assert_array_equal(shown(rgb_png(chunk(b"tEXt", b"Raw profile type exif\0" + raw))), TURNED)
    packed = b"Raw profile type exif\0\0" + zlib.compress(raw)
    np.testing.assert_array_equal(shown(rgb_png(chunk(b"zTXt", packed))), TURNED)
    assert orientation(b"nonsense", xmp) == 6 and orientation(tiff((0x0112, 3, 1, b"\3\0\0\0")), xmp) == 3
    assert orientation(None, "tiff:Orientation>8<") == 8 and orientation(None, b"tiff:Orientation='9'") == 1


def test_odd_tags_of_a_tiff():
    """A resolution that is text, an EXIF folder that points nowhere: the pixels are whole."""
    data = bytearray(encoded(Image.fromarray(PICTURE), "TIFF", dpi=(72, 72), exif=b"Exif\0\0" + tiff(SIX)))
    start = struct.unpack_from("<I", data, 4)[0]
    tags = {}
    for index in range(struct.unpack_from("<H", data, start)[0]):
        at = start + 2 + 12 * index
        tags[struct.unpack_from("<H", data, at)[0]] = at
    struct.pack_into("<H", data, tags[282] + 2, 2)  # the resolution as text
    struct.pack_into("<HHII", data, tags[296], 0x8769, 4, 1, 0x7FFFFFFF)
    np.testing.assert_array_equal(shown(bytes(data)), TURNED)
    compressed = encoded(Image.fromarray(PICTURE), "TIFF", compression="tiff_lzw", dpi=(72, 72))
    np.testing.assert_array_equal(shown(compressed), PICTURE)


def test_avif_with_damaged_exif():
    pytest.importorskip("PIL._avif")
    plain = encoded(Image.fromarray(PICTURE), "AVIF", quality=100)
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = encoded(Image.fromarray(PICTURE), "AVIF", quality=100, exif=exif)
    at = data.index(b"maker") - 40
    broken = data[:at] + data[at:].replace(b"II*\0", b"no*\0").replace(b"MM\0*", b"no\0*")
    assert broken != data
    with pytest.raises((ValueError, OSError)):
        Image.open(io.BytesIO(broken)).load()
    np.testing.assert_array_equal(shown(broken), shown(plain))


def test_what_is_not_understood_stays_as_it_is():
    for data in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*\0\0\0\xff", b"\0\0\0\0ftyp", b"GIF89a"):
        assert bare(data)[0] == data
    data = encoded(Image.fromarray(PICTURE), "JPEG")
    assert bare(data) == (data, 1)


# ---------------------------------------------------------------- depths and transparency


def test_16_bit_gray_with_a_transparent_color():
    row = struct.pack(">5H", 0, 257, 25700, 32768, 65535)
    data = png(5, 1, 16, 0, [row], chunk(b"tRNS", struct.pack(">H", 25700)))
    assert shown(data)[0, :, 1].tolist() == [0, 1, 255, 128, 255]
    assert shown(Image.open(io.BytesIO(data)))[0, :, 1].tolist() == [0, 1, 255, 128, 255]
    assert shown(png(5, 1, 16, 0, [row], chunk(b"tRNS", b"\0\0")))[0, :, 1].tolist() == [255, 1, 100, 128, 255]


@pytest.mark.parametrize(
    ("depth", "row", "clear", "expected"),
    [
        (1, bytes([0b10100000]), 0, [255, 255, 255, 255]),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (4, bytes([0x05, 0xA6]), 10, [0, 85, 255, 102]),
        (8, bytes([0, 5, 255, 7]), 5, [0, 255, 255, 7]),
    ],
)
def test_gray_with_a_transparent_color(depth, row, clear, expected):
    data = png(4, 1, depth, 0, [row], chunk(b"tRNS", struct.pack(">H", clear)))
    assert shown(data)[0, :, 0].tolist() == expected


def test_16_bit_colors_with_a_transparent_one():
    row = struct.pack(">9H", 0, 0, 0, 256, 512, 1024, 65535, 0, 0)
    data = png(3, 1, 16, 2, [row], chunk(b"tRNS", struct.pack(">3H", 256, 512, 1024)))
    assert shown(data)[0].tolist() == [[0, 0, 0], [255, 255, 255], [255, 0, 0]]


def test_16_bits_with_alpha():
    gray = png(3, 1, 16, 4, [struct.pack(">6H", 1000, 65535, 32768, 0, 65535, 65535)])
    assert shown(gray)[0, :, 0].tolist() == [3, 255, 255]
    color = png(2, 1, 16, 6, [struct.pack(">8H", 1000, 65535, 32768, 0, 65535, 32768, 0, 0xFFFF)])
    assert shown(color)[0].tolist() == [[255, 255, 255], [255, 128, 0]]


def with_alpha(mode):
    if mode == "PA":
        image = Image.new("PA", (1, 2))
        image.putpixel((0, 1), (0, 255))
        return image
    image = Image.fromarray(np.array([[[0, 0, 0, 0]], [[0, 0, 0, 255]]], np.uint8))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBa", "RGBA"])
def test_modes_with_alpha(mode):
    image = with_alpha(mode)
    assert image.mode == mode
    assert shown(image)[:, 0, 1].tolist() == [255, 0]


def test_palette_with_partial_transparency():
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([0, 0, 0, 200, 100, 50, 0, 0, 0])
    data = encoded(image, transparency=bytes([0, 255, 128]))
    seen = shown(data)[0].astype(int)
    assert seen[0].tolist() == [255, 255, 255] and seen[1].tolist() == [200, 100, 50]
    assert np.abs(seen[2] - 127).max() <= 1


def test_large_pictures_are_converted_in_tiles(monkeypatch):
    rng = np.random.default_rng(1)
    rgba = Image.fromarray(rng.integers(0, 256, (13, 11, 4), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (13, 11)).astype(np.uint16))
    whole = shown(rgba), shown(deep)
    monkeypatch.setattr(image_files, "_TILE", 7)
    np.testing.assert_array_equal(shown(rgba), whole[0])
    np.testing.assert_array_equal(shown(deep), whole[1])
    np.testing.assert_array_equal(whole[1][..., 0], np.rint(np.asarray(deep) / 257))


def test_cmyk_of_adobe():
    """Adobe writes CMYK inverted, and says so in a segment that has to stay; YCCK is the same beside YCbCr."""
    plain = encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in plain and b"Adobe" in bare(plain)[0]
    extra = b"\xff\xe2\x00\x08nonsen\xff\xfe\x00\x04hm"
    np.testing.assert_array_equal(shown(plain[:2] + extra + plain[2:]), shown(plain))
    assert np.abs(shown(plain)[8, 8].astype(int) - (200, 40, 90)).max() <= 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(shown(data)[8, 8].astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI"])
def test_known_formats_and_truncated_ones(kind):
    if kind not in image_files._formats():
        pytest.skip("not in this Pillow")
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    assert shown(data).shape == (64, 64, 3)
    with pytest.raises(ValueError, match=r"bytes>: (the image cannot be|not an image)") as error:
        shown(data[: len(data) // 2])
    assert "\n" not in str(error.value)
