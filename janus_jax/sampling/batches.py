"""Runs work on many rows in batches that fit in memory.

Everything about batches is here: the memory that a row takes, how many rows fit, splitting, padding, putting them on
the devices, halving the batches if memory runs out, and joining the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.config import LlamaConfig, SiglipConfig, VQConfig
from janus_jax.io.progress import shown, step_bar
from janus_jax.model.janus import Janus
from janus_jax.model.kv_cache import cache_bytes
from janus_jax.model.precision import residual_dtype
from janus_jax.sampling.finite import NotFinite, on_host
from janus_jax.sampling.memory import OutOfMemory, least_available_bytes
from janus_jax.sampling.sampler import check_count
from janus_jax.sharding import activation_spec, batch_shards
from janus_jax.weights.quantize import array_bytes


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some rows of a call, padded to `size` rows.

    Attributes:
      rows: which of the call's rows.
      size: number of rows with padding, which repeats the last row.
      mesh: the mesh over which the rows are split; None for one device.
      progress: called with the number of steps done; None if progress is not shown.
    """

    rows: slice
    size: int
    mesh: Mesh | None = None
    progress: Callable[[int], Any] | None = None

    def put(self, x: Any) -> jax.Array | None:
        """The batch's rows of `x`, which has all rows of the call, padded and on the devices; None stays None."""
        return None if x is None else self.put_own(x[self.rows])

    def put_prompts(self, prompts: np.ndarray) -> jax.Array:
        """The batch's rows of `prompts`, of which there is one for each row of the call, or one for all."""
        return put(prompts, self.mesh) if len(prompts) == 1 else self.put(prompts)

    def put_own(self, x: Any) -> jax.Array:
        """`x`, which has only the batch's own rows, padded and on the devices."""
        return put(x[np.minimum(np.arange(self.size), len(x) - 1)], self.mesh)


def put(x: Any, mesh: Mesh | None) -> jax.Array:
    """`x` on the device, or split over the mesh by its first axis."""
    if mesh is None:
        return jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), mesh))
    x = np.asarray(x)
    spec = activation_spec(x.shape, ("batch",) + (None,) * (x.ndim - 1), mesh.shape)
    # Each process puts the shards of its own devices.
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), x.__getitem__)


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context in which computations see `mesh`, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def each_using(mesh: Mesh | None, pieces: Iterator[jax.Array]) -> Iterator[np.ndarray]:
    """`pieces` as host arrays, computed under the mesh."""
    while True:
        # The mesh is never set across a yield, where it would leak into the caller's code.
        with using(mesh):
            piece = next(pieces, None)
        if piece is None:
            return
        yield on_host(piece)


def in_batches(
    work: Callable[[Batch], np.ndarray],
    total: int,
    size: int,
    mesh: Mesh | None,
    *,
    name: str,
    unit: str = "image",
    multiple: int | None = None,
    steps: int | None = None,
    progress: bool | None = False,
) -> np.ndarray:
    """Runs `work` on `total` rows in equal batches of at most `size`, and joins the results.

    Batches are halved if the device runs out of memory, unless `mesh` spans processes.

    Args:
      work: takes a Batch, runs under the mesh, and returns a host array with one row for each of the batch.
      name, unit: names of the work and of a row, for the progress bar and for errors.
      multiple: sizes are multiples of it; default the number of shards of the mesh.
      steps: number of steps that `work` reports to `Batch.progress`; by default one, when it is done.
      progress: see `progress.shown`.
    Raises: OutOfMemory if not even one row fits; NotFinite with indices among all rows of the call.
    """
    multiple = multiple or batch_shards(mesh)
    while True:
        cut, padded = even_batches(total, size, multiple)
        with step_bar(name, (steps or 1) * len(cut), shown(progress)) as bar:
            results = []
            try:
                for rows in cut:
                    batch = Batch(rows, padded, mesh, None if bar.disable else bar.update)
                    results.append(_run(work, batch)[: rows.stop - rows.start])
                    if steps is None:
                        bar.update()
                return np.concatenate(results)
            except jax.errors.JaxRuntimeError as error:
                if not OutOfMemory.says(error):
                    raise
                if padded <= multiple:
                    raise OutOfMemory(f"{name} one {unit} at a time does not fit in the device's memory") from error
                if mesh is not None and mesh.is_multi_process:
                    # Other processes may have had enough memory: they wait in this batch, and would not retry it.
                    raise OutOfMemory(
                        f"{name} {padded} {unit}s at a time does not fit in the device's memory, and several processes "
                        f"cannot retry with {padded // 2}; use a smaller batch"
                    ) from error
                size = padded // 2


def _run(work: Callable[[Batch], np.ndarray], batch: Batch) -> np.ndarray:
    try:
        with using(batch.mesh):
            return work(batch)
    except NotFinite as error:
        raise error.of_batch(batch.rows) from None


