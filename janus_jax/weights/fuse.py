"""Fuses kernels that read the same input: a decoding step then has four matrix products per layer instead of seven."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.config import LlamaConfig
from janus_jax.sharding import flatten, is_stacked, unflatten

_GROUPS = {"self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")), "mlp": ("gate_up_proj", ("gate_proj", "up_proj"))}
# The linear layers that a fused one holds.
MEMBERS = dict(_GROUPS.values())
_FIRST = re.compile(r"language_model/layers(_\d+)?/(self_attn/q|mlp/gate)_proj/\w+")


def fusible(config: LlamaConfig) -> bool:
    """Whether q, k and v have the same shape; with fewer key/value heads than heads they cannot be stacked."""
    return config.heads == config.kv_heads


def fuse(params: Mapping[str, Any], delete: bool = False) -> dict[str, Any]:
    """`params` of `Janus` for `Janus(fused=True)`, quantized or not.

    Kernels are stacked along a new axis, so that a mesh splits the heads of each as before.

    Args:
      params: with layers stacked or separate.
      delete: free the memory of each kernel once it has been fused.
    """
    flat = flatten(params)
    for path in [path for path in flat if _FIRST.fullmatch(path)]:
        *parents, module, _, leaf = path.split("/")
        name, members = _GROUPS[module]
        folder = "/".join((*parents, module))
        taken = [flat.pop(f"{folder}/{member}/{leaf}") for member in members]
        flat[f"{folder}/{name}/{leaf}"] = _stack(taken, int(is_stacked(path)))
        if delete:
            jax.block_until_ready(flat[f"{folder}/{name}/{leaf}"])
            for x in taken:
                x.delete()
    return unflatten(flat)


@functools.partial(jax.jit, static_argnums=1)
def _stack(kernels: Sequence[jax.Array], axis: int) -> jax.Array:
    return jnp.stack(kernels, axis)
