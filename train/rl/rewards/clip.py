"""How well a picture fits its prompt, by CLIP and by models that were trained from it to people's choices.

All are transformers' CLIPModel, on the GPU if torch has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from janus_jax.io.messages import one_line
from train.rl.rewards.functions import Metadata, needs_torch

LAION, PICKSCORE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "yuvalkirstain/PickScore_v1"


class ClipScore:
    """The cosine of a picture's vector and its prompt's, from -1 to 1.

    Args:
      model: a CLIPModel's folder or hub id, such as openai/clip-vit-large-patch14.
      processor: whose tokenizer and preprocessing are used; default the model's own.
      device: torch's; default the GPU if there is one.
    Raises: ValueError in one line if they cannot be loaded.
    """

    def __init__(self, model: str, processor: str | None = None, device: str | None = None):
        needs_torch()
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        from evals.generation.detector import loaded, loaded_model

        self._tokenizer = loaded(AutoTokenizer, processor or model)
        self._preprocess = loaded(AutoImageProcessor, processor or model)
        self._model = loaded_model(CLIPModel, model).eval()
        if device is not None:
            self._model = self._model.to(device)

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `train.rl.rewards`; float64 [N]."""
        import torch
        from PIL import Image

        model = self._model
        length = model.config.text_config.max_position_embeddings
        text = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(model.device)  # fmt: skip
        pixels = self._preprocess([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        with torch.no_grad():
            values = pixels["pixel_values"].to(model.device, model.dtype)
            seen = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)
            asked = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
            said = model.text_projection(model.text_model(**asked).pooler_output)
            cosines = torch.nn.functional.cosine_similarity(seen.float(), said.float())
        return cosines.double().cpu().numpy()


class PickScore(ClipScore):
    """PickScore: a cosine times the model's own scale, about 20; trained on the choices of Pick-a-Pic."""

    def __init__(self, model: str = PICKSCORE, processor: str = LAION, device: str | None = None):
        super().__init__(model, processor, device)
        self._scale = float(self._model.logit_scale.detach().exp())

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `train.rl.rewards`; float64 [N]."""
        return self._scale * super().__call__(pictures, prompts, metadata)


class HPSv2(ClipScore):
    """HPSv2: a cosine, about 0.3; trained on the choices of HPD.

    Args:
      weights: its file, HPS_v2.1_compressed.pt of huggingface.co/xswu/HPSv2, which has open_clip's names.
      model: a CLIPModel of the same sizes, whose tokenizer and preprocessing are used.
      device: torch's; default the GPU if there is one.
    Raises: ValueError in one line if they cannot be loaded, or do not fit.
    """

    def __init__(self, weights: str, model: str = LAION, device: str | None = None):
        super().__init__(model, None, device)
        import torch

        told = one_line(weights)
        try:
            found = torch.load(weights, map_location="cpu", weights_only=True)
            tensors = named_by_transformers(found.get("state_dict", found))
        except FileNotFoundError:
            raise ValueError(f"{told} does not exist; download it from huggingface.co/xswu/HPSv2") from None
        except Exception as error:  # of pickle, zip files and others
            raise ValueError(f"{told} is not a file of CLIP weights ({one_line(error)})") from None
        expected = self._model.state_dict()
        ours = {name: expected[name] for name in expected if not name.endswith("position_ids")}
        wrong = [name for name, x in ours.items() if name not in tensors or tensors[name].shape != x.shape]
        if wrong or len(tensors) != len(ours):
            name = wrong[0] if wrong else min(set(tensors) - set(ours))
            raise ValueError(f"{told} does not fit {one_line(model)}: {one_line(name)} differs")
        self._model.load_state_dict(tensors, strict=False)


_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_IN_LAYER["attn.out_proj"] = "self_attn.out_proj"
_ELSEWHERE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def named_by_transformers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of open_clip's CLIP in transformers' names; ValueError for a name that is not known."""
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in _ELSEWHERE:
            made[_ELSEWHERE[name]] = tensor
        elif name in _TURNED:
            made[_TURNED[name]] = tensor.T
        elif layer := _LAYER.fullmatch(name):
            visual, number, inner = layer.groups()
            place = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
            stem, _, kind = inner.rpartition(".")
            if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = inner.removeprefix("attn.in_proj_")
                for part, own in zip("qkv", tensor.chunk(3), strict=True):
                    made[f"{place}self_attn.{part}_proj.{kind}"] = own
            elif stem in _IN_LAYER:
                made[f"{place}{_IN_LAYER[stem]}.{kind}"] = tensor
            else:
                raise ValueError(f"unknown name {name}")
        elif name != "attn_mask":  # open_clip's causal mask
            raise ValueError(f"unknown name {name}")
    return made
