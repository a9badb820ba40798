"""Analytic FLOPs of a training step, and peak FLOP/s of devices: for model FLOPs utilization (PaLM, appendix B).

Counts what the model needs, 2 FLOPs per multiply-add of every matrix product: nothing for recomputation by remat,
padding, empty image slots, norms, activations and softmax. XLA's own count does not work here: it misses kernels, and
counts the body of a scan once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from janus_jax.config import JanusConfig
from janus_jax.sharding import flatten
from janus_jax.weights.torch_weights import abstract_params
from train.config import TrainConfig
from train.step.leaves import abstract_leaves

# Dense bfloat16 (Tesla T4: float16) FLOP/s of one JAX device, by `device_kind` (makers' data sheets).
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    # A chip of 2307e12 shows up as two devices.
    (r"TPU7x", 1153.5e12),
    (r"Tesla T4", 65e12),
    (r"(NVIDIA )?A100\b.*", 312e12),
    # The PCIe and NVL boards are slower than SXM's.
    (r"(NVIDIA )?H100 PCIe", 756e12),
    (r"(NVIDIA )?H[12]00 NVL", 835e12),
    (r"(NVIDIA )?H[12]00\b.*", 989e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of that `jax.Device.device_kind`; None if unknown, as for CPUs."""
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device_kind.strip())), None)


def parameter_counts(config: JanusConfig) -> dict[str, int]:
    """Parameters of each part of the model (`vision_model`, `aligner`, ...), in its order."""
    counts: dict[str, int] = {}
    for path, leaf in flatten(abstract_params(config)).items():
        part = path.split("/")[0]
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


def step_flops(
    config: TrainConfig,
    tokens: float,
    images: float,
    text_targets: float,
    image_targets: float,
    sample_length: float | None = None,
) -> float:
    """FLOPs of one training step of `config` over the whole batch.

    Every product counts once in the forward pass; in the backward pass once for the gradient of its input, if something
    upstream is trained, and once for that of its kernel, if the kernel is trained. The products of an adapter count
    with those of the kernel that it changes.

    Args:
      tokens: tokens of the decoder, without padding.
      images: understanding images.
      text_targets, image_targets: target tokens of the text head and the image head. The input codes are as many as the
        image targets, minus the last one of each image.
      sample_length: the length of a token's sample, averaged over tokens (sum of squared lengths divided by the sum of
        lengths): causal attention covers half of it. Default: the whole context, too much for packed rows.
    """
    model, modules = config.model, _modules(config)
    c, v = model.language, model.vision
    length = config.data.context if sample_length is None else sample_length
    codes = image_targets * (1 - 1 / model.gen_vision.num_tokens)
    patches = images * v.num_patches

    def trains(*names: str) -> bool:
        return any(modules[name].trains for name in names)

    def products(name: str, items: float, upstream: bool) -> float:
        one = modules[name]
        return 2 * items * (one.kernels * (1 + upstream) + one.trained_kernels + 3 * one.adapter)

    def attention(width: int, items: float, keys: float, layers: int, differentiated: bool) -> float:
        # Scores and weighted values; both operands of both are activations.
        return 2 * 2 * width * items * keys * layers * (3 if differentiated else 1)

    # Whether something is trained up to there, from the images and the codes to the heads.
    encoder = trains("vision_model")
    aligner, embed = encoder or trains("aligner/first"), trains("gen_embed")
    gen_aligner = embed or trains("gen_aligner/first")
    inputs = aligner or gen_aligner or trains("aligner/others", "gen_aligner/others", "language_model/embed_tokens")
    decoder = inputs or trains("language_model/layers")
    return (
        products("vision_model/patch_embed", patches, upstream=False)
        + products("vision_model/blocks", patches, upstream=encoder)
        + attention(v.width, patches, v.num_patches, v.layers, encoder)
        + products("aligner/first", patches, upstream=encoder)
        + products("aligner/others", patches, upstream=aligner)
        + products("gen_aligner/first", codes, upstream=embed)
        + products("gen_aligner/others", codes, upstream=gen_aligner)
        # Gradients reach what is trained below through the whole decoder, frozen or not.
        + products("language_model/layers", tokens, upstream=decoder)
        + attention(c.heads * c.head_dim, tokens, (length + 1) / 2, c.layers, decoder)
        + products("language_model/lm_head", text_targets, upstream=decoder)
        + products("gen_head", image_targets, upstream=decoder)
    )


# Tokens of a typical sample of each kind, and the share of its text that is answers.
_TYPICAL = {"understanding": 900, "text": 600, "generation": 640}
_ANSWERS = 0.5


def typical_flops(config: TrainConfig) -> float:
    """`step_flops` of a full step of typical samples: 900 tokens with an image, 600 of text, 64 of a prompt to draw.

    Of reinforcement learning and preferences, those of `updates_flops`.
    """
    if config.grpo or config.dpo:
        return updates_flops(config)
    model = config.model
    ratio = dict(zip(_TYPICAL, config.data.ratio, strict=True))
    group = sum(_TYPICAL[kind] * share for kind, share in ratio.items())
    tokens = config.batch_size * config.data.context
    samples = {kind: share * tokens / group for kind, share in ratio.items()}
    answers = samples["understanding"] * max(_TYPICAL["understanding"] - model.vision.num_patches, 0)
    texts = samples["text"] * _TYPICAL["text"]
    text_targets = _ANSWERS * answers + (1 if config.data.text_loss == "all" else _ANSWERS) * texts
    drawn = samples["generation"] * model.gen_vision.num_tokens
    squares = sum(_TYPICAL[kind] ** 2 * share for kind, share in ratio.items())
    return step_flops(config, tokens, samples["understanding"], text_targets, drawn, squares / group)


def updates_flops(config: TrainConfig) -> float:
    """Of all updates of a step of GRPO, or of one of DPO, with prompts (and answers) that fill their places; drawing is
    not counted.

    What has no gradient, the unconditional rows, is a third of what has one.
    """
    g, length = config.grpo, config.data.context
    pictures = config.batch_size * (g.epochs if g else 2)
    tokens, drawn = pictures * length, pictures * config.drawn
    if config.answers:
        return step_flops(config, tokens, pictures * config.data.images_per_row, drawn, 0)
    rows = (4 / 3 if g.detach else 2) if g and g.guided and g.loss == "guided" else 1
    return rows * step_flops(config, tokens, 0, 0, drawn)


@dataclasses.dataclass
class _Module:
    """What one item that passes through costs in multiply-adds, and whether anything is trained there.

    Attributes:
      kernels, trained_kernels: elements of all kernels, all layers together, and of those that are trained.
      adapter: elements of an adapter's factors.
    """

    kernels: int = 0
    trained_kernels: int = 0
    adapter: int = 0
    trains: bool = False


def _modules(config: TrainConfig) -> Mapping[str, _Module]:
    modules: dict[str, _Module] = collections.defaultdict(_Module)
    for is_trained, tree in zip((True, False), abstract_leaves(config), strict=True):
        for path, x in flatten(tree).items():
            part, name, *_ = keys = path.split("/")
            size, leaf = math.prod(x.shape), keys[-1]
            if part in ("aligner", "gen_aligner"):
                key = f"{part}/{'first' if name == 'layers_0' else 'others'}"
            else:
                key = part if part in ("gen_head", "gen_embed") else f"{part}/{name}"
            one = modules[key]
            one.kernels += size if leaf == "kernel" else 0
            one.trained_kernels += size if leaf == "kernel" and is_trained else 0
            one.adapter += size if leaf in ("lora_a", "lora_b") else 0
            one.trains |= is_trained
            modules[part].trains |= is_trained
    return modules
