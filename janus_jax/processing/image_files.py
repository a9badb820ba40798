"""Opening any image, in bounded memory: `open_image`.

Images come from anywhere. A file of 300 kB may claim a billion pixels, name Ghostscript as its decoder, be a FIFO, or
carry metadata that no parser survives; none of that may take more than a stated amount of memory.
"""

from __future__ import annotations

import base64
import binascii
import errno
import functools
import io
import os
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from janus_jax.io import files
from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path
from janus_jax.processing import image_metadata

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
MEMORY_VARIABLE = "JANUS_JAX_IMAGE_BYTES"
DEFAULT_MEMORY = 1 << 30  # bytes that opening one image may take; 134 megapixels of most formats
_MAX_NAME = 4096  # characters of a path
_TILE = 1 << 20  # pixels converted at a time, for conversions that make many copies
_WHITE = (255, 255, 255)

# Bytes per pixel while decoding: the decoder's own copies plus Pillow's image (measured, and rounded up).
_DECODING = {"AVIF": 16, "JPEG2000": 28, "PPM": 12, "TIFF": 12, "WEBP": 17}
_PROGRESSIVE = 12  # of a JPEG whose coefficients must all be held
_CONVERTING = 8  # Pillow's image, and the RGB or rotated image made from it
_SCALING = 32  # bytes of the resize's coefficients for each pixel of a side

# What Pillow warns about is either refused here or harmless. Set once, since `catch_warnings` is not thread-safe.
for _category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


def open_image(source: ImageSource, memory: int | None = None) -> Image.Image:
    """The image in `source` as an 8-bit RGB PIL image, turned upright by its EXIF orientation.

    `source` is a path, a `data:image/...;base64,` URI, the bytes of an image file in one of `FORMATS`, a PIL image of
    any mode, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. 16-bit grayscale is scaled to 8 bits.
    Transparent pixels become white: the reference drops the alpha channel, which exposes whatever color is under it
    (often black on black); opaque pixels are the same in both. Only the first frame of an animation is used. Damaged
    metadata is ignored.

    `memory` is how many bytes opening may take in addition to the file's own, which may be at most a quarter of that.
    None means the environment variable JANUS_JAX_IMAGE_BYTES, or 1 GiB if that is not set. The memory needed is
    computed from the image's header, before anything is decoded.

    Raises OSError if the file cannot be read, and ValueError if `source` is not an image, is damaged, or needs more
    memory than that.
    """
    memory = _memory() if memory is None else memory
    name, image, turned = _open(source, memory)
    _check_size(name, image, memory)
    # On damaged files, decoders raise all kinds of errors (SyntaxError, struct.error, zlib.error, ...).
    try:
        transparency = _transparency(image)  # while the file's bit depth is still known
        image.load()
        if turned is None:
            turned = image_metadata.orientation(image.info.get("exif"), image.info.get("xmp"))
            if turned == 1 and isinstance(source, Image.Image):
                turned = _pillows_orientation(image)  # which only Pillow can read in a file that the caller opened
        rgb = _to_rgb(image, transparency)
        del image
        return _turn(rgb, turned)
    except MemoryError:
        raise OSError(errno.ENOMEM, "there is not enough memory to decode the image", name) from None
    except Exception as error:
        raise ValueError(f"{name}: the image cannot be decoded ({one_line(error)})") from None


def _memory() -> int:
    text = os.environ.get(MEMORY_VARIABLE, "")
    if not text:
        return DEFAULT_MEMORY
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{MEMORY_VARIABLE} must be a number of bytes, got {one_line(repr(text))}")
    return int(text)


# ---------------------------------------------------------------- sources


