"""Pictures of every kind through `open_image` and both preprocessings."""

import base64
import functools
import io
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from janus_jax.processing.image_files import open_image
from janus_jax.processing.image_metadata import bare, orientation
from janus_jax.processing.images import ImageSettings, generation_pixels, understanding_pixels_uint8
from tests.fuzz.bounded import given, mutated

_MEMORY = 128 << 20  # less than the harness allows, so that a header within our bound is no finding


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Small files of every format, mode and depth, with EXIF, a profile and texts where the format has them."""
    rgb = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    image, exif = Image.fromarray(rgb), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    alpha = image.convert("RGBA")
    alpha.putalpha(77)
    deep = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    plans = [
        (image, "PNG", {"exif": exif, "icc_profile": bytes(200)}),
        (alpha, "PNG", {}),
        (deep, "PNG", {"transparency": 257}),
        (image.convert("P"), "PNG", {"transparency": bytes([0, 7, 255])}),
        (image.convert("1"), "PNG", {}),
        (image.convert("LA"), "PNG", {}),
        (image, "PNG", {"save_all": True, "append_images": [alpha.convert("RGB")]}),
        (image, "JPEG", {"exif": exif, "icc_profile": bytes(200), "comment": b"said"}),
        (image, "JPEG", {"progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "MPO", {"save_all": True, "append_images": [image]}),
        (image, "GIF", {"save_all": True, "append_images": [alpha.convert("RGB")], "comment": b"said"}),
        (image, "WEBP", {"exif": exif, "xmp": b'tiff:Orientation="3"'}),
        (alpha, "WEBP", {"lossless": True}),
        (image, "BMP", {}),
        (image.convert("P"), "BMP", {}),
        (image, "TIFF", {"exif": exif}),
        (deep, "TIFF", {"compression": "tiff_lzw"}),
        (image, "TIFF", {"compression": "jpeg"}),
        (image.convert("CMYK"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (image.convert("1"), "TIFF", {"compression": "group4"}),
        (image, "PPM", {}),
        (deep, "PPM", {}),
        (image, "QOI", {}),
        (image, "JPEG2000", {}),
        (image, "AVIF", {"exif": exif}),
    ]
    made = []
    for picture, kind, options in plans:
        buffer = io.BytesIO()
        if kind not in Image.SAVE:
            Image.init()
        if kind in Image.SAVE:
            picture.save(buffer, kind, **options)
            made.append(buffer.getvalue())
    # Some that are refused by their first bytes, lest a mutation should bring them to life.
    return (*made, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", b"P5 10 10 255\n" + bytes(100))


def read(data, folder):
    (folder / "a.png").write_bytes(data)
    image = open_image(folder / "a.png", memory=_MEMORY)
    assert image.mode == "RGB" and 0 not in image.size
    if max(image.size) < 4000:
        settings = ImageSettings(image_size=32, min_size=4)
        assert understanding_pixels_uint8(image, settings).shape == (32, 32, 3)
        assert np.isfinite(generation_pixels(image, 32)).all()


def read_uri(data, folder):
    open_image("data:image/png;base64," + base64.b64encode(data).decode(), memory=_MEMORY)
    open_image(data.decode("latin-1"), memory=_MEMORY)


@given(mutated(seeds()))
def test_pictures(bounded, data):
    line = bounded(read, data)
    assert not line or "a.png" in line


@given(mutated([seeds()[0], b"data:image/png;base64,AAAA", b"data:,", b"http://a/b.png", b"/dev/zero", b"a\0b"]))
def test_data_uris_and_names(bounded, data):
    bounded(read_uri, data)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


_SIZES = st.integers(0, 100) | st.sampled_from([1 << 16, 1 << 20, (1 << 31) - 1, (1 << 32) - 1])
_CHUNKS = st.sampled_from([b"eXIf", b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"gAMA", b"IHDR"])


@st.composite
def pngs(draw):
    """Correct in its checksums, and in little else: mutations of bytes seldom get past those."""
    depth, color = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([0, 2, 3, 4, 6]))
    header = struct.pack(">IIBBBBB", draw(_SIZES), draw(_SIZES), depth, color, 0, 0, draw(st.integers(0, 1)))
    extra = [chunk(draw(_CHUNKS), draw(st.binary(max_size=40))) for _ in range(draw(st.integers(0, 3)))]
    pixels = chunk(b"IDAT", zlib.compress(bytes(draw(st.integers(0, 3000)))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + pixels + chunk(b"IEND", b"")


@given(pngs())
def test_pngs_with_right_checksums(bounded, data):
    bounded(read, data)


_ENTRIES = st.tuples(
    st.sampled_from([0x0112, 0x8769, 0x011A]), st.integers(0, 14), _SIZES, st.binary(min_size=4, max_size=4)
)


@given(st.sampled_from(["<", ">"]), st.integers(0, 70), st.lists(_ENTRIES, max_size=5), st.binary(max_size=40))
def test_exif_never_refuses_a_picture(order, count, entries, tail):
    exif = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, count)
    exif += b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries) + tail
    assert orientation(exif) in range(1, 9)
    pixels = chunk(b"IDAT", zlib.compress(bytes([0, 1, 2, 3, 4, 5, 6])))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"eXIf", exif) + pixels + chunk(b"IEND", b"")
    image = open_image(data)
    assert sorted(image.size) == [1, 2]
    assert sorted(map(tuple, np.asarray(image).reshape(-1, 3).tolist())) == [(1, 2, 3), (4, 5, 6)]


@given(st.sampled_from(seeds()), st.integers(0, 100))
def test_cut_files_are_left_to_their_decoders(data, share):
    bare(data[: len(data) * share // 100])
