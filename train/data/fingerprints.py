"""Checks that prepared data fit the model that a run trains: its tokenizer, its sizes, and its VQ model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.io.messages import one_line
from janus_jax.processing.chat import Processor
from janus_jax.sharding import flatten
from train.config import ENCODED, PREFERENCE
from train.data.prepared import Prepared
from train.data.tokenize import resized_by, tokenizer_fingerprint

VQ = "gen_vision_model"
_DRAWN = ("generation", PREFERENCE)  # the kinds that have codes
CODES_PRECISION = "float32"  # in which codes are decided, on every platform
_COMPARED_FROM = 2  # the first format version that hashes parameters as `params_fingerprint` does


def check_folders(folders: Iterable[Prepared], processor: Processor):
    """ValueError in one line for a folder that was prepared for another model."""
    ours = tokenizer_fingerprint(processor)
    for folder in folders:
        settings = folder.meta["settings"]
        if settings["tokenizer"] != ours:
            raise ValueError(f"{folder.folder} was prepared with another tokenizer; prepare it again with this model")
        patches, expected = settings["patches"], processor.config.vision.num_patches
        if folder.kind == "understanding" and patches != expected:
            raise ValueError(f"{folder.folder} was prepared for {patches} patches per image, the model has {expected}")
        resized, expected = settings.get("resized"), list(resized_by(processor.settings))
        if resized and resized != expected:
            raise ValueError(
                f"{folder.folder} stores images resized for other image settings ({resized}, the model's are "
                f"{expected}); prepare it again with this model"
            )
        codes, expected = len(folder[0].codes), processor.config.gen_vision.num_tokens
        if folder.kind in ENCODED and codes != expected:
            raise ValueError(f"{folder.folder} was prepared for {codes} codes per image, the model has {expected}")


def params_fingerprint(params: Any) -> str:
    """A hash of the values of nested dicts of arrays, rounded to bfloat16: a run may have them so, or in float32."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        digest.update(f"{path} {leaf.shape}".encode() + np.asarray(leaf).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def check_codes(folders: Iterable[Prepared], frozen: dict[str, Any], mesh: Mesh) -> list[str]:
    """Compares the VQ model with which each folder's images were encoded with the run's own, on any mesh.

    Every process of a run calls it, and all get the same result.

    Args:
      folders: folders of any kind.
      frozen: the run's frozen parameters, on `mesh`.
    Returns: remarks, one line each, on folders that cannot be checked.
    Raises: ValueError in one line for a folder with the codes of another VQ model.
    """
    folders = [folder for folder in folders if folder.kind in ENCODED]
    remarks, checked = [], []
    for folder in folders:
        if folder.meta["version"] >= _COMPARED_FROM and folder.meta.get("settings", {}).get("vq"):
            checked.append(folder)
        else:
            remarks.append(f"{folder.folder} does not say which VQ model its codes are from, so this is not checked")
    if not checked:
        return remarks
    # Replicated to every process, however the mesh splits them.
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))({VQ: frozen[VQ]})
    ours = params_fingerprint(jax.tree.map(lambda x: x.addressable_data(0), whole))
    for folder in checked:
        settings = folder.meta["settings"]
        theirs, encoded_on = settings["vq"], settings.get("encoded_on")
        if not isinstance(encoded_on, dict):
            remarks.append(f"{folder.folder} does not say how exactly its codes were computed, so this is not checked")
        elif encoded_on.get("precision") != CODES_PRECISION:
            raise ValueError(
                f"{folder.folder} has codes computed in {one_line(encoded_on.get('precision'), 60)}, not in "
                f"{CODES_PRECISION}, so that some are other codes than this model's; prepare it again"
            )
        if theirs != ours:
            raise ValueError(
                f"{folder.folder} was encoded by another VQ model ({theirs}) than the run's {VQ} ({ours}); prepare it "
                "again with the model that the run starts from, or set vq_from to the VQ model of the data"
            )
    return remarks
