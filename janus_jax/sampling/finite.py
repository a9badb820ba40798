"""Detects and explains values that are not finite (NaN or infinite), before anything is drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from janus_jax.model.janus import Janus
from janus_jax.model.precision import residual_dtype
from janus_jax.sharding import flatten


class NotFinite(ValueError):
    """The model's outputs for some rows of a batch are not finite, so that anything drawn from them would be noise.

    It ends the whole call: nothing is returned. The other rows were fine, and have the same results in a call without
    the bad rows.

    Attributes:
      rows: indices of the bad rows, in the order of the call.
      unit: what a row is: 'image', 'conversation'.
      reason: what is wrong, and what to do.
    """

    def __init__(self, unit: str, rows: Sequence[int], reason: str):
        self.unit, self.rows, self.reason = unit, list(rows), reason
        others = f" and {len(self.rows) - 1} more" if len(self.rows) > 1 else ""
        super().__init__(f"{unit} {self.rows[0]}{others}: {reason}")

    def of_batch(self, batch: slice) -> NotFinite:
        """The same with indices in the whole call, for rows of one `batch` of it, which may have padding at its end."""
        rows = [batch.start + row for row in self.rows if batch.start + row < batch.stop]
        return NotFinite(self.unit, rows or [batch.start], self.reason)


def on_host(x: jax.Array) -> np.ndarray:
    """All of `x` as a host array, including shards on other processes' devices."""
    return np.asarray(x) if jax.process_count() == 1 or x.is_fully_replicated else process_allgather(x, tiled=True)


def note_failure(failed: jax.Array, logits: jax.Array, step: jax.Array | int) -> jax.Array:
    """`failed` [B] int32 updated for `logits` [B, V]: the first step at which a row's logits were not finite, or -1."""
    return jnp.where((failed < 0) & ~jnp.isfinite(logits).all(-1), step, failed).astype(jnp.int32)


def refuse_failed(model: Janus, params: Any, failed: jax.Array, unit: str, drawn: str, guidance: float = 1):
    """Raises NotFinite if a row of `failed` (see `note_failure`) has failed.

    Args:
      unit, drawn: names of a row, and of what is drawn in a step.
      guidance: the guidance weight, which overflows the logits if large.
    """
    if not bool(_any_failed(failed)):
        return
    steps = on_host(failed)
    rows = np.flatnonzero(steps >= 0)
    first = steps[rows[0]]
    where = f"after {drawn} {first - 1}" if first else "after the prompt"
    reason = f"the logits are not finite {where} (computed in {jnp.dtype(model.dtype)})"
    raise NotFinite(unit, rows.tolist(), f"{reason}: {_cure(model, params, guidance)}")


@jax.jit
def _any_failed(failed: jax.Array) -> jax.Array:
    return (failed >= 0).any()


def refuse_pixels(model: Janus, params: Any, finite: jax.Array):
    """Raises NotFinite if the VQ decoder's values for an image are not finite; `finite` [B] bool."""
    rows = np.flatnonzero(~on_host(finite))
    if len(rows):
        reason = f"the VQ decoder's pixels are not finite (computed in {jnp.dtype(residual_dtype(model.dtype))})"
        raise NotFinite("image", rows.tolist(), f"{reason}: {_cure(model, params)}")


def refuse_codes(model: Janus, params: Any, codes: np.ndarray):
    """Raises NotFinite if codes [B, T] contain -1, by which the VQ encoder marks values that are not finite."""
    rows = np.flatnonzero((codes < 0).any(axis=1))
    if len(rows):
        reason = "the VQ encoder's values are not finite (computed in float32)"
        raise NotFinite("image", rows.tolist(), f"{reason}: {_cure(model, params)}")


def _cure(model: Janus, params: Any, guidance: float = 1) -> str:
    # A value beyond float16 becomes infinite as it is read; NaN was in the file.
    half = jnp.dtype(model.dtype) == jnp.float16
    damaged = [path for path, x in flatten(params).items() if not _all_true(x, _not_nan if half else jnp.isfinite)]
    if half and not damaged:
        return "load with dtype=float32 or bfloat16" + (f", or lower cfg_weight {guidance:g}" if guidance > 100 else "")
    if damaged:
        more = f" and {len(damaged) - 1} more parameters have" if len(damaged) > 1 else " has"
        return f"{damaged[0]}{more} values that are not finite; the checkpoint is damaged, get or convert it again"
    if guidance > 100:
        return f"lower cfg_weight {guidance:g}"
    return "the parameters are finite but overflow, unlike those of a trained model; check the checkpoint"


def _not_nan(x: jax.Array) -> jax.Array:
    return ~jnp.isnan(x)


def _all_true(x: jax.Array, check: Callable[[jax.Array], jax.Array]) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating) or bool(check(x).all())
