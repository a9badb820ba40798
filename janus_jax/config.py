"""Model configurations: reads and writes both dialects of `config.json`, as the dataclasses of `sizes`.

The *original* dialect is that of the `deepseek-ai/*` checkpoints (`model_type: multi_modality`), extended by `custom`
blocks for models of any size; the *transformers* dialect is `model_type: janus`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from janus_jax.io import files
from janus_jax.io.fields import Fields, shown
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path
from janus_jax.sizes import (
    DECODER_ACTIVATION,
    IMAGE_CHANNELS,
    PRESETS,
    JanusConfig,
    LlamaConfig,
    SiglipConfig,
    VQConfig,
    check_size,
    get_preset,
    require,
)

__all__ = ["IMAGE_CHANNELS", "PRESETS", "JanusConfig", "LlamaConfig", "SiglipConfig", "VQConfig", "dialect_of"]
__all__ += ["get_preset", "original_config", "parse_config", "read_config", "transformers_config"]

_VQ16 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "z_channels": 256, "grid": 24}
# Optional keys of a `custom` gen_vision block; left out when they have these values.
_VQ_OPTIONAL = {"num_res_blocks": 2, "norm_groups": 32}
# The towers that the reference's siglip_vit.py knows by name.
_SIGLIP_NAMES = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0},
    "siglip_so400m_patch14_384": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}


# ---------------------------------------------------------------- reading config.json


def read_config(path: str | pathlib.Path) -> JanusConfig:
    """JanusConfig of a `config.json` file (or of a folder with one), in either dialect.

    Raises OSError if it is missing, ValueError if it is not a Janus configuration that is supported.
    """
    path = as_path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        name = one_line(path)
        raise FileNotFoundError(f"{name} does not exist; expected the config.json of a Janus checkpoint there")
    raw = files.read_json(path)
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from None


def dialect_of(raw: Any) -> str:
    """'original' or 'transformers', by the `model_type` of a parsed config.json."""
    model_type = raw.get("model_type") if isinstance(raw, Mapping) else None
    dialects = {"multi_modality": "original", "janus": "transformers"}
    if not isinstance(model_type, str) or model_type not in dialects:
        raise ValueError(
            f"model_type is {shown(model_type)}; "
            "a Janus config has 'multi_modality' (original) or 'janus' (transformers)"
        )
    return dialects[model_type]


def parse_config(raw: dict[str, Any]) -> JanusConfig:
    """JanusConfig of a parsed config.json in either dialect; ValueError names the bad value."""
    parse = _parse_original if dialect_of(raw) == "original" else _parse_transformers
    return parse(Fields(raw))


def _read_sizes(cls: type, block: Fields, keys: Mapping[str, str], **defaults: Any) -> dict[str, Any]:
    """Fields of the dataclass `cls`, read from `block` by `keys`; a key without an entry in `defaults` is required."""
    found = {}
    for field in dataclasses.fields(cls):
        if key := keys.get(field.name):
            value = block.get(key, defaults[field.name]) if field.name in defaults else block.get(key)
            check_size(field, value, block.name(key))
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def _only(block: Fields, key: str, known: str, usual: str | None = None):
    value = block.get(key, known if usual is None else usual)
    require(value == known, f"{block.name(key)} must be {known!r}, got {shown(value)}; nothing else is supported")


def parse_language(block: Fields) -> LlamaConfig:
    """The decoder that a LLaMA config.json, or the block of a Janus config, describes; ValueError if unsupported."""
    model_type = block.get("model_type", "llama")
    require(model_type == "llama", f"the language model must be 'llama', got {shown(model_type)}")
    # Missing keys have the LLaMA defaults of transformers, as in Janus-Pro-7B's config.
    rope = next((block.block(key) for key in ("rope_parameters", "rope_scaling") if block.raw.get(key)), Fields({}))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type == "default", f"rope type {shown(rope_type)} is not supported (only 'default')")
    _only(block, "hidden_act", DECODER_ACTIVATION, usual="silu")
    for bias in ("attention_bias", "mlp_bias"):
        require(not block.flag(bias, False, null=True), f"{bias} is set; Janus decoders have none")
    keys = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "mlp_dim": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "norm_eps": "rms_norm_eps",
        "max_positions": "max_position_embeddings",
    }
    usual = {"vocab_size": 32000, "width": 4096, "mlp_dim": 11008, "layers": 32, "heads": 32}
    sizes = _read_sizes(LlamaConfig, block, keys, **usual, norm_eps=1e-6, max_positions=2048)
    where = rope if "rope_theta" in rope.raw else block
    sizes |= _read_sizes(LlamaConfig, where, {"rope_theta": "rope_theta"}, rope_theta=10000.0)
    for field, key, value in (
        ("kv_heads", "num_key_value_heads", sizes["heads"]),
        ("head_dim", "head_dim", sizes["width"] // sizes["heads"]),
    ):
        given = {key: block.get(key, value, null=True)}
        sizes |= _read_sizes(LlamaConfig, Fields(given, block.place), {field: key})
    return LlamaConfig(**sizes)


def _mlp_depth(raw: Fields, name: str, input_dim: int, width: int) -> int:
    params = raw.block(f"{name}_config").block("params")
    kind = params.get("projector_type", "mlp_gelu")
    require(kind == "mlp_gelu", f"{name}: projector_type {shown(kind)} is not supported (only 'mlp_gelu')")
    given = params.get("input_dim")
    require(given == input_dim, f"{name}: input_dim must be its encoder's {input_dim}, got {shown(given)}")
    given = params.get("n_embed")
    require(given == width, f"{name}: n_embed must be the decoder's width {width}, got {shown(given)}")
    return _read_sizes(JanusConfig, params, {"aligner_depth": "depth"}, aligner_depth=1)["aligner_depth"]


def _dtype(*blocks: Fields) -> str:
    """The dtype in the first of `blocks` that has one, under either name of the key."""
    for block in blocks:
        for key in ("dtype", "torch_dtype"):
            if block.raw.get(key) is not None:
                return block.text(key)
    return "bfloat16"


def _same(keys: Mapping[str, Any] | tuple[str, ...]) -> dict[str, str]:
    return {key: key for key in keys}


def _parse_original(raw: Fields) -> JanusConfig:
    language = parse_language(raw.block("language_config"))

    params = raw.block("vision_config").block("params")
    name = params.text("model_name", "siglip_large_patch16_384")
    custom = ("patch_size", "width", "layers", "heads", "mlp_ratio")
    require(
        name == "custom" or name in _SIGLIP_NAMES,
        f"vision model_name {shown(name)} is unknown; known: custom, {', '.join(_SIGLIP_NAMES)}",
    )
    sizes: dict[str, Any] = dict(_SIGLIP_NAMES.get(name, {}))
    if name == "custom":
        sizes = _read_sizes(SiglipConfig, params, _same(custom))
    # select_layer counts from the end if it is not positive; layers after it are not in the checkpoint.
    select = params.integer("select_layer", -sizes["layers"], 1 << 20, -1)
    sizes["layers"] = min(sizes["layers"], sizes["layers"] + select + 1 if select <= 0 else select)
    feature = params.get("select_feature", "same")
    require(feature == "same", f"vision select_feature {shown(feature)} is not supported (only 'same')")
    vision = SiglipConfig(**sizes, **_read_sizes(SiglipConfig, params, _same(("image_size",))))

    block = raw.block("gen_vision_config")
    params = block.block("params")
    cls = block.text("cls", "VQ-16")
    require(cls in ("VQ-16", "custom"), f"gen_vision cls {shown(cls)} is unknown; known: VQ-16, custom")
    sizes = _VQ16
    if cls == "custom":
        sizes = _read_sizes(VQConfig, params, _same({**_VQ16, **_VQ_OPTIONAL}), **_VQ_OPTIONAL)
    keys = {"codebook_size": "image_token_size", "codebook_dim": "n_embed"}
    gen_vision = VQConfig(**sizes, **_read_sizes(VQConfig, params, keys))

    head = raw.block("gen_head_config").block("params")
    given = head.get("image_token_size")
    require(
        given == gen_vision.codebook_size,
        f"gen_head: image_token_size must be the codebook's {gen_vision.codebook_size}, got {shown(given)}",
    )
    given = head.get("n_embed")
    require(
        given == language.width, f"gen_head: n_embed must be the decoder's width {language.width}, got {shown(given)}"
    )
    return JanusConfig(
        vision=vision,
        gen_vision=gen_vision,
        language=language,
        aligner_depth=_mlp_depth(raw, "aligner", vision.width, language.width),
        gen_aligner_depth=_mlp_depth(raw, "gen_aligner", gen_vision.codebook_dim, language.width),
        **_read_sizes(JanusConfig, head, {"gen_head_width": "image_token_embed"}),
        dtype=_dtype(raw),
    )


_TRANSFORMERS_VISION = {
    "image_size": ("image_size", 384),
    "patch_size": ("patch_size", 16),
    "width": ("hidden_size", 1024),
    "layers": ("num_hidden_layers", 24),
    "heads": ("num_attention_heads", 16),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "norm_eps": ("layer_norm_eps", 1e-6),
}
_TRANSFORMERS_VQ = {
    "ch": ("base_channels", 128),
    "ch_mult": ("channel_multiplier", _VQ16["ch_mult"]),
    "num_res_blocks": ("num_res_blocks", 2),
    "z_channels": ("latent_channels", 256),
    "codebook_size": ("num_embeddings", 16384),
    "codebook_dim": ("embed_dim", 8),
}


def _read_table(cls: type, block: Fields, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    keys = {field: key for field, (key, _) in table.items()}
    return _read_sizes(cls, block, keys, **{field: default for field, (_, default) in table.items()})


def _parse_transformers(raw: Fields) -> JanusConfig:
    text, v, g = (raw.block(key) for key in ("text_config", "vision_config", "vq_config"))
    language = parse_language(text)
    _only(v, "hidden_act", "gelu")
    _only(g, "hidden_act", "gelu")
    qk_norm = v.flag("use_qk_norm", False, null=True)
    require(not qk_norm, "vision use_qk_norm is set; no Janus checkpoint has it and it is not supported")
    require(v.flag("attention_bias", True, null=True), "vision attention_bias is off; not supported")
    require(not g.flag("double_latent", False, null=True), "vq double_latent is set; not supported")
    for name, block in (("vision", v), ("vq", g)):
        width = block.get("projection_dim", 2048)
        require(
            width == language.width,
            f"{name} projection_dim must be the decoder's width {language.width}, got {shown(width)}",
        )
    vision = SiglipConfig(**_read_table(SiglipConfig, v, _TRANSFORMERS_VISION))
    # transformers ties the generated grid to the understanding grid, whatever num_patches says.
    gen_vision = VQConfig(**_read_table(VQConfig, g, _TRANSFORMERS_VQ), grid=vision.grid)
    return JanusConfig(
        vision=vision,
        gen_vision=gen_vision,
        language=language,
        **_read_table(JanusConfig, v, {"aligner_depth": ("depth", 2)}),
        **_read_table(JanusConfig, g, {"gen_aligner_depth": ("num_hidden_layers", 2)}),
        gen_head_width=language.width,
        dtype=_dtype(raw, text),
    )


# ---------------------------------------------------------------- writing config.json


def _require_vq_eps(g: VQConfig):
    require(g.norm_eps == 1e-6, f"no dialect can express a VQ norm eps of {g.norm_eps} (only 1e-6)")


def original_config(config: JanusConfig) -> dict[str, Any]:
    """`config` as a config.json of the original dialect; sizes that have no name there are written as `custom`."""
    v, g, t = config.vision, config.gen_vision, config.language
    _require_vq_eps(g)
    require(v.norm_eps == 1e-6, f"the original dialect cannot express a vision norm eps of {v.norm_eps} (only 1e-6)")
    sizes = {
        "patch_size": v.patch_size,
        "width": v.width,
        "layers": v.layers,
        "heads": v.heads,
        "mlp_ratio": v.mlp_ratio,
    }
    names = [name for name, known in _SIGLIP_NAMES.items() if known == sizes]
    vision = {
        "image_size": v.image_size,
        "model_name": names[0] if names else "custom",
        "select_feature": "same",
        "select_layer": -1,
        **({} if names else sizes),
    }
    vq_sizes = {key: getattr(g, key) for key in _VQ16}
    vq_sizes |= {key: getattr(g, key) for key, usual in _VQ_OPTIONAL.items() if getattr(g, key) != usual}
    vq: dict[str, Any] = {"image_token_size": g.codebook_size, "n_embed": g.codebook_dim}
    is_vq16 = vq_sizes == _VQ16
    if not is_vq16:
        vq |= {**vq_sizes, "ch_mult": list(g.ch_mult)}

    def projector(name: str, input_dim: int, depth: int) -> dict[str, Any]:
        params = {"depth": depth, "input_dim": input_dim, "n_embed": t.width, "projector_type": "mlp_gelu"}
        return {"cls": "MlpProjector", "model_type": name, "params": params}

    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": config.dtype,
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": vision},
        "aligner_config": projector("aligner", v.width, config.aligner_depth),
        "gen_vision_config": {"cls": "VQ-16" if is_vq16 else "custom", "model_type": "gen_vision", "params": vq},
        "gen_aligner_config": projector("gen_aligner", g.codebook_dim, config.gen_aligner_depth),
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": config.gen_head_width,
                "image_token_size": g.codebook_size,
                "n_embed": t.width,
            },
        },
        "language_config": {**_language_block(t), "torch_dtype": config.dtype},
    }


def transformers_config(config: JanusConfig, image_token_id: int) -> dict[str, Any]:
    """`config` as a config.json of the transformers dialect.

    `image_token_id` is the tokenizer's id of `<image_placeholder>`. ValueError for a model that transformers' port
    does not support.
    """
    v, g, t = config.vision, config.gen_vision, config.language
    _require_vq_eps(g)
    require(g.norm_groups == 32, f"the transformers dialect cannot express {g.norm_groups} VQ norm groups (only 32)")
    require(t.width % t.heads == 0, f"transformers needs a width ({t.width}) that is a multiple of its {t.heads} heads")
    require(config.gen_head_width == t.width, "the transformers dialect needs the image head as wide as the decoder")
    require(
        g.grid == v.grid, f"the transformers dialect needs the generated grid {g.grid} to equal the patch grid {v.grid}"
    )
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # the older name of the same key
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        "text_config": {**_language_block(t), "tie_word_embeddings": False},
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": v.width,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": v.norm_eps,
            "mlp_ratio": v.mlp_ratio,
            "attention_bias": True,
            "projection_dim": t.width,
            "depth": config.aligner_depth,
            "num_image_tokens": v.num_patches,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "base_channels": g.ch,
            "channel_multiplier": list(g.ch_mult),
            "num_res_blocks": g.num_res_blocks,
            "latent_channels": g.z_channels,
            "num_embeddings": g.codebook_size,
            "embed_dim": g.codebook_dim,
            "num_patches": g.grid,
            "projection_dim": t.width,
            "image_token_embed_dim": t.width,
            "num_hidden_layers": config.gen_aligner_depth,
            "hidden_act": "gelu",
        },
    }


def _language_block(t: LlamaConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": t.width,
        "intermediate_size": t.mlp_dim,
        "hidden_act": DECODER_ACTIVATION,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.max_positions,
        "rms_norm_eps": t.norm_eps,
        "rope_theta": t.rope_theta,
    }
