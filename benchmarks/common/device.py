"""What a benchmark's processes share: the device, its bandwidth, a clock, and weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_jax.config import JanusConfig

if TYPE_CHECKING:  # torch's processes do without them
    from janus_jax.model.janus import Janus
    from janus_jax.model.kv_cache import KVCache

COPY_BYTES = 1 << 30  # beyond every cache
# Normal numbers of a usual spread. Their count is odd, so that rows of a kernel differ.
_VALUES = 1_000_003


def answer(run: dict[str, Any], framework: str = "jax") -> int:
    """Prints what a variant's process measured, with the device it was on; returns the exit code."""
    print(json.dumps(run | {"device": device(framework)}))
    return 0


def device(framework: str = "jax") -> str:
    """The device that this process computes on, in words."""
    if framework == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    else:
        import jax

        devices = jax.devices()
        if devices[0].platform != "cpu":
            return f"{len(devices)} x {devices[0].device_kind}"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def default_dtype() -> str:
    """What `janus_jax.load` takes on this device."""
    from janus_jax import loading

    return loading.default_dtype(loading.first_device(None))


def copy_bandwidth(num_bytes: int | None = None) -> float:
    """Bytes/s that this device reads and writes while it adds 1 to a large array in place: a copy without page faults.

    Args:
      num_bytes: of the array; default COPY_BYTES.
    """
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(step(jnp.zeros((num_bytes or COPY_BYTES) // 4, jnp.float32)))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):  # so many that the host's part does not count
            x = step(x)
        jax.block_until_ready(x)
        seconds.append((time.perf_counter() - began) / 4)
    return 2 * x.nbytes / statistics.median(seconds)


def product_rates(dtype: str, num_bytes: int | None = None) -> tuple[float, float]:
    """Bytes/s of a large matrix read by its product with a vector, and FLOP/s of a product of square matrices.

    Args:
      num_bytes: of the large matrix; default COPY_BYTES.
    """
    import jax
    import jax.numpy as jnp

    width = min(2048, math.isqrt((num_bytes or COPY_BYTES) // 4))
    matrix = jnp.ones(((num_bytes or COPY_BYTES) // width // jnp.dtype(dtype).itemsize, width), dtype)
    product = jax.jit(lambda a, b: jnp.einsum("FD,TD->FT", a, b))

    def fastest(rows: int, times: int) -> float:
        x = jnp.ones((times, width), dtype)
        jax.block_until_ready(product(matrix[:rows], x))
        return min(timed(product, matrix[:rows], x)[0] for _ in range(5))

    square = min(width, len(matrix))
    return matrix.nbytes / fastest(len(matrix), 1), 2 * square * width**2 / fastest(square, width)


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until all arrays of `function(*args)` are there, and these."""
    import jax

    began = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - began, result


@functools.cache
def _values() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, _VALUES).astype(np.float32)


def random_array(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """One block of random numbers, over and over: as good as others for timing, and made at the speed of a copy.

    Integers are spread over the levels of int4: products by zeros take less time than others on a GPU.
    """
    integers = np.dtype(dtype).name.startswith("int")
    values = np.clip(np.rint(_values() * 150), -7, 7) if integers else _values()
    return np.resize(values.astype(dtype), shape)


def random_model(
    config: JanusConfig, dtype: str, how: str = "", parts: Sequence[str] | None = None
) -> tuple[Janus, dict[str, Any]]:
    """The model and parameters that `janus_jax.load` would give for random weights, on the default device.

    Args:
      how: 'int8' or 'int4' for such weights, 'fused' or 'apart' for products that are or are not, 'scanned' or
        'unstacked' for that layout of the layers; '' for load's defaults.
      parts: of the model; default all.
    """
    import jax
    import jax.numpy as jnp

    from janus_jax.loading import layout
    from janus_jax.model.janus import Janus
    from janus_jax.weights.fuse import fuse, fusible
    from janus_jax.weights.quantize import FORMS, quantize
    from janus_jax.weights.torch_weights import abstract_params

    attributes = layout(config, jax.default_backend())
    if how in ("scanned", "unstacked"):
        attributes["scan_layers"] = how == "scanned"
    if how in ("fused", "apart"):
        attributes["fused"] = how == "fused" and fusible(config.language)
    abstract = abstract_params(config, attributes["scan_layers"], dtype)
    wanted = {part: abstract[part] for part in parts or abstract}
    params = jax.tree.map(lambda leaf: jnp.asarray(random_array(leaf.shape, leaf.dtype)), wanted)
    params = quantize(params, how, delete=True) if how in FORMS else params
    params = fuse(params, delete=True) if attributes["fused"] else params
    return Janus(config, jnp.dtype(dtype), jnp.dtype(dtype), **attributes), params


def filled_cache(model: Janus, rows: int, slots: int, filled: int) -> KVCache:
    """A cache of zeros whose first `filled` slots count as tokens: a step takes as long over it as over any other."""
    import jax.numpy as jnp

    from janus_jax.sampling.cache import empty_cache

    cache = empty_cache(model, rows, slots)
    mask = jnp.broadcast_to(jnp.arange(slots) < filled, (rows, slots))
    positions = jnp.full(rows, filled, jnp.int32)
    return dataclasses.replace(cache, mask=mask, length=jnp.int32(filled), positions=positions)
