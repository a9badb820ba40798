"""What hostile pictures may cost: no decoder is started for them, no memory taken, no line printed."""

import errno
import io
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from janus_jax.processing import image_files
from janus_jax.processing.image_files import open_image
from tests.processing.test_image_files import (
    PICTURE,
    ROOT,
    chunk,
    encoded,
    rgb_png,
    tiff,
)


def test_other_formats_never_start_their_decoders(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(x) run\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    for name, data in [
        ("a.eps", eps),
        ("b.jpg", eps),
        ("c.pdf", b"%PDF-1.4\n"),
        ("d.ico", encoded(Image.new("RGB", (16, 16)), "ICO")),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: not an image of a known format \(AVIF, BMP"):
            open_image(tmp_path / name)


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is a FIFO, not a regular file"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        open_image("/dev/zero")


def test_files_are_no_larger_than_pictures(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"a\.png has 1,099,511,627,776 bytes, more than the limit of 268,435,456"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"data URI> has .* more than the 250 allowed"):
        open_image("data:image/png;base64," + "A" * 1000, memory=1000)
    with pytest.raises(ValueError, match="300 bytes> has 300 bytes, more than the 250"):
        open_image(bytes(300), memory=1000)


def flat_png(width, height, depth, color, taken):
    """Of any size, from few bytes and little memory; without most of its pixels where they are never looked at."""
    row = bytes(1 + -(-width * depth * {0: 1, 2: 3, 4: 2, 6: 4}[color] // 8))
    packer, packed = zlib.compressobj(1), []
    for _ in range(height if taken else 1):
        packed.append(packer.compress(row))
    pixels = b"".join([*packed, packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


MEASURED = """
import json, pathlib, sys
from janus_jax.processing.image_files import _formats
from janus_jax.processing.images import ImageSettings, generation_pixels, understanding_pixels_uint8
_formats()
def size(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
for path in sys.argv[1:]:
    lines = []
    open("/proc/self/clear_refs", "w").write("5")
    before = size("VmRSS")
    for work in (lambda: understanding_pixels_uint8(path, ImageSettings()), lambda: generation_pixels(path, 384)):
        try:
            lines.append(str(work().shape))
        except ValueError as error:
            lines.append(str(error))
    print(json.dumps([lines, size("VmHWM") - before]))
"""


def measured(tmp_path, pictures):
    """What both preprocessings say of each picture, and the bytes that they took, in a process of its own."""
    for index, data in enumerate(pictures):
        (tmp_path / str(index)).write_bytes(data)
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / str(index)) for index in range(len(pictures)))]
    ran = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=500)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr[-2000:]  # Pillow's warnings among them
    return [json.loads(line) for line in ran.stdout.splitlines()]


REFUSED = [(1, 30_000_000, 16, 0), (30_000_000, 1, 16, 0), (13_000, 13_000, 16, 0), (13_000, 13_000, 8, 6)]
READ = [(9_600, 9_500, 16, 0), (1_000_000, 1, 8, 2)]  # the first above the size at which Pillow would warn


@pytest.mark.parametrize(
    ("cases", "read"), [(REFUSED, False), pytest.param(READ, True, marks=pytest.mark.slow)], ids=["refused", "read"]
)
def test_memory_is_bounded(tmp_path, cases, read):
    pictures = [flat_png(*case, read) for case in cases]
    assert max(map(len, pictures)) < 1_000_000
    for case, (lines, used) in zip(cases, measured(tmp_path, pictures), strict=True):
        assert used < image_files.DEFAULT_MEMORY, f"{case}: {used / 2**20:.0f} MiB"
        for line in lines:
            told = "MiB of memory, more than the 1,024 MiB allowed"
            assert (line == "(384, 384, 3)") if read else (told in line), line


def test_damaged_files_print_nothing(tmp_path):
    """Whatever Pillow warns of, and libtiff and others print themselves."""
    entry = (0x010F, 2, 90, b"\xff\xff\xff\x7f")
    jpeg = encoded(Image.fromarray(PICTURE), "JPEG")
    exif = b"Exif\0\0" + tiff(entry, entry, count=900)
    pictures = [
        jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:],
        rgb_png(chunk(b"acTL", bytes(8)), chunk(b"eXIf", exif)),
        encoded(Image.fromarray(PICTURE), "TIFF", compression="tiff_lzw")[:-40],
    ]
    assert [line for lines, _ in measured(tmp_path, pictures)[:2] for line in lines] == ["(384, 384, 3)"] * 4


def test_the_limit_is_the_users(monkeypatch):
    data = encoded(Image.new("RGB", (100, 100)))
    monkeypatch.setenv(image_files.MEMORY_VARIABLE, "80000")
    with pytest.raises(ValueError, match=r"100 x 100 pixels would take 0 MiB .* or set JANUS_JAX_IMAGE_BYTES=83200"):
        open_image(data)
    monkeypatch.setenv(image_files.MEMORY_VARIABLE, "83200")
    assert open_image(data).size == (100, 100)
    monkeypatch.setenv(image_files.MEMORY_VARIABLE, "80000")
    assert open_image(data, memory=1 << 20).size == (100, 100)
    for bad in ("much", "-1", "0", "1e9"):
        monkeypatch.setenv(image_files.MEMORY_VARIABLE, bad)
        with pytest.raises(ValueError, match=r"JANUS_JAX_IMAGE_BYTES must be a number of bytes, got"):
            open_image(data)


def test_the_callers_own_pictures_are_bounded_too():
    with pytest.raises(ValueError, match="100 x 100 pixels would take"):
        open_image(Image.new("RGB", (100, 100)), memory=1000)
    with pytest.raises(ValueError, match="would take"):
        open_image(np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20)))


def test_no_memory_is_one_line(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(image_files, "_to_rgb", full)
    with pytest.raises(OSError, match="not enough memory to decode") as error:
        open_image(rgb_png())
    assert error.value.errno == errno.ENOMEM  # the machine's fault, not the picture's


def test_messages_are_one_line(tmp_path):
    evil = tmp_path / "a\n\x1b[31m.png"
    evil.write_bytes(b"no image")
    for source in (evil, tmp_path / "b\nc.png", tmp_path / ("x" * 300), "y" * 10_000_000, "http://a\nb", "a\0b"):
        with pytest.raises((ValueError, OSError)) as error:
            open_image(source)
        assert str(error.value).isprintable() and len(str(error.value)) < 700
    header = "data:" + "x\n" * 1_000_000
    with pytest.raises(ValueError, match="is not base64") as error:
        open_image(header + ",AAAA")
    assert len(str(error.value)) < 300
    for payload in ("é", "A\n" * 10):
        with pytest.raises(ValueError, match="base64 is damaged"):
            open_image(f"data:image/png;base64,{payload}")
