"""Detects media in a sample that cannot be read, by explicit lists of field names and tags.

A text about a video, a sound or a region of an image, used without it, teaches a model to talk about what it does not
see. Such samples are dropped. Ordinary text is not: code within backticks is ignored, as are HTML's own tags, which
have attributes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from janus_jax.io.messages import one_line
from train.raw.readers import BadSample

# Fields that may contain a sample's images. `jpg` and the like are columns of img2dataset's and webdataset's tables.
PICTURE_FIELDS = ("image", "images", "jpg", "jpeg", "png", "webp")

_LONGEST = 60  # characters of a field's name
_ENDING = (
    r"(?:_?(?:paths?|files?|urls?|uris?|links?|lists?|bytes|b64|base64|data|names?|filenames?|src|contents?|inputs?))*"
)
_OTHER_FIELD = re.compile(
    rf"(?:[a-z]+_)?(?:videos?|audios?|movies?|mp4|webm|wav|mp3|flac|ogg|m4a){_ENDING}"
    r"|(?:speech|sound|voice|music)(?:_?(?:paths?|files?|urls?|bytes|data))+|point_?clouds?"
)
_PICTURE_FIELD = re.compile(
    rf"(?:[a-z]+_)?(?:images?|imgs?|pictures?|photos?|pics?|frames?){_ENDING}(?:_?\d+)?|file_names|medias?|multi_?media"
)
_TAG = re.compile(
    # Placeholders of media, bare or numbered: <video>, <image_1>, <img_start>, <audio_placeholder>, <bbox>, ...
    r"<(?:images?|imgs?|im|pictures?|photos?|videos?|vids?|audios?|speech|sounds?|bbox(?:es)?|rois?|vision|visual)"
    r"(?:[-_ ]?(?:place_?holder|tokens?|pad|patch|start|end|begin|features?|fea|emb(?:ed|eds|edding)?|here|content))?"
    r"[-_ ]?\d{0,6}/?>(?!\s*<(?:source|track|img|p|a|figcaption)\b)"
    # Regions of images: numbered, or followed by coordinates.
    r"|<(?:region|mask|box|obj|object|frame|point|loc|seg|patch_index)[-_ ]?\d{1,6}/?>|<region_fea>"
    r"|<(?:box|quad|poly|point|polygon)>(?=\s*[\[(<\d])"
    # Ordinary text does not look like this: <|image_1|>, <|vision_start|>, <|AUDIO|>, <|box_start|>, ...
    r"|<\|/?[a-z_]{0,30}(?:image|img|video|audio|vision|speech|box|quad|object_ref|ref|det|grounding)[a-z_]{0,30}\d*\|>",
    re.IGNORECASE,
)
_ORDINARY = re.compile(r"<im>|<visual>|<vision>", re.IGNORECASE)
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)


@functools.lru_cache(4096)
def _kind(name: str) -> str:
    """'image' for an image field that is read, 'alias' for one that is not, 'other' for other media, '' otherwise."""
    if name in PICTURE_FIELDS:
        return "image"
    if _OTHER_FIELD.fullmatch(name.lower()):
        return "other"
    return "alias" if _PICTURE_FIELD.fullmatch(name.lower()) else ""


def is_media_field(name: str) -> bool:
    """Whether a field of this name contains media, read or not."""
    return len(name) <= _LONGEST and _kind(name) != ""


def refuse_media_fields(fields: Mapping[str, Any], has_pictures: bool, place: str, where: str = ""):
    """BadSample if `fields` name media that are not read: videos and sounds; images under another name.

    If there is an image that is read, a single further URL or name is assumed to be of that image, but a list is not.
    """
    for name, value in fields.items():
        if not value or len(name) > _LONGEST or not isinstance(value, str | bytes | list | dict):
            continue
        kind = _kind(name)
        if kind == "other":
            raise BadSample("unsupported_media", place, f"{where}the field {name}: only images are supported")
        if kind == "alias" and (isinstance(value, list) or not has_pictures):
            detail = f"{where}the field {name} seems to contain an image, but only image or images is read; rename it"
            raise BadSample("unknown_image_field", place, detail)


def refuse_media_tags(text: str, known: tuple[str, ...], place: str, where: str = ""):
    """BadSample if `text` contains a media tag other than those `known`, outside of code."""
    if not _unknown(text, known):
        return
    if tag := _unknown(_CODE.sub(" ", text), known):
        detail = f"{where}{one_line(tag, 40)} refers to something that is not supported"
        raise BadSample("media_tag", place, detail)


def _unknown(text: str, known: tuple[str, ...]) -> str | None:
    if "<" not in text:
        return None
    for match in _TAG.finditer(text):
        tag, begin = match[0], match.start()
        generic = begin and text[begin - 1].isalnum() and tag[1].isupper()  # List<Image> is a type
        if tag not in known and not generic and not _ORDINARY.fullmatch(tag):
            return tag
    return None
