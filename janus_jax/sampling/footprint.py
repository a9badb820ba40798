"""The memory that a model's parameters take, computed before anything is allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax.config import JanusConfig
from janus_jax.io.messages import one_line
from janus_jax.sampling import memory
from janus_jax.sharding import flatten
from janus_jax.weights.quantize import FORMS, array_bytes, is_quantized, scale_shape
from janus_jax.weights.torch_weights import abstract_params


def params_bytes(
    config: JanusConfig, dtype: Any, weights: str | None = None, shardings: Mapping[str, Any] | None = None
) -> int:
    """Bytes of a model's parameters, with `shardings` those on one device; see `load` for `dtype` and `weights`.

    Raises: ValueError for int4 kernels that no group divides, see `quantize`.
    """
    spread = flatten(shardings) if shardings else {}
    total = 0
    apart = any(path.startswith("language_model/layers_0/") for path in spread)
    for path, x in flatten(abstract_params(config, scan_layers=not apart)).items():
        shape = spread[path].shard_shape(x.shape) if spread else x.shape
        if weights is None or not is_quantized(path):
            total += array_bytes(shape, dtype)
            continue
        scales = scale_shape(path, x.shape, weights)
        # On a mesh, each of them is split as the kernel is, but for int4's groups.
        kept = len(scales) - (weights == "int4")
        scales = (*shape[:kept], *scales[kept:])
        total += array_bytes(shape, weights) + array_bytes(scales, dtype if weights == "int4" else np.float32)
    return total


def refuse_too_large(
    name: Any,
    config: JanusConfig,
    dtype: Any,
    weights: str | None,
    shardings: Mapping[str, Any] | None,
    mesh: Mesh | None,
    stored: bool = False,
    adapter: int = 0,
) -> None:
    """Raises OutOfMemory if the parameters for `load`'s arguments do not fit in the memory that is free now.

    On a CPU that is the memory that the system reports as available, including the page cache. If the free memory is
    unknown, nothing is refused. With `stored`, the checkpoint itself has `weights`, so no other form is suggested.
    `adapter` is how many parameters there are beside them.
    """

    def bytes_of(dtype: Any, weights: str | None) -> int:
        return params_bytes(config, dtype, weights, shardings) + array_bytes((adapter,), dtype)

    need = bytes_of(dtype, weights)  # refuses what cannot be int4, however much is free
    devices = jax.devices()[:1] if mesh is None else list(mesh.local_devices)
    free = memory.least_available_bytes(mesh)
    if free is None:
        return
    if devices[0].platform == "cpu":
        free //= len(devices)  # which share it
    if need <= free:
        return
    narrow = jnp.bfloat16 if np.dtype(dtype).itemsize > 2 else dtype
    options = {"dtype='bfloat16'": (narrow, weights)}
    for form in () if stored else FORMS:
        options |= {f"weights={form!r}": (dtype, form), f"dtype='bfloat16', weights={form!r}": (narrow, form)}
    sizes = {}
    for option, how in options.items():
        with contextlib.suppress(ValueError):  # no groups for int4
            sizes[option] = bytes_of(*how)
    sizes = {option: size for option, size in sizes.items() if size <= free}
    count = len(jax.devices()) if mesh is None and devices[0].platform != "cpu" else 1
    if not sizes and need <= free * count:
        sizes = {f"a mesh, as mesh={{'tensor': {count}}}": need // count}
    cure = next((f"load with {option} ({gib(size)})" for option, size in sizes.items()), None)
    what = "parameters and the adapter" if adapter else "parameters"
    where = f"each {devices[0].platform} device has" if mesh else f"the {devices[0].platform} has"
    raise memory.OutOfMemory(
        f"{one_line(name)}: the {what} take {gib(need)} in {weights or np.dtype(dtype)}, "
        f"but {where} {gib(free)} free; "
        + (cure or "neither bfloat16 nor int4 nor a mesh of the devices here would fit, so free memory")
    )


def gib(size: float) -> str:
    """`size` bytes in GiB, for messages."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
