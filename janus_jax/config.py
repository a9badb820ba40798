"""Model configurations: frozen dataclasses, presets, and both `config.json` dialects.

The *original* dialect is what `deepseek-ai/*` checkpoints carry (`model_type: multi_modality`), extended by
`custom` blocks for models of any size; the *transformers* dialect is `model_type: janus`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

IMAGE_CHANNELS = 3
_DTYPES = ("bfloat16", "float16", "float32")
_VQ16 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "z_channels": 256, "grid": 24}
# What a `custom` gen_vision block may say as well; left out where it is this.
_VQ_OPTIONAL = {"num_res_blocks": 2, "norm_groups": 32}
# The towers that the reference's siglip_vit.py knows by name.
_SIGLIP_NAMES = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0},
    "siglip_so400m_patch14_384": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}


def _require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


class _Sizes:
    """Checks what a config.json may hold: every size is a whole number from 1, every other number is above 0."""

    def __post_init__(self):
        part = type(self).__name__.removesuffix("Config")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                good, wanted = type(value) in (int, float) and 0 < value < float("inf"), "a number above 0"
            elif field.type == "int":
                good, wanted = type(value) is int and value > 0, "a whole number from 1"
            else:
                good = len(value) > 0 and all(type(size) is int and size > 0 for size in value)
                wanted = "whole numbers from 1"
            _require(good, f"{part} {field.name} is {value!r}, not {wanted}")


@dataclasses.dataclass(frozen=True)
class SiglipConfig(_Sizes):
    """Understanding encoder (reference: janus/models/siglip_vit.py)."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_dim(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class VQConfig(_Sizes):
    """Generation tokenizer (reference: janus/models/vq_model.py, LlamaGen's VQ-16)."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    grid: int = 24
    norm_groups: int = 32
    norm_eps: float = 1e-6

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        return self.grid * self.downsampling

    @property
    def num_tokens(self) -> int:
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class LlamaConfig(_Sizes):
    """Decoder (reference: transformers' LlamaForCausalLM inside MultiModalityCausalLM)."""

    vocab_size: int = 102400
    width: int = 2048
    mlp_dim: int = 5632
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 16384


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """A whole Janus model; `dtype` is the checkpoint's own parameter dtype."""

    vision: SiglipConfig = SiglipConfig()
    gen_vision: VQConfig = VQConfig()
    language: LlamaConfig = LlamaConfig()
    aligner_depth: int = 2
    gen_aligner_depth: int = 2
    gen_head_width: int = 2048
    dtype: str = "bfloat16"

    def __post_init__(self):
        v, g, t = self.vision, self.gen_vision, self.language
        for name in ("aligner_depth", "gen_aligner_depth", "gen_head_width"):
            value = getattr(self, name)
            _require(type(value) is int and value > 0, f"{name} is {value!r}, not a whole number from 1")
        _require(self.dtype in _DTYPES, f"dtype is {self.dtype!r}; known: {', '.join(_DTYPES)}")
        _require(v.width % v.heads == 0, f"vision width {v.width} is not a multiple of its {v.heads} heads")
        _require(
            v.image_size >= v.patch_size, f"vision image_size {v.image_size} is under its patch_size {v.patch_size}"
        )
        _require(
            t.heads % t.kv_heads == 0, f"{t.heads} attention heads are not a multiple of {t.kv_heads} key/value heads"
        )
        _require(t.head_dim % 2 == 0, f"head_dim {t.head_dim} is odd, which rotary embeddings cannot rotate")
        for mult in g.ch_mult:
            _require(
                (g.ch * mult) % g.norm_groups == 0,
                f"gen_vision channels {g.ch} x {mult} are not a multiple of {g.norm_groups} norm groups",
            )


def _pro(layers: int, width: int, mlp_dim: int, heads: int) -> JanusConfig:
    language = LlamaConfig(layers=layers, width=width, mlp_dim=mlp_dim, heads=heads, kv_heads=heads)
    return JanusConfig(language=language, gen_head_width=width)


PRESETS: dict[str, JanusConfig] = {
    "janus_1_3b": _pro(24, 2048, 5632, 16),
    "janus_pro_1b": _pro(24, 2048, 5632, 16),
    "janus_pro_7b": _pro(30, 4096, 11008, 32),
    "janus_tiny": JanusConfig(
        vision=SiglipConfig(image_size=64, width=64, layers=3, heads=4),
        gen_vision=VQConfig(ch=32, ch_mult=(1, 2, 2), z_channels=32, codebook_size=256, grid=4),
        language=LlamaConfig(
            vocab_size=512, width=96, mlp_dim=256, layers=3, heads=4, kv_heads=4, head_dim=24, max_positions=512
        ),
        gen_head_width=96,
    ),
}


def get_preset(name: str) -> JanusConfig:
    """The preset called `name`; ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------- reading config.json


def read_config(path: str | pathlib.Path) -> JanusConfig:
    """JanusConfig of a `config.json` file (or of a folder holding one), in either dialect.

    Raises OSError when it is absent, ValueError when it is not a Janus configuration that we can represent.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected the config.json of a Janus checkpoint there")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dialect_of(raw: Any) -> str:
    """'original' or 'transformers', by the `model_type` of a parsed config.json."""
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    dialects = {"multi_modality": "original", "janus": "transformers"}
    if model_type not in dialects:
        raise ValueError(
            f"model_type is {model_type!r}; a Janus config has 'multi_modality' (original) or 'janus' (transformers)"
        )
    return dialects[model_type]


def parse_config(raw: dict[str, Any]) -> JanusConfig:
    """JanusConfig of a parsed config.json in either dialect; ValueError names what does not fit."""
    parse = _parse_original if dialect_of(raw) == "original" else _parse_transformers
    try:
        return parse(raw)
    except KeyError as error:
        raise ValueError(f"the key {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a value has the wrong type ({error})") from None


def _parse_language(raw: dict[str, Any]) -> LlamaConfig:
    _require(raw.get("model_type", "llama") == "llama", f"the language model is {raw.get('model_type')!r}, not 'llama'")
    # What a block leaves out is the LLaMA default of transformers, as in Janus-Pro-7B's config.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require(rope_type == "default", f"rope type {rope_type!r} is not supported (only 'default')")
    _require(raw.get("hidden_act", "silu") == "silu", f"hidden_act {raw.get('hidden_act')!r} is not 'silu'")
    for bias in ("attention_bias", "mlp_bias"):
        _require(not raw.get(bias), f"{bias} is set; Janus decoders have none")
    width, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    if head_dim is None and heads != 0:
        head_dim = width // heads
    return LlamaConfig(
        vocab_size=raw.get("vocab_size", 32000),
        width=width,
        mlp_dim=raw.get("intermediate_size", 11008),
        layers=raw.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        max_positions=raw.get("max_position_embeddings", 2048),
    )


def _mlp_depth(block: dict[str, Any], name: str, input_dim: int, width: int) -> int:
    params = block["params"]
    kind = params.get("projector_type", "mlp_gelu")
    _require(kind == "mlp_gelu", f"{name}: projector_type {kind!r} is not supported (only 'mlp_gelu')")
    _require(
        params["input_dim"] == input_dim, f"{name}: input_dim {params['input_dim']} is not its encoder's {input_dim}"
    )
    _require(params["n_embed"] == width, f"{name}: n_embed {params['n_embed']} is not the decoder's width {width}")
    return params.get("depth", 1)


def _parse_original(raw: dict[str, Any]) -> JanusConfig:
    language = _parse_language(raw["language_config"])

    params = raw["vision_config"]["params"]
    name = params.get("model_name", "siglip_large_patch16_384")
    if name == "custom":
        sizes = {key: params[key] for key in ("patch_size", "width", "layers", "heads", "mlp_ratio")}
    else:
        _require(
            name in _SIGLIP_NAMES, f"vision model_name {name!r} is unknown; known: custom, {', '.join(_SIGLIP_NAMES)}"
        )
        sizes = dict(_SIGLIP_NAMES[name])
    # select_layer counts from the end when not positive, and the layers after it do not exist in the checkpoint.
    select = params.get("select_layer", -1)
    _require(type(select) is int, f"vision select_layer is {select!r}, not a whole number")
    sizes["layers"] = min(sizes["layers"], sizes["layers"] + select + 1 if select <= 0 else select)
    feature = params.get("select_feature", "same")
    _require(feature == "same", f"vision select_feature {feature!r} is not supported (only 'same')")
    vision = SiglipConfig(image_size=params["image_size"], **sizes)

    block = raw["gen_vision_config"]
    params = block["params"]
    cls = block.get("cls", "VQ-16")
    _require(cls in ("VQ-16", "custom"), f"gen_vision cls {cls!r} is unknown; known: VQ-16, custom")
    sizes = _VQ16
    if cls == "custom":
        sizes = {key: params[key] for key in _VQ16} | {k: params[k] for k in _VQ_OPTIONAL if k in params}
    gen_vision = VQConfig(
        codebook_size=params["image_token_size"],
        codebook_dim=params["n_embed"],
        **{**sizes, "ch_mult": tuple(sizes["ch_mult"])},
    )

    head = raw["gen_head_config"]["params"]
    _require(
        head["image_token_size"] == gen_vision.codebook_size,
        f"gen_head: image_token_size {head['image_token_size']} is not the codebook's {gen_vision.codebook_size}",
    )
    _require(
        head["n_embed"] == language.width, f"gen_head: n_embed {head['n_embed']} is not the decoder's {language.width}"
    )
    return JanusConfig(
        vision=vision,
        gen_vision=gen_vision,
        language=language,
        aligner_depth=_mlp_depth(raw["aligner_config"], "aligner", vision.width, language.width),
        gen_aligner_depth=_mlp_depth(raw["gen_aligner_config"], "gen_aligner", gen_vision.codebook_dim, language.width),
        gen_head_width=head["image_token_embed"],
        dtype=raw.get("torch_dtype") or raw.get("dtype") or "bfloat16",
    )


def _parse_transformers(raw: dict[str, Any]) -> JanusConfig:
    language = _parse_language(raw["text_config"])
    v, g = raw["vision_config"], raw["vq_config"]
    for block, key in ((v, "hidden_act"), (g, "hidden_act")):
        _require(block.get(key, "gelu") == "gelu", f"hidden_act {block.get(key)!r} is not 'gelu'")
    _require(not v.get("use_qk_norm"), "vision use_qk_norm is set; no Janus checkpoint has it and it is not supported")
    _require(v.get("attention_bias", True), "vision attention_bias is off; not supported")
    _require(not g.get("double_latent"), "vq double_latent is set; not supported")
    for name, block in (("vision", v), ("vq", g)):
        width = block.get("projection_dim", 2048)
        _require(width == language.width, f"{name} projection_dim {width} is not the decoder's width {language.width}")
    vision = SiglipConfig(
        image_size=v.get("image_size", 384),
        patch_size=v.get("patch_size", 16),
        width=v.get("hidden_size", 1024),
        layers=v.get("num_hidden_layers", 24),
        heads=v.get("num_attention_heads", 16),
        mlp_ratio=v.get("mlp_ratio", 4.0),
        norm_eps=v.get("layer_norm_eps", 1e-6),
    )
    gen_vision = VQConfig(
        ch=g.get("base_channels", 128),
        ch_mult=tuple(g.get("channel_multiplier", _VQ16["ch_mult"])),
        num_res_blocks=g.get("num_res_blocks", 2),
        z_channels=g.get("latent_channels", 256),
        codebook_size=g.get("num_embeddings", 16384),
        codebook_dim=g.get("embed_dim", 8),
        # transformers ties the generated grid to the understanding grid, whatever num_patches says.
        grid=vision.grid,
    )
    dtypes = (block.get(key) for block in (raw, raw["text_config"]) for key in ("dtype", "torch_dtype"))
    return JanusConfig(
        vision=vision,
        gen_vision=gen_vision,
        language=language,
        aligner_depth=v.get("depth", 2),
        gen_aligner_depth=g.get("num_hidden_layers", 2),
        gen_head_width=language.width,
        dtype=next(filter(None, dtypes), "bfloat16"),
    )


# ---------------------------------------------------------------- writing config.json


def _require_vq_eps(g: VQConfig):
    _require(g.norm_eps == 1e-6, f"no dialect can say a VQ norm eps of {g.norm_eps} (only 1e-6)")


def original_config(config: JanusConfig) -> dict[str, Any]:
    """`config` as a config.json of the original dialect; sizes without a name there are written as `custom`."""
    v, g, t = config.vision, config.gen_vision, config.language
    _require_vq_eps(g)
    _require(v.norm_eps == 1e-6, f"the original dialect cannot say a vision norm eps of {v.norm_eps} (only 1e-6)")
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
    vq = {"image_token_size": g.codebook_size, "n_embed": g.codebook_dim}
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

    `image_token_id` is the tokenizer's id of `<image_placeholder>`. ValueError for what transformers' port
    cannot say.
    """
    v, g, t = config.vision, config.gen_vision, config.language
    _require_vq_eps(g)
    _require(g.norm_groups == 32, f"the transformers dialect cannot say {g.norm_groups} VQ norm groups (only 32)")
    _require(t.width % t.heads == 0, f"transformers wants a width ({t.width}) that its {t.heads} heads divide")
    _require(config.gen_head_width == t.width, "the transformers dialect needs the image head as wide as the decoder")
    _require(
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
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.max_positions,
        "rms_norm_eps": t.norm_eps,
        "rope_theta": t.rope_theta,
    }
