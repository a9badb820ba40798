"""One part of Janus in a file of its own: the encoders and decoders that a Janus is first put together from.

Names are those of the original dialect without the part's prefix, which are the names of the parts' own homes: timm's
SigLIP (`vision_model`), LlamaGen's VQ-16 (`gen_vision_model`) and a LLaMA such as DeepSeek-LLM (`language_model`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from janus_jax.config import JanusConfig
from janus_jax.safetensors_files import write_safetensors
from janus_jax.torch_files import open_file, open_tensors
from janus_jax.torch_names import Slot, slots
from janus_jax.torch_weights import DTYPES, LazyArray, LazyParams, leaves_of, tensors_of

PREFIXES = {
    "vision_model": "vision_model.vision_tower.",
    "gen_vision_model": "gen_vision_model.",
    "language_model": "language_model.",
}


def open_part(path: pathlib.Path, config: JanusConfig, part: str) -> LazyParams:
    """The parameters of `part`, a key of PREFIXES, still in their file.

    Args:
      path: a .safetensors, .bin, .pt or .pth file, or a folder with model.safetensors or pytorch_model.bin. Tensors
        that the part has no use for (pooling heads, optimizer states) are left alone.
    Raises: FileNotFoundError where there is no such file, ValueError naming all tensors that are missing or misshapen.
    """
    tensors = open_tensors(path) if path.is_dir() else open_file(path)
    filled = _slots(config, part)
    problems = []
    for slot in {slot.name: slot for slot in filled}.values():  # q, k and v share a tensor
        found = tensors.get(slot.name)
        if found is None:
            problems.append(f"missing: {slot.name} {list(slot.tensor_shape)}")
        elif found.shape != slot.tensor_shape:
            problems.append(f"misshapen: {slot.name} is {list(found.shape)}, expected {list(slot.tensor_shape)}")
        elif found.dtype not in DTYPES.values():
            problems.append(f"unsupported: {slot.name} is {found.dtype}, expected {', '.join(DTYPES)}")
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"{path} does not hold the {part} of this model: {shown}")
    return leaves_of(filled, tensors)


def write_part(path: pathlib.Path, config: JanusConfig, part: str, params: dict[str, Any]):
    """Writes `params`, the subtree of `part`, as the safetensors file that `open_part` reads."""
    leaves = {}
    for below, array in traverse_util.flatten_dict(params).items():
        array = np.asarray(array)
        leaves[(part, *below)] = LazyArray(array.shape, array.dtype, array.__getitem__)
    write_safetensors(path, tensors_of(_slots(config, part), leaves))


def _slots(config: JanusConfig, part: str) -> list[Slot]:
    prefix = PREFIXES[part]
    return [
        dataclasses.replace(slot, name=slot.name.removeprefix(prefix))
        for slot in slots(config, "original")
        if slot.path[0] == part
    ]
