"""Log-probabilities of pairs by the reference of DPO: computed once, and kept beside the pairs with whose they are."""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.io.files import read_bytes
from janus_jax.io.messages import one_line
from janus_jax.io.whole.files import write_file
from janus_jax.sharding import flatten
from train.data.prepared import Prepared

FILE = "reference.npz"
_MOST = 1 << 32  # bytes


def params_digest(params: Any) -> str:
    """What tells nested dicts of arrays from others, on any mesh; all processes of a run call it, and get the same.

    Their values count, not their dtype: parameters in bfloat16 and the same ones in float32 have one digest.
    """
    leaves = flatten(params)
    meshes = {leaf.sharding.mesh for leaf in leaves.values() if isinstance(leaf.sharding, NamedSharding)}
    whole = NamedSharding(meshes.pop(), PartitionSpec()) if meshes else None
    sums = jax.jit(lambda tree: jax.tree.map(_sums, tree), out_shardings=whole)(leaves)
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves.items()):
        digest.update(f"{path} {leaf.shape}".encode() + np.asarray(sums[path].addressable_data(0)).tobytes())
    return digest.hexdigest()[:16]


def _sums(leaf: jax.Array) -> jax.Array:
    """Two numbers of 32 bits, by the value and the place of each element; exact, and so the same in any order."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = _mixed(bits ^ _mixed(place))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), _mixed(mixed + jnp.uint32(1)).sum(dtype=jnp.uint32)])


def _mixed(x: jax.Array) -> jax.Array:
    # The finalizer of MurmurHash3.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def store_reference(pairs: Prepared, digest: str, values: np.ndarray) -> None:
    """Keeps float64 [N, 2], log-probabilities of the chosen and the rejected picture of each pair, for later runs.

    Args:
      digest: `params_digest` of the reference.
    Raises: OSError if nothing can be written beside the pairs.
    """
    if values.shape != (len(pairs), 2):
        raise ValueError(f"log-probabilities of {len(pairs)} pairs must be [{len(pairs)}, 2], got {list(values.shape)}")
    file = io.BytesIO()
    np.savez(file, reference=digest, pairs=pairs.fingerprint, values=values.astype(np.float64))
    write_file(pairs.folder / FILE, file.getvalue())


def stored_reference(pairs: Prepared, digest: str) -> np.ndarray | None:
    """What `store_reference` has kept, float64 [N, 2]; None if nothing has been.

    Raises: ValueError in one line if it is of another reference than that of `digest`, or of other pairs, or damaged.
    """
    path = pairs.folder / FILE
    if not path.exists():
        return None
    told, cure = one_line(path), "delete it, and the run computes them again"
    try:
        with np.load(io.BytesIO(read_bytes(path, _MOST)), allow_pickle=False) as found:
            reference, fingerprint, values = str(found["reference"]), str(found["pairs"]), found["values"]
        if values.dtype != np.float64 or values.shape != (len(values), 2) or not np.isfinite(values).all():
            raise ValueError(f"values of {values.dtype} {list(values.shape)}")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{told} is damaged ({one_line(error)}); {cure}") from None
    if fingerprint != pairs.fingerprint or len(values) != len(pairs):
        raise ValueError(f"{told} has log-probabilities of other pairs than those in its folder now; {cure}")
    if reference != digest:
        raise ValueError(
            f"{told} has log-probabilities of another reference ({one_line(reference, 20)}) than the checkpoint that "
            f"this run starts from ({digest}); start from that one, or {cure}"
        )
    return values
