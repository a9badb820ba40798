"""Images in and out: opening any picture, the two preprocessings of Janus, uint8 and contact sheets.

Arrays are [height, width, 3] in RGB. Reference: janus/models/image_processing_vlm.py and generation_inference.py.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

_WHITE = (255, 255, 255)


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class ImageSettings:
    """How an understanding image becomes pixels (reference: VLMImageProcessorConfig in image_processing_vlm.py).

    Sizes are in pixels; `mean` and `std` are per RGB channel of values in [0, 1]; `background_color` fills the
    borders of an image that is not square, and is `int(mean * 255)` when left None.
    """

    image_size: int = 384
    min_size: int = 14
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    background_color: tuple[int, int, int] | None = None

    def __post_init__(self):
        if not 1 <= self.min_size <= self.image_size:
            raise ValueError(f"min_size {self.min_size} must lie between 1 and image_size {self.image_size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"image {name} {getattr(self, name)} must have 3 values, one for each of R, G and B")
        if not all(self.std):
            raise ValueError(f"image std {self.std} must not be zero")
        if self.background_color is None:
            object.__setattr__(self, "background_color", tuple(int(mean * 255) for mean in self.mean))

    @classmethod
    def parse(cls, raw: dict[str, Any], image_size: int = 384) -> ImageSettings:
        """Settings of a parsed preprocessor_config.json; `image_size` and the defaults stand in for what it leaves out.

        Knows the reference's `image_size` and the `size` of transformers' port. ValueError when a value does not fit.
        """
        size = raw.get("image_size") or raw.get("size") or image_size
        found = {"image_size": size.get("height", image_size) if isinstance(size, dict) else size}
        triples = {"mean": "image_mean", "std": "image_std", "background_color": "background_color"}
        found |= {name: raw.get(key) for name, key in triples.items()}
        found |= {key: raw.get(key) for key in ("min_size", "rescale_factor", "do_normalize")}
        found = {name: value for name, value in found.items() if value is not None}
        try:
            return cls(**{name: tuple(value) if name in triples else value for name, value in found.items()})
        except TypeError as error:
            raise ValueError(f"an image setting has the wrong type ({error})") from None


# ---------------------------------------------------------------- opening


def open_image(source: ImageSource) -> Image.Image:
    """The picture in `source` as an 8-bit RGB PIL image, turned upright by its EXIF orientation.

    `source` is a path, a `data:image/...;base64,` URI, the bytes of an image file, a PIL image of any mode, or a uint8
    array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. 16-bit grayscale is scaled to 8 bits. Transparent parts show white:
    the reference drops the alpha channel, which uncovers whatever colour lies under it (often black on black);
    opaque pixels are the same in both. Of an animation, the first frame counts.

    Raises OSError when the file cannot be read, ValueError when it is not an image or no source of one.
    """
    name, image = _decode(source)
    if 0 in image.size:
        raise ValueError(f"{name}: the image is empty ({image.width} x {image.height})")
    # Decoders of damaged files raise whatever they stumble over (SyntaxError, struct.error, zlib.error, ...).
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(f"{name}: the image cannot be decoded ({error})") from None


def _decode(source: ImageSource) -> tuple[str, Image.Image]:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<PIL image of mode {source.mode}>", source
    if isinstance(source, np.ndarray):
        return f"<array {source.shape}>", _from_array(source)
    if isinstance(source, str) and source.startswith("data:"):
        name, data = "<data URI>", _from_data_uri(source)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{source}: web addresses are not fetched; download the image and give its path")
    elif isinstance(source, str | os.PathLike):
        name, data = _from_path(pathlib.Path(source))
    elif isinstance(source, bytes | bytearray):
        name, data = f"<{len(source)} bytes>", bytes(source)
    else:
        raise ValueError(f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}")
    try:
        return name, Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image in a format that Pillow knows") from None
    except Exception as error:
        raise ValueError(f"{name}: the image cannot be opened ({error})") from None


def _from_path(path: pathlib.Path) -> tuple[str, bytes]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such image file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected an image file, found a folder")
    return str(path), path.read_bytes()


def _from_data_uri(uri: str) -> bytes:
    header, _, payload = uri.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"<data URI>: {header[:60]!r} is not base64; expected 'data:image/...;base64,...'")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"<data URI>: the base64 is damaged ({error})") from None


def _from_array(array: np.ndarray) -> Image.Image:
    channels_fit = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype != np.uint8 or not channels_fit:
        expected = "uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        raise ValueError(f"an image array must be {expected}, not {array.dtype} {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"the image array {list(array.shape)} is empty")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit values at 255; mode I is how it opens 16-bit files of some formats.
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers from {values.min()} to {values.max()} are not 16-bit gray; give a uint8 array")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range; give a uint8 array")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


# ---------------------------------------------------------------- understanding


def understanding_pixels_uint8(image: ImageSource, settings: ImageSettings) -> np.ndarray:
    """uint8 [S, S, 3] with S = `settings.image_size`: long side scaled to S, centred on the background colour.

    Bit-exact to `VLMImageProcessor.resize` (transposed): side lengths are truncated, never below `min_size`, and the
    filter is Pillow's antialiased bicubic. (transformers' port rounds the side lengths and differs by a pixel.)
    """
    image = open_image(image)
    size = settings.image_size
    width, height = (max(int(side / max(image.size) * size), settings.min_size) for side in image.size)
    square = Image.new("RGB", (size, size), settings.background_color)
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return np.array(square)


def understanding_pixels(image: ImageSource, settings: ImageSettings) -> np.ndarray:
    """float32 [S, S, 3], the input of SigLIP: `understanding_pixels_uint8` rescaled, then (x - mean) / std."""
    pixels = understanding_pixels_uint8(image, settings).astype(np.float64) * settings.rescale_factor
    if settings.do_normalize:
        pixels = (pixels - np.array(settings.mean)) / np.array(settings.std)
    return pixels.astype(np.float32)


# ---------------------------------------------------------------- generation


def generation_pixels(image: ImageSource, image_size: int) -> np.ndarray:
    """float32 [image_size, image_size, 3] in [-1, 1], the input of the VQ encoder in training.

    The short side becomes `image_size` and the middle of the long side is kept (Janus-Pro report, section 3.1).
    """
    image = open_image(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Cropping inside the resize bounds the memory of a very long image; the filter still sees beyond the crop.
    box = (left, top, left + side, top + side)
    square = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square, dtype=np.float32) / 127.5 - 1


def to_uint8(images: Any) -> np.ndarray:
    """uint8 of `images`, any float array in [-1, 1] of any shape: clip((x + 1) / 2 * 255, 0, 255), truncated.

    Reference: generation_inference.py. ValueError on NaN, which no image holds.
    """
    scaled = (np.asarray(images, dtype=np.float32) + 1) / 2 * 255
    if np.isnan(scaled).any():
        raise ValueError("the images hold NaN: the model that made them overflowed or its weights are damaged")
    return np.clip(scaled, 0, 255).astype(np.uint8)


def contact_sheet(images: Sequence[ImageSource], columns: int | None = None, gap: int = 0) -> Image.Image:
    """One image showing `images` row by row, `columns` wide (about square by default), `gap` pixels apart on white.

    ValueError when there are no images or less than one column.
    """
    opened = [open_image(image) for image in images]
    if not opened:
        raise ValueError("a contact sheet needs at least one image")
    if columns is None:
        columns = math.ceil(math.sqrt(len(opened)))
    if columns < 1:
        raise ValueError(f"a contact sheet needs at least one column, not {columns}")
    columns = min(columns, len(opened))
    rows = math.ceil(len(opened) / columns)
    width, height = max(image.width for image in opened), max(image.height for image in opened)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _WHITE)
    for index, image in enumerate(opened):
        row, column = divmod(index, columns)
        left = column * (width + gap) + (width - image.width) // 2
        sheet.paste(image, (left, row * (height + gap) + (height - image.height) // 2))
    return sheet
