"""Pictures: the reference's goldens, every kind of source and mode, and what damaged files get."""

import base64
import dataclasses
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from janus_jax.processing.images import (
    ImageSettings,
    contact_sheet,
    generation_pixels,
    open_image,
    to_uint8,
    understanding_pixels,
    understanding_pixels_uint8,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"


def one_line(error):
    return "\n" not in str(error.value)


# ---------------------------------------------------------------- opening images


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(image):
    assert image.mode == "RGB"
    return np.asarray(image)


PICTURE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def test_every_kind_of_source(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(PICTURE)))
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), path.read_bytes(), uri, Image.open(path), Image.fromarray(PICTURE), PICTURE):
        np.testing.assert_array_equal(rgb(open_image(source)), PICTURE)


def test_gray_arrays():
    gray = PICTURE[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=-1)
    np.testing.assert_array_equal(rgb(open_image(gray)), expected)
    np.testing.assert_array_equal(rgb(open_image(gray[..., None])), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_look_the_same(mode):
    flat = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    assert rgb(open_image(flat)).min() >= 254
    flat = Image.new("RGB", (6, 4), (0, 0, 0)).convert(mode)
    assert rgb(open_image(flat)).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_colors_of_print_and_video(mode):
    shown = rgb(open_image(Image.new("RGB", (2, 2), (200, 40, 90)).convert(mode)))[0, 0].astype(int)
    assert np.abs(shown - (200, 40, 90)).max() <= 2


def test_cmyk_jpeg_is_not_inverted():
    data = encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(rgb(open_image(data))[8, 8].astype(int) - (200, 40, 90)).max() <= 8


def test_palette_keeps_its_colors():
    image = Image.frombytes("P", (2, 2), bytes([0, 1, 1, 0]))
    image.putpalette([10, 20, 30, 200, 100, 50])
    expected = [[[10, 20, 30], [200, 100, 50]], [[200, 100, 50], [10, 20, 30]]]
    assert rgb(open_image(encoded(image))).tolist() == expected


def test_transparent_palette_shows_white():
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert rgb(open_image(encoded(image, transparency=0))).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_transparency_shows_white():
    array = np.zeros((1, 3, 4), np.uint8)
    array[0, :, 3] = (0, 128, 255)
    for source in (
        array,
        Image.fromarray(array),
        encoded(Image.fromarray(array)),
        Image.fromarray(array).convert("LA"),
    ):
        clear, half, opaque = rgb(open_image(source))[0, :, 0].astype(int)
        assert (clear, opaque) == (255, 0)
        assert abs(half - 127) <= 1


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bits_are_scaled_and_not_clipped(mode):
    values = np.array([[0, 257, 25700, 32768, 65535]], np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values.astype(np.int32))
    assert image.mode == mode
    for source in (image, encoded(image, "PNG" if mode == "I;16" else "TIFF")):
        assert rgb(open_image(source))[0, :, 1].tolist() == [0, 1, 100, 128, 255]


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:, :20] = 250  # the left half is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the file has to be turned clockwise
    path = tmp_path / "phone.jpg"
    path.write_bytes(encoded(Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif))
    assert Image.open(path).size == (20, 40)
    for source in (path, Image.open(path), open_image(path)):
        seen = rgb(open_image(source))
        assert seen.shape == (20, 40, 3)
        assert seen[:, :16].mean() > 230 and seen[:, 24:].mean() < 20


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb(open_image(data))[0, 0].tolist() == [255, 0, 0]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png: no such image file") as error:
        open_image(tmp_path / "nothing.png")
    assert one_line(error)
    with pytest.raises(IsADirectoryError, match="found a folder"):
        open_image(tmp_path)


