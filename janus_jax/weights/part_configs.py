"""Compares the config.json next to a part's own file with the model that the part is read for.

Shapes show widths and depths. Everything else that determines what the parameters mean (positions, activations, heads,
norms, windows) is only in config.json; a part is refused if any of it differs from what this model does.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from janus_jax.config import JanusConfig, parse_language
from janus_jax.io.fields import Fields, shown
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import one_line

# Keys of LLaMA's relatives, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "rotary_pct": (None, 1, 1.0),
    "use_sliding_window": (None, False),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "qkv_bias": (None, False),
    "use_bias": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "scale_emb": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "quantization_config": (None,),
    "num_local_experts": (None,),
    "num_experts": (None,),
}
_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

_TIMM_SIGLIP = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip(?:_gap)?_(\d+)(?:\.\w+)?")
_TIMM_SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16), "so400m": (1152, 27, 16)}  # width, layers, heads
_TIMM_TANH = re.compile(r"vit_(base_patch32_|large_patch16_siglip(_gap)?_512|so400m_patch16_|giantopt_)")
_TIMM_IDLE = {
    "class_token",
    "global_pool",
    "fc_norm",
    "num_classes",
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
}


def check_config(folder: pathlib.Path, config: JanusConfig, part: str) -> bool:
    """Compares `folder`'s config.json, if there is one, with the `part` of `config`.

    Returns: whether it ties the head to the embedding (only a LLaMA's can).
    Raises: ValueError, in one line, listing all differences, or for another kind of model.
    """
    path = folder / "config.json"
    if not path.exists():
        return False
    raw = read_json_object(path)
    check = {"language_model": _check_language, "vision_model": _check_vision, "gen_vision_model": _check_vq}[part]
    try:
        differing = check(raw, config)
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from None
    if differing:
        differences = "; ".join(
            f"{key} is {shown(theirs)}, the run's model has {shown(ours)}" for key, theirs, ours in differing
        )
        raise ValueError(
            f"{one_line(path)} describes another model: {differences}; set model.* of the run, or use another source"
        )
    return part == "language_model" and raw.get("tie_word_embeddings") is True


Differing = list[tuple[str, Any, Any]]


def _differing(found: Any, wanted: Any, *ignored: str) -> Differing:
    pairs = ((f.name, getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(wanted))
    return [(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours and name not in ignored]


def differing_part(found: JanusConfig, wanted: JanusConfig, part: str) -> Differing:
    """(key, found, wanted) for differences that make the `part` compute something else from the same parameters."""
    if part == "language_model":
        return _differing(found.language, wanted.language, "max_positions")  # no parameter depends on positions
    if part == "vision_model":
        return _differing(found.vision, wanted.vision)
    return _differing(found.gen_vision, wanted.gen_vision, "grid")  # or on the size of an image


def _check_language(raw: Mapping[str, Any], config: JanusConfig) -> Differing:
    kind = raw.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ValueError(f"model_type must be 'llama' or 'mistral' for a Janus decoder, got {shown(kind)}")
    raw = {**(_MISTRAL if kind == "mistral" else {}), **raw, "model_type": "llama"}
    if raw.get("hidden_act") == "swish":  # its other name
        raw["hidden_act"] = "silu"
    blocks = [raw, *(raw[key] for key in ("rope_parameters", "rope_scaling") if isinstance(raw.get(key), Mapping))]
    for block in blocks:
        for key, neutral in _NEUTRAL.items():
            value = block.get(key)
            if not any(type(value) is type(known) and value == known for known in neutral):
                raise ValueError(f"{key} is {shown(value)}, which Janus decoders do not support")
    for block in blocks[1:]:
        if any(isinstance(value, Mapping) for value in block.values()):
            raise ValueError("its layers have several kinds of rotary embeddings, which Janus decoders do not support")
    window = raw.get("sliding_window")
    if window is not None and not (type(window) is int and window >= config.language.max_positions):
        raise ValueError(
            f"sliding_window is {shown(window)}: it would limit attention within the {config.language.max_positions} "
            "positions of the run's model"
        )
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError("layer_types has layers without full attention, which Janus decoders do not support")
    return _differing(parse_language(Fields(raw)), config.language, "max_positions")


def _check_vision(raw: Mapping[str, Any], config: JanusConfig) -> Differing:
    v, name = config.vision, raw.get("architecture")
    if not isinstance(name, str):
        kind = f"model_type is {shown(raw['model_type'])}" if "model_type" in raw else "there is no architecture"
        raise ValueError(f"{kind}; vision_from needs a SigLIP from timm, such as vit_large_patch16_siglip_384.webli")
    match = _TIMM_SIGLIP.fullmatch(name)
    if not match:
        raise ValueError(f"architecture must be a SigLIP of timm's (vit_*_patch*_siglip_*), got {shown(name)}")
    if _TIMM_TANH.match(name):
        raise ValueError(f"architecture {shown(name)} has the activation 'gelu_tanh', Janus has 'gelu'")
    width, layers, heads = _TIMM_SIZES.get(match[1], (v.width, v.layers, None))
    found = {"width": width, "layers": layers, "heads": heads, "patch_size": int(match[2]), "image_size": int(match[3])}
    found |= {"norm_eps": 1e-6}
    given, data = (Fields(raw.get(key) or {}, key) for key in ("model_args", "pretrained_cfg"))
    size = data.get("input_size", [3, int(match[3]), int(match[3])], null=True)
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise ValueError(f"pretrained_cfg.input_size must be that of square RGB images, got {shown(size)}")
    found["image_size"] = size[1]
    for key in ("mean", "std"):
        if any(value != 0.5 for value in data.triple(key, -1e3, 1e3, float) or ()):
            raise ValueError(f"pretrained_cfg.{key} must be 0.5 for R, G and B, got {shown(data.get(key))}")
    names = {"img_size": "image_size", "embed_dim": "width", "depth": "layers", "num_heads": "heads"}
    for key, value in given.raw.items():
        if key in names or key in ("patch_size", "mlp_ratio"):
            found[names.get(key, key)] = value
        elif key == "act_layer" and value not in (None, "gelu"):
            raise ValueError(f"model_args.act_layer is {shown(value)}, Janus has 'gelu'")
        elif key == "class_token" and value is not False:
            raise ValueError("model_args.class_token is set, which Janus's encoder does not support")
        elif key not in _TIMM_IDLE and key != "act_layer" and value is not None:
            raise ValueError(f"model_args.{one_line(key, 40)} is {shown(value)}, which is not supported")
    if found["heads"] is None:
        raise ValueError(f"architecture {shown(name)} needs model_args.num_heads to say how many heads it has")
    return [(key, value, getattr(v, key)) for key, value in found.items() if value != getattr(v, key)]


def _check_vq(raw: Mapping[str, Any], config: JanusConfig) -> Differing:
    g = config.gen_vision
    block = raw.get("config") if isinstance(raw.get("config"), Mapping) else raw
    if "codebook_embed_dim" not in block and "codebook_size" not in block:
        kind = next((f"{key} is {shown(raw[key])}" for key in ("_class_name", "model_type") if key in raw), "")
        raise ValueError(f"{kind or 'there is no codebook_size'}; vq_from needs LlamaGen's VQ-16")
    usual = {"codebook_size": 16384, "codebook_embed_dim": 8, "z_channels": 256, "codebook_l2_norm": True}
    usual |= {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]}
    wanted = {"codebook_size": g.codebook_size, "codebook_embed_dim": g.codebook_dim, "z_channels": g.z_channels}
    wanted |= {"codebook_l2_norm": True, "encoder_ch_mult": list(g.ch_mult), "decoder_ch_mult": list(g.ch_mult)}
    found = {key: block.get(key, usual[key]) for key in wanted}
    differing = [(key, found[key], wanted[key]) for key in wanted if found[key] != wanted[key]]
    return differing + [("norm_groups", 32, g.norm_groups)] * (g.norm_groups != 32)