def _open(source: ImageSource, memory: int) -> tuple[str, Image.Image, int | None]:
    """The source's name, its image (not decoded yet), and its orientation if already known."""
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"<PIL image of mode {source.mode}>"
        return one_line(name), source, None
    if isinstance(source, np.ndarray):
        return f"<array {source.shape}>", _from_array(source, memory), 1
    if isinstance(source, str) and source.startswith("data:"):
        name, data = "<data URI>", _from_data_uri(source, memory)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{one_line(source)}: URLs are not fetched; download the image and pass its path")
    elif isinstance(source, str | os.PathLike):
        name, data = _from_path(os.fspath(source), memory)
    elif isinstance(source, bytes | bytearray):
        name, data = f"<{len(source)} bytes>", bytes(source)
        if len(data) > memory // 4:
            raise ValueError(_too_many_bytes(name, len(data), memory))
    else:
        raise ValueError(f"an image must be a path, bytes, a PIL image or a uint8 array, got {type(source).__name__}")
    try:
        data, turned = image_metadata.bare(data)
        return name, Image.open(io.BytesIO(data), formats=_formats()), turned
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image of a known format ({', '.join(FORMATS)}), or damaged") from None
    except Image.DecompressionBombError as error:
        cure = "; PIL.Image.MAX_IMAGE_PIXELS is Pillow's own limit"
        raise ValueError(f"{name}: the image is too large ({one_line(error)}){cure}") from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "there is not enough memory to open the image", name) from None
    except Exception as error:
        raise ValueError(f"{name}: the image cannot be opened ({one_line(error)})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillows lack AVIF


def _from_path(source: str | bytes, memory: int) -> tuple[str, bytes]:
    name = one_line(os.fsdecode(source))
    if len(source) > _MAX_NAME:
        raise ValueError(f"{name}: a path may have at most {_MAX_NAME:,} characters, got {len(source):,}")
    path = as_path(os.fsdecode(source))
    try:
        if not is_store(path) and path.is_dir():
            raise IsADirectoryError(f"{name}: expected an image file, found a folder")
        return name, files.read_bytes(path, memory // 4)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image file") from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "there is not enough memory to read the file", name) from None


def _from_data_uri(uri: str, memory: int) -> bytes:
    if len(uri) > memory // 3:
        raise ValueError(_too_many_bytes("<data URI>", len(uri) * 3 // 4, memory))
    header, _, payload = uri.partition(",")
    if not header.endswith(";base64"):
        start = one_line(repr(header), 60)
        raise ValueError(f"<data URI>: {start} is not base64; expected 'data:image/...;base64,...'")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError for characters beyond ASCII
        raise ValueError(f"<data URI>: the base64 is damaged ({one_line(error)})") from None


def _from_array(array: np.ndarray, memory: int) -> Image.Image:
    channels_fit = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype != np.uint8 or not channels_fit:
        expected = "uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        raise ValueError(f"an image array must be {expected}, got {array.dtype} {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"the image array {list(array.shape)} is empty")
    height, width = array.shape[:2]
    _check(f"<array {array.shape}>", width, height, _CONVERTING, memory)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


# ---------------------------------------------------------------- bounds


def _check_size(name: str, image: Image.Image, memory: int):
    if 0 in image.size:
        raise ValueError(f"{name}: the image is empty ({image.width} x {image.height})")
    decoding = _PROGRESSIVE if image.info.get("progressive") else _DECODING.get(image.format or "", 0)
    _check(name, image.width, image.height, max(decoding, _CONVERTING), memory)


def _check(name: str, width: int, height: int, each: int, memory: int):
    needed = width * height * each + max(width, height) * _SCALING
    if needed > memory:
        raise ValueError(
            f"{name}: the image of {width} x {height} pixels would take {needed / 2**20:,.0f} MiB of memory, more than "
            f"the {memory / 2**20:,.0f} MiB allowed; make it smaller, or set {MEMORY_VARIABLE}={needed}"
        )


def _too_many_bytes(name: str, size: int, memory: int) -> str:
    return f"{name} has {size:,} bytes, more than the {memory // 4:,} allowed for an image; see {MEMORY_VARIABLE}"


# ---------------------------------------------------------------- pixels


def _pillows_orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(0x0112)
    except Exception:
        return 1
    return found if type(found) is int else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def _transparency(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The transparent color in the units of the decoded pixels; Pillow reports it in those of the file."""
    value = image.info.get("transparency")
    if value is None or image.format != "PNG" or not image.tile:
        return value
    stored = image.tile[0][3]
    if isinstance(value, int):
        return value * {"L;2": 85, "L;4": 17}.get(stored, 1)
    return tuple(channel >> 8 for channel in value) if isinstance(value, tuple) and stored == "RGB;16B" else value


def _to_rgb(image: Image.Image, transparency: int | tuple[int, ...] | bytes | None) -> Image.Image:
    """`image` in RGB, as a plain copy without metadata."""
    if image.mode.startswith("I"):
        rgb = _from_16_bits(image, transparency if isinstance(transparency, int) else None)
    elif image.mode == "F":
        raise ValueError("float pixels have no standard range; pass a uint8 array")
    elif transparency is not None or image.has_transparency_data:
        rgb = Image.new("RGB", image.size)
        for box in _tiles(image.size):
            tile = image.crop(box)
            if transparency is not None:
                tile.info["transparency"] = transparency
            rgba = tile.convert("RGBA")
            white = Image.new("RGBA", rgba.size, _WHITE)
            rgb.paste(Image.alpha_composite(white, rgba).convert("RGB"), box[:2])
    else:
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _from_16_bits(image: Image.Image, transparency: int | None) -> Image.Image:
    # Pillow's own conversion clips 16-bit values at 255; it opens 16-bit files of some formats in mode I.
    gray = Image.new("L", image.size)
    for box in _tiles(image.size):
        values = np.asarray(image.crop(box)).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers from {values.min()} to {values.max()} are not 16-bit gray; pass a uint8 array")
        scaled = np.rint(values / 257).astype(np.uint8)
        if transparency is not None:
            scaled[values == transparency] = 255
        gray.paste(Image.fromarray(scaled), box[:2])
    return gray.convert("RGB")


def _tiles(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    width, height = size
    across = min(width, _TILE)
    down = max(_TILE // across, 1)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)
