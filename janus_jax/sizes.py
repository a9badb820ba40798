"""The sizes of a model: frozen dataclasses that refuse impossible values, and presets.

`janus_jax.config` reads and writes them as JSON; import them from there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from janus_jax.io import fields
from janus_jax.io.fields import shown

IMAGE_CHANNELS = 3
DTYPES = ("bfloat16", "float16", "float32")
# Of the decoder's MLP, one of `model.llama.ACTIVATIONS`: what exports say. A config.json with another, or with none,
# which is silu, is refused, so that after a change published checkpoints are.
DECODER_ACTIVATION = "silu"
_MOST_LEVELS = 8  # entries of ch_mult; images halve in size between them
_MOST_GRID = 512  # patches or codes on a side


def require(condition: bool, message: str):
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def _at_most(most: float, default: Any) -> Any:
    # Far above any model's: a larger size means a damaged file, and would take hours to work on.
    return dataclasses.field(default=default, metadata={"most": most})


class _Sizes:
    """Checks values from a config.json: every size is an integer of at least 1, every other number is above 0."""

    def __post_init__(self):
        owner = type(self).__name__.removesuffix("Config")
        for field in dataclasses.fields(self):
            check_size(field, getattr(self, field.name), f"{owner} {field.name}")


def check_size(field: dataclasses.Field, value: Any, name: str):
    """ValueError, which calls it `name`, if this field of a configuration cannot have `value`."""
    most = field.metadata["most"]
    if field.type == "float":
        wanted = fields.positive(value, most)
    elif field.type == "int":
        wanted = fields.integer(value, 1, most)
    else:
        good = isinstance(value, list | tuple) and 0 < len(value) <= _MOST_LEVELS
        good = good and all(fields.integer(size, 1, most) is None for size in value)
        wanted = None if good else f"1 to {_MOST_LEVELS} integers from 1 to {most:,}"
    require(wanted is None, f"{name} must be {wanted}, got {shown(value)}")


@dataclasses.dataclass(frozen=True)
class SiglipConfig(_Sizes):
    """Understanding encoder (reference: janus/models/siglip_vit.py)."""

    image_size: int = _at_most(8192, 384)
    patch_size: int = _at_most(1024, 16)
    width: int = _at_most(65536, 1024)
    layers: int = _at_most(1024, 24)
    heads: int = _at_most(1024, 16)
    mlp_ratio: float = _at_most(64.0, 4.0)
    norm_eps: float = _at_most(1.0, 1e-6)

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

    ch: int = _at_most(8192, 128)
    ch_mult: tuple[int, ...] = _at_most(64, (1, 1, 2, 2, 4))
    num_res_blocks: int = _at_most(64, 2)
    z_channels: int = _at_most(65536, 256)
    codebook_size: int = _at_most(1 << 24, 16384)
    codebook_dim: int = _at_most(65536, 8)
    grid: int = _at_most(_MOST_GRID, 24)
    norm_groups: int = _at_most(8192, 32)
    norm_eps: float = _at_most(1.0, 1e-6)

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

    vocab_size: int = _at_most(1 << 24, 102400)
    width: int = _at_most(1 << 17, 2048)
    mlp_dim: int = _at_most(1 << 20, 5632)
    layers: int = _at_most(1024, 24)
    heads: int = _at_most(1024, 16)
    kv_heads: int = _at_most(1024, 16)
    head_dim: int = _at_most(4096, 128)
    norm_eps: float = _at_most(1.0, 1e-6)
    rope_theta: float = _at_most(1e12, 10000.0)
    max_positions: int = _at_most(1 << 27, 16384)


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """A whole Janus model; `dtype` is the checkpoint's own parameter dtype."""

    vision: SiglipConfig = SiglipConfig()
    gen_vision: VQConfig = VQConfig()
    language: LlamaConfig = LlamaConfig()
    aligner_depth: int = _at_most(64, 2)
    gen_aligner_depth: int = _at_most(64, 2)
    gen_head_width: int = _at_most(1 << 17, 2048)
    dtype: str = "bfloat16"

    def __post_init__(self):
        v, g, t = self.vision, self.gen_vision, self.language
        for field in dataclasses.fields(self):
            if field.metadata:
                check_size(field, getattr(self, field.name), field.name)
        require(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {shown(self.dtype)}")
        require(v.width % v.heads == 0, f"vision width {v.width} must be a multiple of its {v.heads} heads")
        require(
            v.image_size >= v.patch_size,
            f"vision image_size must be at least its patch_size {v.patch_size}, got {v.image_size}",
        )
        require(
            v.grid <= _MOST_GRID,
            f"vision image_size must be at most {_MOST_GRID} patches of {v.patch_size}, got {v.image_size}",
        )
        require(
            t.heads % t.kv_heads == 0,
            f"{t.heads} attention heads must be a multiple of the {t.kv_heads} key/value heads",
        )
        require(t.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, got {t.head_dim}")
        for mult in g.ch_mult:
            require(
                (g.ch * mult) % g.norm_groups == 0,
                f"gen_vision channels {g.ch} x {mult} must be a multiple of {g.norm_groups} norm groups",
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
    """The preset called `name`; ValueError lists the known ones.

    >>> get_preset("janus_pro_7b").language.layers
    30
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
