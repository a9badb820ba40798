"""Maps torch tensors to parameters: one table, two dialects, both directions.

A row has our path, the tensor's name in the *original* dialect (`deepseek-ai/*`), its name in the *transformers*
dialect, its layout in torch, and our shape in the axis legend of this package. `{i}` counts layers; our decoder and
vision layers are stacked on a leading axis. `slots(config)` expands the table for one model: every torch tensor fills
slots, and every slot is filled by one tensor (or by a third of one: the original dialect fuses the vision q, k, v).

Sources: the reference's checkpoints (janus/models/*) and transformers' `convert_janus_weights_to_hf.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from janus_jax.config import IMAGE_CHANNELS, JanusConfig

DIALECTS = ("original", "transformers")
Path = tuple[str, ...]

# Layouts of a parameter in torch, compared with ours.
PLAIN = "plain"  # the same
POSITIONS = "positions"  # a leading axis of 1 in the original dialect
LINEAR = "linear"  # [out, in], the same except that torch flattens head axes
CONV = "conv"  # [out, in, height, width], ours is [height, width, in, out]
POINTWISE = "pointwise"  # a 1x1 convolution, [out, in, 1, 1], ours is [in, out]

Names = tuple[str, str, str]  # our path, original name, transformers name
Row = tuple[str, str, str, str, str]  # our path, original name, transformers name, layout, our shape


def _affine(ours: str, original: str, transformers: str, layout: str, shape: str) -> list[Row]:
    """Rows of a weight and its bias; the axes after the arrow are the outputs; `[k]` is the k-th third of a tensor."""
    weight = "scale" if layout == PLAIN else "kernel"
    original, bracket, third = original.partition("[")
    return [
        (f"{ours}/{weight}", f"{original}.weight{bracket}{third}", f"{transformers}.weight", layout, shape),
        (f"{ours}/bias", f"{original}.bias{bracket}{third}", f"{transformers}.bias", PLAIN, shape.split("->")[-1]),
    ]


_TOWER, _HF_TOWER = "vision_model.vision_tower", "model.vision_model"
_BLOCK, _HF_BLOCK = f"{_TOWER}.blocks.{{i}}", f"{_HF_TOWER}.encoder.layers.{{i}}"
_ATTN, _HF_ATTN = f"{_BLOCK}.attn", f"{_HF_BLOCK}.self_attn"
VISION_ROWS: list[Row] = [
    *_affine(
        "vision_model/patch_embed",
        f"{_TOWER}.patch_embed.proj",
        f"{_HF_TOWER}.embeddings.patch_embedding",
        CONV,
        "P P C -> W",
    ),
    (
        "vision_model/pos_embed",
        f"{_TOWER}.pos_embed",
        f"{_HF_TOWER}.embeddings.position_embedding.weight",
        POSITIONS,
        "S W",
    ),
    *_affine("vision_model/blocks/norm1", f"{_BLOCK}.norm1", f"{_HF_BLOCK}.layer_norm1", PLAIN, "W"),
    *_affine("vision_model/blocks/attn/q", f"{_ATTN}.qkv[0]", f"{_HF_ATTN}.q_proj", LINEAR, "W -> N H"),
    *_affine("vision_model/blocks/attn/k", f"{_ATTN}.qkv[1]", f"{_HF_ATTN}.k_proj", LINEAR, "W -> N H"),
    *_affine("vision_model/blocks/attn/v", f"{_ATTN}.qkv[2]", f"{_HF_ATTN}.v_proj", LINEAR, "W -> N H"),
    *_affine("vision_model/blocks/attn/proj", f"{_ATTN}.proj", f"{_HF_ATTN}.projection_layer", LINEAR, "N H -> W"),
    *_affine("vision_model/blocks/norm2", f"{_BLOCK}.norm2", f"{_HF_BLOCK}.layer_norm2", PLAIN, "W"),
    *_affine("vision_model/blocks/mlp/fc1", f"{_BLOCK}.mlp.fc1", f"{_HF_BLOCK}.mlp.fc1", LINEAR, "W -> M"),
    *_affine("vision_model/blocks/mlp/fc2", f"{_BLOCK}.mlp.fc2", f"{_HF_BLOCK}.mlp.fc2", LINEAR, "M -> W"),
    *_affine("vision_model/norm", f"{_TOWER}.norm", f"{_HF_TOWER}.post_layernorm", PLAIN, "W"),
]

_DECODER, _HF_DECODER = "language_model.model", "model.language_model"
_LAYER, _HF_LAYER = f"{_DECODER}.layers.{{i}}", f"{_HF_DECODER}.layers.{{i}}"


def _decoder_row(ours: str, name: str, layout: str, shape: str) -> Row:
    return (f"language_model/{ours}", f"{_DECODER}.{name}.weight", f"{_HF_DECODER}.{name}.weight", layout, shape)


LANGUAGE_ROWS: list[Row] = [
    _decoder_row("embed_tokens/embedding", "embed_tokens", PLAIN, "V D"),
    _decoder_row("layers/input_layernorm/scale", "layers.{i}.input_layernorm", PLAIN, "D"),
    _decoder_row("layers/self_attn/q_proj/kernel", "layers.{i}.self_attn.q_proj", LINEAR, "D -> N H"),
    _decoder_row("layers/self_attn/k_proj/kernel", "layers.{i}.self_attn.k_proj", LINEAR, "D -> K H"),
    _decoder_row("layers/self_attn/v_proj/kernel", "layers.{i}.self_attn.v_proj", LINEAR, "D -> K H"),
    _decoder_row("layers/self_attn/o_proj/kernel", "layers.{i}.self_attn.o_proj", LINEAR, "N H -> D"),
    _decoder_row("layers/post_attention_layernorm/scale", "layers.{i}.post_attention_layernorm", PLAIN, "D"),
    _decoder_row("layers/mlp/gate_proj/kernel", "layers.{i}.mlp.gate_proj", LINEAR, "D -> F"),
    _decoder_row("layers/mlp/up_proj/kernel", "layers.{i}.mlp.up_proj", LINEAR, "D -> F"),
    _decoder_row("layers/mlp/down_proj/kernel", "layers.{i}.mlp.down_proj", LINEAR, "F -> D"),
    _decoder_row("norm/scale", "norm", PLAIN, "D"),
    ("language_model/lm_head/kernel", "language_model.lm_head.weight", "lm_head.weight", LINEAR, "D -> V"),
]

_VQ, _HF_VQ = "gen_vision_model", "model.vqmodel"


def _gen_row(name: str, transformers: str, layout: str, shape: str) -> list[Row]:
    return _affine(name, name.replace("/", "."), f"model.{transformers}", layout, shape)


GENERATION_ROWS: list[Row] = [
    ("gen_embed/embedding", "gen_embed.weight", "model.generation_embeddings.weight", PLAIN, "E Q"),
    *_gen_row("gen_head/output_mlp_projector", "generation_head.proj_out", LINEAR, "D -> G"),
    *_gen_row("gen_head/vision_head", "generation_head.vision_head", LINEAR, "G -> E"),
    *_gen_row("gen_vision_model/quant_conv", "vqmodel.quant_conv", POINTWISE, "Z -> Q"),
    *_gen_row("gen_vision_model/post_quant_conv", "vqmodel.post_quant_conv", POINTWISE, "Q -> Z"),
    (
        "gen_vision_model/quantize/embedding",
        f"{_VQ}.quantize.embedding.weight",
        f"{_HF_VQ}.quantize.embedding.weight",
        PLAIN,
        "E Q",
    ),
]


def _adapter_rows(ours: str, transformers: str, input_axis: str, depth: int) -> Iterator[Row]:
    """MlpProjector: an nn.Sequential whose even entries are the linear layers (janus/models/projector.py)."""
    for j in range(depth):
        name = "fc1" if j == 0 else f"hidden_layers.{j - 1}"
        shape = f"{input_axis if j == 0 else 'D'} -> D"
        yield from _affine(f"{ours}/layers_{2 * j}", f"{ours}.layers.{2 * j}", f"{transformers}.{name}", LINEAR, shape)


def _vq_rows(config: JanusConfig) -> Iterator[Row]:
    """The VQ encoder and decoder (janus/models/vq_model.py); decoder block 0 is the lowest resolution."""
    vq = config.gen_vision
    channels = [vq.ch * mult for mult in vq.ch_mult]
    last = len(channels) - 1

    def child(names: Names, ours: str, original: str | None = None, transformers: str | None = None) -> Names:
        return f"{names[0]}/{ours}", f"{names[1]}.{original or ours}", f"{names[2]}.{transformers or ours}"

    def part(half: str, *names: str) -> Names:
        return child(child((_VQ, _VQ, _HF_VQ), half), *names)

    def res(names: Names, inputs: int, outputs: int) -> Iterator[Row]:
        yield from _affine(*child(names, "norm1"), PLAIN, f"{inputs}")
        yield from _affine(*child(names, "conv1"), CONV, f"3 3 {inputs} -> {outputs}")
        yield from _affine(*child(names, "norm2"), PLAIN, f"{outputs}")
        yield from _affine(*child(names, "conv2"), CONV, f"3 3 {outputs} -> {outputs}")
        if inputs != outputs:
            yield from _affine(*child(names, "nin_shortcut"), POINTWISE, f"{inputs} -> {outputs}")

    def attn(names: Names, width: int) -> Iterator[Row]:
        yield from _affine(*child(names, "norm"), PLAIN, f"{width}")
        for name in ("q", "k", "v", "proj_out"):
            yield from _affine(*child(names, name), POINTWISE, f"{width} -> {width}")

    def ends(half: str, inputs: int, first: int, final: int, outputs: int) -> Iterator[Row]:
        conv_in, norm_out, conv_out = (part(half, name) for name in ("conv_in", "norm_out", "conv_out"))
        yield from _affine(*conv_in, CONV, f"3 3 {inputs} -> {first}")
        yield from res(part(half, "mid_0", "mid.0", "mid.block_1"), channels[last], channels[last])
        yield from attn(part(half, "mid_1", "mid.1", "mid.attn_1"), channels[last])
        yield from res(part(half, "mid_2", "mid.2", "mid.block_2"), channels[last], channels[last])
        yield from _affine(*norm_out, PLAIN, f"{final}")
        yield from _affine(*conv_out, CONV, f"3 3 {final} -> {outputs}")

    def stage(half: str, i: int, width: int, outputs: int, num_res: int, resample: str | None, attend: bool):
        block = part(half, f"conv_blocks_{i}", f"conv_blocks.{i}", f"{'down' if half == 'encoder' else 'up'}.{i}")
        for j in range(num_res):
            yield from res(child(block, f"res_{j}", f"res.{j}", f"block.{j}"), width if j == 0 else outputs, outputs)
            if attend:
                yield from attn(child(block, f"attn_{j}", f"attn.{j}", f"attn.{j}"), outputs)
        if resample:
            conv = child(block, f"{resample}/conv", f"{resample}.conv", f"{resample}.conv")
            yield from _affine(*conv, CONV, f"3 3 {outputs} -> {outputs}")

    yield from ends("encoder", IMAGE_CHANNELS, vq.ch, channels[last], vq.z_channels)
    for i, outputs in enumerate(channels):
        width = channels[i - 1] if i else vq.ch
        resample = "downsample" if i != last else None
        yield from stage("encoder", i, width, outputs, vq.num_res_blocks, resample, i == last)
    yield from ends("decoder", vq.z_channels, channels[last], channels[0], IMAGE_CHANNELS)
    for i, level in enumerate(reversed(range(len(channels)))):
        width = channels[min(level + 1, last)]
        resample = "upsample" if level != 0 else None
        yield from stage("decoder", i, width, channels[level], vq.num_res_blocks + 1, resample, level == last)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter of ours (of one layer, where layers are stacked) and the torch tensor that fills it.

    `path` is the stacked parameter's path and `layer` the index into its leading axis (None: not stacked). `shape` is
    ours, without the layer axis. `section` is (index, count): the tensor has the rows of `count` slots in sequence.
    """

    path: Path
    layer: int | None
    shape: tuple[int, ...]
    layout: str
    name: str
    torch_shape: tuple[int, ...]  # of this slot's rows alone
    section: tuple[int, int]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The whole torch tensor's shape."""
        return (self.torch_shape[0] * self.section[1], *self.torch_shape[1:])

    def from_torch(self, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """[*torch_shape] -> the slice `index` of [*shape], without reading the rest of `tensor`."""
        if self.layout == CONV:
            return tensor.transpose(2, 3, 1, 0)[index]
        if self.layout == POINTWISE:
            return tensor[:, :, 0, 0].T[index]
        return tensor.reshape(self.shape)[index]

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """[*shape] -> [*torch_shape]: the inverse of `from_torch`."""
        if self.layout == CONV:
            return array.transpose(3, 2, 0, 1)
        if self.layout == POINTWISE:
            return array.T[:, :, None, None]
        return array.reshape(self.torch_shape)


def _shapes(
    layout: str, inputs: list[int], outputs: list[int], is_bias: bool, dialect: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Our shape and torch's for a row with the axes `inputs -> outputs`; without an arrow, all axes are outputs."""
    if layout == CONV:
        *window, channels = inputs
        return (*inputs, *outputs), (*outputs, channels, *window)
    if layout == POINTWISE:
        return (*inputs, *outputs), (*outputs, *inputs, 1, 1)
    shape = (*outputs, *inputs)
    if layout == LINEAR:
        return shape, (math.prod(outputs), math.prod(inputs))
    if layout == POSITIONS and dialect == "original":
        return shape, (1, *shape)
    return shape, (math.prod(shape),) if is_bias else shape


def slots(config: JanusConfig, dialect: str) -> list[Slot]:
    """Every slot of a model of `config`, with the tensor of `dialect` that fills it.

    Slots that share a tensor or a stacked parameter follow one another, layer by layer.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    v, g, t = config.vision, config.gen_vision, config.language
    vision_axes = {"P": v.patch_size, "C": IMAGE_CHANNELS, "S": v.num_patches, "W": v.width, "M": v.mlp_dim}
    vision_axes |= {"N": v.heads, "H": v.head_dim}
    axes = {"D": t.width, "N": t.heads, "K": t.kv_heads, "H": t.head_dim, "F": t.mlp_dim, "V": t.vocab_size}
    axes |= {"E": g.codebook_size, "Q": g.codebook_dim, "Z": g.z_channels, "G": config.gen_head_width}

    def expand(rows, axes: dict[str, int], layers: int = 0) -> Iterator[Slot]:
        for ours, *names, layout, axis_names in rows:
            name = names[DIALECTS.index(dialect)]
            inputs, _, outputs = axis_names.rpartition("->")
            sizes = [[axes[a] if a in axes else int(a) for a in half.split()] for half in (inputs, outputs)]
            shape, torch_shape = _shapes(layout, *sizes, ours.endswith("/bias"), dialect)
            third = re.search(r"\[(\d)\]$", name)
            section = (int(third[1]), 3) if third else (0, 1)
            name = name[: third.start()] if third else name
            for layer in range(layers) if "{i}" in name else (None,):
                yield Slot(
                    path=tuple(ours.split("/")),
                    layer=layer,
                    shape=shape,
                    layout=layout,
                    name=name.replace("{i}", str(layer)),
                    torch_shape=torch_shape,
                    section=section,
                )

    return [
        *expand(VISION_ROWS, vision_axes, v.layers),
        *expand(_adapter_rows("aligner", "model.aligner", "W", config.aligner_depth), {**axes, "W": v.width}),
        *expand(_adapter_rows("gen_aligner", "model.generation_aligner", "Q", config.gen_aligner_depth), axes),
        *expand(GENERATION_ROWS, axes),
        *expand(_vq_rows(config), axes),
        *expand(LANGUAGE_ROWS, axes, t.layers),
    ]


def carried_shapes(config: JanusConfig) -> dict[str, tuple[int, ...]]:
    """Shapes, by name, of the original dialect's tensors that Janus never uses but its strict loading requires."""
    w, m = config.vision.width, config.vision.mlp_dim
    pool = {
        "latent": (1, 1, w),
        "q.weight": (w, w),
        "q.bias": (w,),
        "kv.weight": (2 * w, w),
        "kv.bias": (2 * w,),
        "proj.weight": (w, w),
        "proj.bias": (w,),
        "norm.weight": (w,),
        "norm.bias": (w,),
        "mlp.fc1.weight": (m, w),
        "mlp.fc1.bias": (m,),
        "mlp.fc2.weight": (w, m),
        "mlp.fc2.bias": (w,),
    }
    shapes = {f"{_TOWER}.attn_pool.{name}": shape for name, shape in pool.items()}
    return shapes | {f"{_VQ}.quantize.codebook_used": (65536,)}


# Buffers that older torch code saved with the parameters; both are recomputed from the sizes.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


def is_harmless(name: str) -> bool:
    """Whether a tensor called `name` may be ignored."""
    return _BUFFERS.search(name) is not None
