"""Images in and out: the two preprocessings of Janus, conversion to uint8, contact sheets. `image_files` opens them.

Arrays are [height, width, 3] in RGB. Reference: janus/models/image_processing_vlm.py and generation_inference.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from janus_jax.io.fields import Fields
from janus_jax.processing.image_files import ImageSource, open_image

__all__ = ["ImageSettings", "ImageSource", "contact_sheet", "generation_pixels", "open_image", "to_uint8"]
__all__ += ["understanding_pixels", "understanding_pixels_uint8"]

_WHITE = (255, 255, 255)

_MOST_PIXELS = 8192  # on a side of a model's input
_FAR = 1e6  # means, deviations and factors above it, or below its inverse, make pixels that are not finite


# ---------------------------------------------------------------- settings


_BICUBIC = int(Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class ImageSettings:
    """How an understanding image becomes pixels (reference: VLMImageProcessorConfig in image_processing_vlm.py).

    Sizes are in pixels; `mean` and `std` are per RGB channel, for values in [0, 1]; `background_color` fills the
    borders of an image that is not square, and defaults to `int(mean * 255)`.
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
            raise ValueError(f"min_size must be from 1 to image_size {self.image_size}, got {self.min_size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"image {name} must have 3 values, for R, G and B, got {getattr(self, name)}")
            if not all(map(math.isfinite, getattr(self, name))):
                raise ValueError(f"image {name} must be finite, got {getattr(self, name)}")
        if not all(self.std):
            raise ValueError(f"image std must not be zero, got {self.std}")
        if self.background_color is None:
            color = tuple(int(mean * 255) for mean in self.mean)
            if not all(0 <= channel <= 255 for channel in color):
                raise ValueError(f"image mean {self.mean} gives no valid background color; set background_color")
            object.__setattr__(self, "background_color", color)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], image_size: int = 384) -> ImageSettings:
        """Settings of a parsed preprocessor_config.json; missing keys get `image_size` and the defaults.

        Reads the reference's `image_size` and the `size` of transformers' port. ValueError if a value is invalid, or a
        step is switched off or done another way: the model was not trained on such pixels.
        """
        fields = Fields(raw)
        for step in ("do_resize", "do_rescale", "do_pad", "do_convert_rgb"):
            if not fields.flag(step, True, null=True):
                raise ValueError(f"{step} is false; images without that step are not supported")
        if fields.integer("resample", 0, 5, _BICUBIC, null=True) != _BICUBIC:
            raise ValueError(f"resample is {raw['resample']}; only {_BICUBIC} (bicubic) is supported")
        size, key = fields, "image_size" if raw.get("image_size") is not None else "size"
        if isinstance(raw.get(key), dict):
            size, key = fields.block(key), "height"
        found: dict[str, Any] = {"image_size": size.integer(key, 1, _MOST_PIXELS, image_size, null=True)}
        found["mean"] = fields.triple("image_mean", -_FAR, _FAR, float)
        found["std"] = fields.triple("image_std", 1 / _FAR, _FAR, float)
        found["background_color"] = fields.triple("background_color", 0, 255, int)
        if raw.get("min_size") is not None:
            found["min_size"] = fields.integer("min_size", 1, _MOST_PIXELS)
        if raw.get("rescale_factor") is not None:
            found["rescale_factor"] = fields.number("rescale_factor", 1 / _FAR, _FAR)
        if raw.get("do_normalize") is not None:
            found["do_normalize"] = fields.flag("do_normalize")
        return cls(**{name: value for name, value in found.items() if value is not None})


# ---------------------------------------------------------------- understanding


def understanding_pixels_uint8(image: ImageSource, settings: ImageSettings) -> np.ndarray:
    """uint8 [S, S, 3] with S = `settings.image_size`: long side scaled to S, centered on the background color.

    Bit-exact with `VLMImageProcessor.resize` (transposed): side lengths are truncated, never below `min_size`, and the
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

    The short side is scaled to `image_size` and the middle of the long side is kept (Janus-Pro report, section 3.1).
    """
    image = open_image(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Cropping inside the resize bounds memory for a very long image; the filter still sees pixels outside the crop.
    box = (left, top, left + side, top + side)
    square = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square, dtype=np.float32) / 127.5 - 1


def to_uint8(images: Any) -> np.ndarray:
    """`images`, a float array in [-1, 1] of any shape, as uint8: clip((x + 1) / 2 * 255, 0, 255), truncated.

    Reference: generation_inference.py. ValueError on NaN.

    >>> to_uint8([-1.5, 0, 1])
    array([  0, 127, 255], dtype=uint8)
    """
    scaled = (np.asarray(images, dtype=np.float32) + 1) / 2 * 255
    if np.isnan(scaled).any():
        raise ValueError("the images contain NaN: the model that made them overflowed, or its weights are damaged")
    return np.clip(scaled, 0, 255).astype(np.uint8)


def contact_sheet(images: Sequence[ImageSource], columns: int | None = None, gap: int = 0) -> Image.Image:
    """One image showing `images` row by row in `columns` (about square by default), `gap` pixels apart on white.

    ValueError if there are no images, or less than one column.
    """
    opened = [open_image(image) for image in images]
    if not opened:
        raise ValueError("a contact sheet needs at least one image")
    if columns is None:
        columns = math.ceil(math.sqrt(len(opened)))
    if columns < 1:
        raise ValueError(f"a contact sheet needs at least one column, got {columns}")
    columns = min(columns, len(opened))
    rows = math.ceil(len(opened) / columns)
    width, height = max(image.width for image in opened), max(image.height for image in opened)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _WHITE)
    for index, image in enumerate(opened):
        row, column = divmod(index, columns)
        left = column * (width + gap) + (width - image.width) // 2
        sheet.paste(image, (left, row * (height + gap) + (height - image.height) // 2))
    return sheet
