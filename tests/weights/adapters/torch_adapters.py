"""Adapters that PEFT makes on transformers' port, with random numbers in every part."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import numpy as np
import pytest

DECODER = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
EVERY = (
    DECODER
    + r"|lm_head|model\.(generation_head\.(proj_out|vision_head)|(generation_)?aligner\.(fc1|hidden_layers\.\d+))"
    r"|model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|projection_layer)|mlp\.fc[12])"
)
# Of PEFT's LoraConfig, by what they try.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": EVERY},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": EVERY},
    "patterns": {
        "r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": DECODER,
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 7}, "alpha_pattern": {"up_proj": 11},
    },
    "saved": {
        "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["generation_head.vision_head", "lm_head", "generation_embeddings", "norm"],
    },
    "some": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": r".*language_model\.layers\.1\.mlp\.up_proj"},
}  # fmt: skip


def peft_model(torch_model: Any, kind: str, seed: int = 1) -> Any:
    """PEFT's wrapper of a copy of the port, with every number of the adapter random."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    wrapped = peft.get_peft_model(copy.deepcopy(torch_model), peft.LoraConfig(**KINDS[kind])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0, 0.3 * parameter.shape[-1] ** -0.5, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4, generator=generator))
            elif "modules_to_save" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    return wrapped


def saved(wrapped: Any, folder: pathlib.Path) -> pathlib.Path:
    wrapped.save_pretrained(folder)
    return folder


def inputs(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """A row of text with one image in front, and the codes of another."""
    rng = np.random.default_rng(seed)
    c, patches, size = config.language, config.vision.num_patches, config.vision.image_size
    ids = np.concatenate([np.full(patches, c.vocab_size - 1), rng.integers(0, c.vocab_size - 1, 9)])[None]
    pixels = rng.standard_normal((1, size, size, 3)).astype(np.float32)
    codes = rng.integers(0, config.gen_vision.codebook_size, (1, 5))
    return {"ids": ids, "pixels": pixels, "codes": codes}


def torch_logits(oracle: Any, torch_model: Any, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The port's text logits of a prompt with an image, and image logits along a row of codes."""
    text = oracle.text_logits(torch_model, given["ids"], np.ones_like(given["ids"]), given["pixels"])
    x = oracle.embed_codes(torch_model, given["codes"])
    return text, oracle.image_logits(torch_model, oracle.hidden(torch_model, x, np.ones_like(given["codes"])))