def even_batches(total: int, size: int, multiple: int = 1) -> tuple[list[slice], int]:
    """Splits `total` rows into the fewest equal batches of at most `size` (at least `multiple`).

    Returns: the rows of each, and the size to pad each of them to: a multiple of `multiple`.
    """
    size = max(size // multiple, 1) * multiple
    count = -(-total // size)
    even = -(-total // count)
    padded = -(-even // multiple) * multiple
    return [slice(start, min(start + padded, total)) for start in range(0, total, padded)], padded


def first(total: int, size: int, mesh: Mesh | None = None) -> Batch:
    """The first Batch of `in_batches`, for callers that compile ahead or need only one."""
    cut, padded = even_batches(total, size)
    return Batch(cut[0], padded, mesh)


def fitting(total: int, per_row: int, mesh: Mesh | None, coming: Any) -> int:
    """How many of `total` rows, of `per_row` bytes each, fit in the memory that is free now; at least one.

    Args:
      mesh: the mesh over which the rows are split; None for one device.
      coming: a tree whose shapes are arrays that are still to be allocated.
    """
    shards = batch_shards(mesh)
    usable = usable_bytes(mesh, coming)
    if usable is None:
        return -(-total // shards) * shards
    return max(1, usable // max(per_row // shards, 1))


def usable_bytes(mesh: Mesh | None, coming: Any) -> int | None:
    """Bytes that batches may take of each device, or None if unknown; arguments as for `fitting`."""
    free = least_available_bytes(mesh)
    if free is None:
        return None
    shapes = (x for x in jax.tree.leaves(coming) if isinstance(x, jax.ShapeDtypeStruct))
    return (free - sum(array_bytes(x.shape, x.dtype) for x in shapes)) * 8 // 10


# ---------------------------------------------------------------- memory of a row


def bytes_to_draw(model: Janus, pair: int, length: int) -> int:
    """Bytes of memory per image while the codes for prompts [pair, length] are drawn."""
    c = model.config
    cache = cache_bytes(c.language, pair, length + c.gen_vision.num_tokens, model.cache_dtype)
    return cache + _prefill_bytes(c.language, pair, length)


def bytes_to_answer(model: Janus, length: int, images: int, new_tokens: int) -> int:
    """Bytes of memory for a conversation of `length` tokens with `images` images while `new_tokens` are drawn."""
    c = model.config
    cache = cache_bytes(c.language, 1, length + new_tokens, model.cache_dtype)
    return cache + max(_prefill_bytes(c.language, 1, length), images * _image_bytes(c.vision))


def bytes_to_go_on(model: Janus, prefix: int, length: int, new_tokens: int) -> int:
    """Bytes of memory for `length` tokens after a cached prefix, with a cache of its own, and `new_tokens` drawn."""
    c = model.config.language
    cache = cache_bytes(c, 1, prefix + length + new_tokens, model.cache_dtype)
    return cache + length * (4 * c.heads * (prefix + length) + (3 * c.mlp_dim + 6 * c.width) * 4)


def bytes_of_pixels(config: VQConfig, dtype: Any) -> int:
    """Bytes of memory per image while the VQ model decodes or encodes it for a model of `dtype`."""
    # Convolutions at full resolution hold a few activations, and im2col copies of some, at a time.
    return 16 * config.image_size**2 * config.ch * max(config.ch_mult[:2]) * residual_dtype(dtype).itemsize


def _prefill_bytes(c: LlamaConfig, rows: int, length: int) -> int:
    return rows * length * (4 * c.heads * length + (3 * c.mlp_dim + 6 * c.width) * 4)


def _image_bytes(c: SiglipConfig) -> int:
    pixels = c.image_size**2 * 3 * 4
    return pixels + c.num_patches * (4 * c.heads * c.num_patches + (3 * c.mlp_dim + 6 * c.width) * 4)


def images_at_a_time(
    model: Janus, params: Any, mesh: Mesh | None, ids: np.ndarray, total: int, batch_size: int | None
) -> int:
    """How many of `total` images to draw at once from prompts `ids` [B, rows, T]: `batch_size`, or as many as fit."""
    if batch_size is not None:
        return check_count("batch_size", batch_size)
    return fitting(total, bytes_to_draw(model, *ids.shape[1:]), mesh, coming=params)


def pictures_at_a_time(
    model: Janus, params: Any, mesh: Mesh | None, total: int, batch_size: int | None = None, dtype: Any = None
) -> int:
    """How many of `total` images to encode or decode at once in `dtype` (default the model's)."""
    if batch_size is not None:
        return check_count("batch_size", batch_size)
    per_image = bytes_of_pixels(model.config.gen_vision, dtype or model.dtype)
    # More at a time is no faster, and every other size is one more program to compile.
    return min(16 * batch_shards(mesh), fitting(total, per_image, mesh, coming=params))
