"""Exports: checkpoint folders for `janus_jax.load` and `convert/to_torch.py`, and folders of adapters.

On a disk they are staged and renamed; in a store they are written in place, and complete with their last object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.config import original_config
from janus_jax.io.stores import StorePath
from janus_jax.io.whole.folders import Staging
from janus_jax.processes import from_first
from janus_jax.processing.processor_files import PROCESSOR_FILES, TOKENIZER_FILES, copy_files
from janus_jax.weights import checkpoint
from janus_jax.weights.adapters.peft_files import CONFIG, is_adapter
from janus_jax.weights.adapters.peft_writing import write_adapter
from train.config import TrainConfig
from train.run.distributed import say, together
from train.step.init import folder_of
from train.step.leaves import adapter_of
from train.step.state import Params

_LAST = ("config.json", CONFIG)  # without which nobody takes a folder for a checkpoint or an adapter


def is_exported(folder: pathlib.Path) -> bool:
    """Whether there is a complete export in `folder`."""
    if isinstance(folder, StorePath):
        return any((folder / name).is_file() for name in _LAST)
    return checkpoint.has_arrays(folder / checkpoint.PARAMS) or is_adapter(folder)


def write_export(folder: pathlib.Path, config: TrainConfig, trained: Params, frozen: Params):
    """Writes the new folder `folder`: the model in bfloat16 with the files of the run's tokenizer, or the run's adapter
    as PEFT does. Every process of the run calls it."""
    if config.adapter is not None:
        _export_adapter(folder, config, trained)
        return
    num_bytes = 2 * sum(leaf.size for leaf in jax.tree.leaves((trained, frozen)))
    with _staged(folder, num_bytes) as staging:
        with together():
            if jax.process_index() == 0:
                tokenizer = folder_of(config.tokenizer or config.init_from)
                copy_files(tokenizer, staging, TOKENIZER_FILES + PROCESSOR_FILES)
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype("bfloat16"), tree))
        params = cast({**trained, **frozen})
        # Orbax's processes wait for each other; in a store each writes what it has.
        with together() if isinstance(staging, StorePath) else contextlib.nullcontext():
            checkpoint.save_params(staging / checkpoint.PARAMS, params)
        with together():
            if jax.process_index() == 0:
                checkpoint.write_json(staging / "config.json", exported_config(config))


def _export_adapter(folder: pathlib.Path, config: TrainConfig, trained: Params):
    mesh = jax.tree.leaves(trained)[0].sharding.mesh
    # Replicated to every process, however the mesh splits them.
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(trained)
    num_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    with _staged(folder, num_bytes) as staging, together():
        if jax.process_index() == 0:
            host = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)
            with _local(staging) as place:
                write_adapter(place, adapter_of(config, host), config.model)


@contextlib.contextmanager
def _local(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`folder` itself, or a local one whose files are written there in the end, what makes it complete last."""
    if not isinstance(folder, StorePath):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="janus_jax-") as name:
        yield pathlib.Path(name)
        for path in sorted(pathlib.Path(name).iterdir(), key=lambda path: path.name in _LAST):
            (folder / path.name).upload(path)


@contextlib.contextmanager
def _staged(folder: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """Like `staging.staged`, for all processes: process 0 creates the folder and moves it into place.

    In a store it is `folder` itself, emptied of what a killed export left.
    """
    if isinstance(folder, StorePath):
        with together():
            if jax.process_index() == 0:
                folder.rmtree()
        yield folder
        return
    staging = None
    try:
        with together():
            if jax.process_index() == 0:
                _clear(folder)
                staging = Staging(folder, num_bytes=num_bytes, note=say)
        yield pathlib.Path(from_first(str(staging.folder) if staging else ""))
        with together():
            if staging:
                staging.finish()
    except BaseException:
        if staging:
            staging.discard()
        raise


def _clear(folder: pathlib.Path):
    """Removes the files of a killed export from before exports were staged."""
    names = {"config.json", *TOKENIZER_FILES, *PROCESSOR_FILES}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in names:
            path.unlink()
        elif path.name.startswith(f"{checkpoint.PARAMS}.orbax-checkpoint-tmp"):
            shutil.rmtree(path)


def exported_config(config: TrainConfig) -> dict[str, Any]:
    """The config.json of the run's exports; ValueError if the original dialect cannot express the model's sizes."""
    return original_config(dataclasses.replace(config.model, dtype="bfloat16"))
