"""One part of Janus in a separate file: the encoders and decoders from which a Janus is first assembled.

Names are those of the original dialect without the part's prefix, as in the projects that the parts come from: timm's
SigLIP (`vision_model`), LlamaGen's VQ-16 (`gen_vision_model`) and a LLaMA such as DeepSeek-LLM (`language_model`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
from flax import traverse_util

from janus_jax.config import JanusConfig
from janus_jax.io.messages import one_line
from janus_jax.weights.formats.safetensors_files import write_safetensors
from janus_jax.weights.formats.torch_files import WEIGHT_FILES, Note, open_file, open_tensors
from janus_jax.weights.mismatch import summary
from janus_jax.weights.part_configs import check_config
from janus_jax.weights.torch_names import Slot, is_harmless, slots
from janus_jax.weights.torch_weights import LazyArray, LazyParams, compare, leaves_of, tensors_of

PREFIXES = {
    "vision_model": "vision_model.vision_tower.",
    "gen_vision_model": "gen_vision_model.",
    "language_model": "language_model.",
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# Tensors in the parts' own files that this model does not use.
_UNUSED = {
    "vision_model": re.compile(r"(attn_pool|head|fc_norm)\."),
    "gen_vision_model": re.compile(r"quantize\.codebook_used$"),
    "language_model": re.compile(r"$^"),
}


def open_part(path: pathlib.Path, config: JanusConfig, part: str, note: Note = lambda text: None) -> LazyParams:
    """The parameters of `part`, a key of PREFIXES, as lazy arrays still in their file.

    Args:
      path: a .safetensors, .bin, .pt or .pth file, or a folder with model.safetensors or pytorch_model.bin. The
        folder's config.json has to agree with `config`. Pooling heads, usage counts and buffers are ignored.
      note: called with a sentence that says which of several sets of weights in a file is read.
    Raises: FileNotFoundError if there is no such file, ValueError if config.json describes another model, or for
      tensors that are missing, misshapen, or not used by the part, such as biases and extra layers.
    """
    folder = path if path.is_dir() else path.parent
    is_tied = False
    if path.is_dir() or path.name in WEIGHT_FILES:  # a file of another name may have nothing to do with config.json
        is_tied = check_config(folder, config, part)
    tensors = open_tensors(path, note) if path.is_dir() else open_file(path, note)
    filled = _slots(config, part)
    unused = _UNUSED[part]
    if is_tied:
        # As transformers does, even if the file has a head.
        filled = [dataclasses.replace(s, name=_EMBEDDING) if s.name == _HEAD else s for s in filled]
        unused = re.compile(re.escape(_HEAD) + "$")
    expected = {slot.name: slot.tensor_shape for slot in filled}
    if problems := compare(tensors, expected, {}, lambda name: is_harmless(name) or bool(unused.match(name))):
        raise ValueError(f"{one_line(path)} does not contain the {part} of this model: {summary(problems)}")
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