def test_corrupted_files_are_named(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    png, jpeg = encoded(Image.fromarray(noise)), encoded(Image.fromarray(noise), "JPEG")
    spoiled = {
        "empty.png": b"",
        "text.png": b"this is not an image",
        "cut.png": png[:2000],
        "flipped.png": png[:60] + bytes(200) + png[260:],
        "cut.jpg": jpeg[:1000],
    }
    for name, data in spoiled.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as error:
            open_image(tmp_path / name)
        assert one_line(error)
        with pytest.raises(ValueError, match="bytes>"):
            open_image(data)
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        open_image(Image.open(tmp_path / "cut.jpg"))


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="exceeds limit"):
        open_image(encoded(Image.new("L", (30, 30))))


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (np.zeros((4, 4, 3), np.float32), r"must be uint8 .* got float32 \[4, 4, 3\]"),
        (np.zeros((3, 5, 5), np.uint8), r"got uint8 \[3, 5, 5\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "must be uint8"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 4)), "empty"),
        (Image.new("F", (4, 4)), "float pixels"),
        (Image.new("I", (4, 4), 70000), "not 16-bit"),
        (Image.new("I", (4, 4), -1), "not 16-bit"),
        ("https://example.org/cat.png", "not fetched"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,@@@", "base64 is damaged"),
        ("data:image/png;base64,AAAA", "not an image"),
    ],
)
def test_bad_sources(source, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        open_image(source)
    assert one_line(error)


@pytest.mark.parametrize("source", [None, 3, [1, 2]])
def test_sources_of_wrong_types(source):
    with pytest.raises(ValueError, match="an image must be a path"):
        open_image(source)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("index", range(5))
def test_understanding_pixels_equal_the_reference(index):
    golden = np.load(GOLDEN / "preprocess.npz")
    expected = golden[f"pixels_{index}"].transpose(1, 2, 0)
    settings = ImageSettings(image_size=expected.shape[0])
    pixels = understanding_pixels_uint8(golden[f"image_{index}"], settings)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)
    normalized = understanding_pixels(golden[f"image_{index}"], settings)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected / 127.5 - 1, atol=1e-6)


def test_understanding_pixels_follow_their_settings():
    settings = ImageSettings(image_size=32, min_size=4, mean=(0.1, 0.2, 0.4), std=(0.5, 1, 2))
    pixels = understanding_pixels_uint8(np.full((1, 100, 3), 200, np.uint8), settings)
    rows = np.flatnonzero((pixels == 200).all(axis=(1, 2)))
    assert rows.tolist() == [14, 15, 16, 17]
    assert pixels[0, 0].tolist() == [25, 51, 102]
    normalized = understanding_pixels(np.full((9, 9, 3), 255, np.uint8), settings)
    np.testing.assert_allclose(normalized[0, 0], [1.8, 0.8, 0.3], rtol=1e-6)
    plain = understanding_pixels(np.full((9, 9, 3), 255, np.uint8), dataclasses.replace(settings, do_normalize=False))
    np.testing.assert_allclose(plain, 1, rtol=1e-6)


def test_generation_pixels_crop_the_middle():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    pixels = generation_pixels(wide, 40)
    assert pixels.shape == (40, 40, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, 1)
    np.testing.assert_allclose(generation_pixels(wide.transpose(1, 0, 2), 40), 1)


def test_generation_pixels_equal_resize_then_crop():
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 90, 3), np.uint8))
    resized = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    np.testing.assert_allclose(generation_pixels(image, 32), np.asarray(resized) / 127.5 - 1, atol=2.1 / 127.5)


def test_generation_pixels_keep_an_image_of_the_right_size():
    image = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    pixels = generation_pixels(image, 16)
    np.testing.assert_allclose(pixels, image / 127.5 - 1, atol=1e-6)
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_a_very_long_image_costs_little():
    assert generation_pixels(np.zeros((1, 60000, 3), np.uint8), 384).shape == (384, 384, 3)
    assert understanding_pixels_uint8(np.zeros((1, 60000, 3), np.uint8), ImageSettings()).shape == (384, 384, 3)


def test_to_uint8_clips_and_truncates():
    values = np.array([-3, -1, -0.001, 0, 0.999, 1, 7], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 127, 127, 254, 255, 255]
    assert to_uint8(values.reshape(1, 7)).shape == (1, 7)
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([0, np.nan]))


def test_contact_sheet():
    tiles = [np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = contact_sheet(tiles)
    assert sheet.size == (18, 8)
    assert [sheet.getpixel((6 * (i % 3), 4 * (i // 3)))[0] for i in range(5)] == [0, 10, 20, 30, 40]
    assert sheet.getpixel((17, 7)) == (255, 255, 255)
    assert contact_sheet(tiles, columns=1).size == (6, 20)
    assert contact_sheet(tiles, columns=9, gap=2).size == (5 * 8 - 2, 4)
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])
    with pytest.raises(ValueError, match="at least one column, got 0"):
        contact_sheet(tiles, columns=0)
