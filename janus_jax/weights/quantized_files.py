"""Converted folders whose kernels are quantized: how config.json says so, and how the arrays are stored.

config.json has `"quantization_config": {"quant_method": "janus_jax", "bits": 4, "group_size": 128}` (for int8 without a
group size), under the key at which other libraries look for what they would have to know, and refuse what they do not.
Beside each quantized `kernel` is its `kernel_scale`, as `quantize` makes them; int8 kernels are stored as they are, and
int4 ones as uint8 of half the last axis: the even columns in the low four bits, in two's complement.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from janus_jax.io.messages import one_line
from janus_jax.weights.quantize import FORMS, GROUP, is_quantized, quantize_leaf, quantized_shapes, scale_shape
from janus_jax.weights.torch_weights import Index, LazyArray, LazyParams

_KEY, _METHOD = "quantization_config", "janus_jax"
_INT4 = np.dtype(ml_dtypes.int4)


def marked(raw: Mapping[str, Any], form: str) -> dict[str, Any]:
    """config.json `raw` that says its folder's kernels are in `form`; ValueError for an unknown one."""
    if form not in FORMS:
        raise ValueError(f"weights must be {' or '.join(map(repr, FORMS))}, got {form!r}")
    return {**raw, _KEY: _mark(form)}


def _mark(form: str) -> dict[str, Any]:
    if form == "int8":
        return {"quant_method": _METHOD, "bits": 8}
    return {"quant_method": _METHOD, "bits": 4, "group_size": GROUP}


def form_of(raw: Mapping[str, Any], folder: pathlib.Path, kind: str) -> str | None:
    """The form of the kernels in `folder` by its config.json, None if plain; ValueError for one that is not ours."""
    found = raw.get(_KEY)
    if not found:
        return None
    for form in FORMS:
        if kind == "converted" and found == _mark(form):
            return form
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    raise ValueError(
        f"{one_line(folder / 'config.json')}: {_KEY} ({one_line(method, 40)}) is not one that "
        "convert/from_torch.py --weights writes; give an unquantized checkpoint"
    )


def stored_shapes(abstract: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """The arrays that a folder in `form` has for the parameters `abstract`, as nested `jax.ShapeDtypeStruct`."""

    def stored(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // 2), np.uint8) if x.dtype == _INT4 else x

    return jax.tree.map(stored, quantized_shapes(abstract, form))


def packed(leaves: LazyParams, form: str) -> LazyParams:
    """What a folder in `form` has for `leaves`, quantized a piece at a time while it is read.

    Raises: ValueError as `quantize`.
    """
    made: LazyParams = {}
    for path, leaf in leaves.items():
        if not is_quantized("/".join(path)):
            made[path] = leaf
            continue
        kernel, scale = _quantized(path, leaf, form)
        made |= {path: _packed(kernel), (*path[:-1], f"{path[-1]}_scale"): scale}
    return made


def _quantized(path: tuple[str, ...], leaf: LazyArray, form: str) -> tuple[LazyArray, LazyArray]:
    name = "/".join(path)
    scales = scale_shape(name, leaf.shape, form)
    whole = len(scales) - (form == "int4")  # from this axis on, an array is quantized as a whole

    def read(index: Index, which: int) -> np.ndarray:
        outer, inner = index[:whole], index[whole:]
        source = leaf.read((*outer, *(slice(None),) * (len(leaf.shape) - whole)))
        made = list(quantize_leaf(name, jnp.asarray(source), form, delete=True).values())[which]
        return np.asarray(made)[(*(slice(None),) * whole, *inner)]

    kernel = LazyArray(leaf.shape, np.dtype(np.int8) if form == "int8" else _INT4, functools.partial(read, which=0))
    dtype = np.dtype(np.float32) if form == "int8" else leaf.dtype
    return kernel, LazyArray(scales, dtype, functools.partial(read, which=1))


def _packed(leaf: LazyArray) -> LazyArray:
    if leaf.dtype != _INT4:
        return leaf

    def read(index: Index) -> np.ndarray:
        begin, end, _ = index[-1].indices(leaf.shape[-1] // 2)
        nibbles = leaf.read((*index[:-1], slice(2 * begin, 2 * end))).astype(np.int8).view(np.uint8) & 15
        return nibbles[..., ::2] | nibbles[..., 1::2] << 4

    return LazyArray((*leaf.shape[:-1], leaf.shape[-1] // 2), np.dtype(np.uint8), read)


def packed_as_stored(leaves: LazyParams) -> LazyParams:
    """The inverse of `unpacked`."""
    return {path: _packed(leaf) for path, leaf in leaves.items()}


def unpacked(leaves: LazyParams, form: str | None) -> LazyParams:
    """`leaves` as they are stored in a folder in `form`, with int4 kernels as int4."""
    if form != "int4":
        return leaves
    return {path: _unpacked(leaf) if is_quantized("/".join(path)) else leaf for path, leaf in leaves.items()}


def _unpacked(leaf: LazyArray) -> LazyArray:
    shape = (*leaf.shape[:-1], 2 * leaf.shape[-1])

    def read(index: Index) -> np.ndarray:
        begin, end, _ = index[-1].indices(shape[-1])
        bytes_ = leaf.read((*index[:-1], slice(begin // 2, -(-end // 2))))
        both = np.empty((*bytes_.shape[:-1], 2 * bytes_.shape[-1]), np.int8)
        both[..., ::2] = (bytes_ << 4).view(np.int8) >> 4
        both[..., 1::2] = bytes_.view(np.int8) >> 4
        first = begin - begin // 2 * 2
        return both[..., first : first + end - begin].astype(_INT4)

    return LazyArray(shape, _INT4, read)
