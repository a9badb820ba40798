"""transformers' port of Janus, to measure against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.common import device as _device

if TYPE_CHECKING:
    from janus_jax.config import JanusConfig


def build(preset: str | JanusConfig, dtype: str) -> Any:
    """The port of a preset, or of other sizes, with random weights; on a GPU if torch has one."""
    import torch
    import transformers

    from janus_jax.config import get_preset, transformers_config

    transformers.logging.set_verbosity_error()
    sizes = get_preset(preset) if isinstance(preset, str) else preset
    raw = transformers_config(sizes, image_token_id=0)
    config = transformers.JanusConfig(**{k: v for k, v in raw.items() if k not in ("model_type", "torch_dtype")})
    with torch.device("meta"):
        model = transformers.JanusForConditionalGeneration(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    # Buffers have no values after to_empty: they are made again as the modules make them.
    rotary, embeddings = model.model.language_model.rotary_emb, model.model.vision_model.embeddings
    model.model.language_model.rotary_emb = type(rotary)(config.text_config)
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(_device.random_array(parameter.shape)))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until `call()` is done on the device too, and its result."""
    import torch

    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result
