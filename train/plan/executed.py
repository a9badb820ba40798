"""FLOPs that a chip really executes in a compiled program, those of recomputed products included.

Counted from its HLO text, since XLA's own count misses kernels and counts the body of a loop once.
"""

from __future__ import annotations

import math
import re

from train.config import TrainConfig
from train.plan import hlo
from train.plan.flops import step_flops, updates_flops

# Products of queries with keys, or of as large operands, in each kernel of splash attention (jax's
# splash_attention_kernel.py): forward, gradient of the queries, and those of keys and values; or all three in the last.
_KERNELS = {"fwd": 2, "dq": 3, "dkv": 4}
_WITH_DQ = 5
_KERNEL = re.compile(r"%?splash_m[hq]a_(fwd|dq|dkv)")
# Likewise cuDNN's attention, whose first operand is the queries [batch, length, heads, head_dim].
_CUDNN_CONVOLUTION = 'custom_call_target="__cudnn$conv'
_CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')


def executed_flops(text: str) -> float:
    """FLOPs of one run of the module `text` on one chip: of matrix products, convolutions and splash attention.

    Both sides of a branch count, as do the keys after each query's block, which causal attention skips, half.
    """
    return float(sum(one.times * _flops(one) for one in hlo.instructions(text, during_collectives=True)))


def _flops(one: hlo.Instruction) -> float:
    if (one.opcode == "convolution" or _CUDNN_CONVOLUTION in one.line) and (products := _overlapping(one)):
        return 2 * products
    if one.opcode in ("dot", "convolution") and len(one.operands) >= 2:
        left, right = (math.prod(array.shape) for array in one.operands[:2])
        result = math.prod(one.arrays[0].shape)
        # Of [b, m, k] and [b, k, n] to [b, m, n]: these sizes multiply to b (b m n k)^2. Convolutions whose windows do
        # not overlap, which is what a product becomes and what cuts images into patches, are such products.
        return 2 * math.sqrt(left * right * result / _batch(one))
    if one.opcode == "custom-call" and (kernel := _KERNEL.search(one.line)):
        # Its largest 16-bit or 32-bit array of [..., length, head_dim] is that of the queries.
        queries = max((array for array in one.operands if len(array.shape) >= 3), key=lambda a: math.prod(a.shape))
        # The gradient of the queries has one axis more than they do, for the blocks of keys.
        with_dq = kernel[1] == "dkv" and max(len(array.shape) for array in one.arrays) > len(queries.shape)
        products = _WITH_DQ if with_dq else _KERNELS[kernel[1]]
        return products * 2 * math.prod(queries.shape) * queries.shape[-2] / 2
    if one.opcode == "custom-call" and (kernel := _CUDNN.search(one.line)):
        queries, keys = one.operands[:2]
        seen = 0.5 if "CAUSAL" in one.line else 1
        return (5 if kernel[1] else 2) * 2 * math.prod(queries.shape) * keys.shape[1] * seen
    return 0.0


def _overlapping(one: hlo.Instruction) -> int:
    """Multiply-adds of a convolution whose windows overlap, borders as if they were inside; 0 for others."""
    window = dict(re.findall(r"(\w+)=(\S+)", found[1])) if (found := re.search(r"window=\{([^}]*)\}", one.line)) else {}
    labels = re.search(r"dim_labels=(\w+)_(\w+)->", one.line)
    if not labels or not {"size"} <= set(window) or {"lhs_dilate", "rhs_dilate"} & set(window):
        return 0
    sizes = [int(n) for n in window["size"].split("x")]
    strides = [int(n) for n in window.get("stride", "x".join("1" * len(sizes))).split("x")]
    left, right = one.operands[:2]
    extents = [left.shape[labels[1].index(str(axis))] for axis in range(len(sizes))]
    if all(size <= stride for size, stride in zip(sizes, strides, strict=True)):
        return 0
    # A product that is written as a convolution slides over fewer values than its window has.
    if any(extent < size for extent, size in zip(extents, sizes, strict=True)):
        return 0
    return math.prod(one.arrays[0].shape) * math.prod(right.shape) // right.shape[labels[2].index("o")]


def _batch(one: hlo.Instruction) -> int:
    """The size of the axes that both operands and the result share."""
    if one.opcode == "dot":
        axes = re.search(r"lhs_batch_dims=\{([0-9,]*)\}", one.line)
        return math.prod(one.operands[0].shape[int(axis)] for axis in axes[1].split(",")) if axes and axes[1] else 1
    batch = 1
    if window := re.search(r"window=\{([^}]*)\}", one.line):
        # TPU's compiler writes a shared axis of size n as a spatial one of which each window sees one value: the left
        # operand is dilated by n.
        fields = dict(field.split("=") for field in window[1].split())
        dilated = [int(n) for n in fields.get("lhs_dilate", "1").split("x")]
        batch *= math.prod(dilated)
    for groups in ("feature_group_count", "batch_group_count"):
        if found := re.search(rf"{groups}=(\d+)", one.line):
            batch *= int(found[1])
    return batch


def least_flops(config: TrainConfig) -> float:
    """FLOPs of a step of `config`, over all chips, that computes nothing twice, with every row and image slot full.

    As the program does it: both heads may be asked for every token, and attention covers the whole row.
    """
    if config.grpo or config.dpo:
        return updates_flops(config)
    tokens = config.batch_size * config.data.context
    images = config.batch_size * config.data.images_per_row if config.data.ratio[0] else 0
    return step_flops(config, tokens, images, tokens, tokens)
