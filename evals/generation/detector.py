"""Mask2Former and CLIP of transformers in the places of GenEval's detector and classifier of colors.

The arithmetic is that of the original's libraries (mmdet 2.x and open_clip), which transformers' processors do not do:
pictures scaled to a short side of 800, mask logits resized to the picture and cut at 0, a score that is the class's
probability times the mask's mean one, boxes from masks. The weights are not the original's: transformers has those of
Mask2Former's release, mmdet trained its own. Scores at a threshold of 0.9 shift, so figures carry the label `LABEL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evals.generation.geneval import CLASSES, COLORS, Detection, box_of, color_crop, color_texts
from janus_jax.io.messages import one_line

LABEL = "transformers' Mask2Former and CLIP, not GenEval's mmdet and open_clip"
DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
_SHORT, _LONG, _MULTIPLE = 800, 1333, 32
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_MOST = 100  # pairs of query and class
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Detector:
    """A Mask2Former for instances of COCO."""

    def __init__(self, model: Any):
        """`model` is a Mask2FormerForUniversalSegmentation. ValueError if it does not have COCO's 80 classes."""
        if (count := len(model.config.id2label)) != len(CLASSES):
            raise ValueError(f"the detector knows {count} classes, GenEval's are COCO's {len(CLASSES)}")
        self._model = model.eval()

    @classmethod
    def load(cls, path_or_hub_id: str) -> Detector:
        """From a folder or the Hub, on the GPU if there is one; ValueError in one line if that is not possible."""
        from transformers import Mask2FormerForUniversalSegmentation

        return cls(loaded_model(Mask2FormerForUniversalSegmentation, path_or_hub_id))

    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        """What is in `image`, by GenEval's names of classes: the 100 best pairs of a mask and a class."""
        import torch

        pixels = detector_pixels(image)
        padded = [-(-size // _MULTIPLE) * _MULTIPLE for size in pixels.shape[:2]]
        whole = np.zeros((*padded, 3), np.float32)
        whole[: pixels.shape[0], : pixels.shape[1]] = pixels
        model = self._model
        with torch.no_grad():
            values = torch.from_numpy(whole).permute(2, 0, 1)[None].to(model.device, model.dtype)
            out = model(pixel_values=values)
            classes, masks = out.class_queries_logits[0].float(), out.masks_queries_logits[0].float()
            masks = _resized(masks, padded)[:, : pixels.shape[0], : pixels.shape[1]]
            return detections(classes, _resized(masks, image.size[::-1]))


def detector_pixels(image: Image.Image) -> np.ndarray:
    """The picture as the detector takes it, float32 [h, w, 3]: the short side 800, but the long one at most 1333."""
    width, height = image.size
    scale = min(_LONG / max(width, height), _SHORT / min(width, height))
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    scaled = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), np.float32)
    return (scaled - np.float32(_MEAN)) / np.float32(_STD)


def _resized(masks: Any, size: Sequence[int]) -> Any:
    import torch

    return torch.nn.functional.interpolate(masks[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def detections(classes: Any, masks: Any) -> dict[str, list[Detection]]:
    """From logits of classes [Q, 81], the last of which is none, and of masks [Q, H, W] at the picture's size."""
    probabilities = classes.softmax(-1)[:, :-1]
    count = min(_MOST, probabilities.numel())
    scores, order = probabilities.flatten().topk(count)
    queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
    there = masks > 0
    means = (masks.sigmoid() * there).flatten(1).sum(1) / (there.flatten(1).sum(1) + 1e-6)
    scores = (scores * means[queries]).cpu().numpy()
    found: dict[str, list[Detection]] = {}
    binary = {int(query): there[query].cpu().numpy() for query in set(queries.tolist())}
    for score, query, label in zip(scores, queries.tolist(), labels.tolist(), strict=True):
        mask = binary[query]
        found.setdefault(CLASSES[label], []).append(Detection(box_of(mask), float(score), mask))
    return found


class ColorClassifier:
    """CLIP as the classifier of an object's color."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model, self._tokenizer = model.eval(), tokenizer
        self._of_class: dict[str, Any] = {}

    @classmethod
    def load(cls, path_or_hub_id: str) -> ColorClassifier:
        """From a folder or the Hub; ValueError in one line if that is not possible."""
        from transformers import AutoTokenizer, CLIPModel

        model = loaded_model(CLIPModel, path_or_hub_id)
        return cls(model, loaded(AutoTokenizer, path_or_hub_id))

    def __call__(self, image: Image.Image, name: str, objects: Sequence[Detection]) -> list[str]:
        """The color of each of these objects of the class `name`; of equal ones the first of `COLORS`."""
        import torch

        model, size = self._model, self._model.config.vision_config.image_size
        pixels = np.stack([clip_pixels(color_crop(image, each), size) for each in objects])
        with torch.no_grad():
            values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(model.device, model.dtype)
            seen = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)
            alike = _unit(seen.float()) @ self._classifier(name).T
        return [COLORS[index] for index in alike.argmax(1).tolist()]

    def _classifier(self, name: str) -> Any:
        """Unit vectors [colors, D]."""
        import torch

        if name not in self._of_class:
            rows = []
            for texts in color_texts(name):
                tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
                asked = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
                said = self._model.text_projection(self._model.text_model(**asked).pooler_output)
                rows.append(_unit(_unit(said.float()).mean(0)))
            self._of_class[name] = torch.stack(rows)
        return self._of_class[name]


def clip_pixels(image: Image.Image, size: int) -> np.ndarray:
    """A crop as CLIP takes it, float32 [size, size, 3]: the short side scaled to `size`, then the middle."""
    width, height = image.size
    short = max(min(width, height), 1)
    scaled = (max(int(size * width / short), 1), max(int(size * height / short), 1))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    square = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (square - np.float32(_CLIP_MEAN)) / np.float32(_CLIP_STD)


def _unit(vectors: Any) -> Any:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def loaded(kind: Any, path_or_hub_id: str, **how: Any) -> Any:
    """`kind.from_pretrained` of a config, tokenizer or processor; ValueError in one line if that is not possible."""
    try:
        return kind.from_pretrained(path_or_hub_id, **how)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"{one_line(path_or_hub_id)} cannot be loaded: {one_line(error)}") from None


def loaded_model(kind: Any, path_or_hub_id: str) -> Any:
    """`kind.from_pretrained` of a model, on the GPU if there is one.

    ValueError in one line if that is not possible, or weights are missing, which transformers would draw at random.
    """
    import torch

    model, found = loaded(kind, path_or_hub_id, output_loading_info=True)
    # Buffers and shared weights are made, not drawn.
    if missing := sorted(set(found["missing_keys"]) & dict(model.named_parameters()).keys()):
        raise ValueError(f"{one_line(path_or_hub_id)} lacks {len(missing):,} weights, such as {one_line(missing[0])}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
