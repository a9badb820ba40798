"""The first state of a run: each part of the model from the source in the config, or random."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax.config import JanusConfig, dialect_of
from janus_jax.hub import hub_id, resolve
from janus_jax.io.stores import as_path
from janus_jax.model.janus import Janus, init_params
from janus_jax.sharding import flatten, param_shardings, unflatten
from janus_jax.weights.adapters.trainable import trainable
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.part_configs import differing_part
from janus_jax.weights.parts import open_part
from janus_jax.weights.quantize import quantize_leaf
from janus_jax.weights.torch_weights import LazyParams, abstract_params, parse_dtype, place, read_raw_config
from train.config import TRAINED, AdapterConfig, TrainConfig
from train.overrides import flat
from train.step.earlier import open_run
from train.step.leaves import abstract_leaves, first_adapter, joined, split_leaves
from train.step.state import Params, TrainState, make_optimizer, start_state, state_shardings


def first_state(config: TrainConfig, mesh: Mesh, progress: bool = False) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen parameters, on `mesh`.

    Each part is read from its source in the config, directly into its shards; parts without a source are random.

    Raises: FileNotFoundError or ValueError, in one line, for sources that are missing or of another model.
    """
    shardings, _ = state_shardings(config, mesh)
    wanted = flatten(joined(*abstract_leaves(config)))
    sources = open_sources(config)
    params = _random_parts(config, mesh, [part for part in abstract_params(config.model) if part not in sources])
    for leaves in sources.values():
        params |= _read(config, mesh, leaves, wanted, progress)
    trained, frozen = split_leaves(params, config)
    if config.adapter is not None:
        beside = (jax.device_put(own, param_shardings(own, mesh)) for own in trainable(frozen, first_adapter(config)))
        trained, frozen = (joined(own, others) for own, others in zip(beside, (trained, frozen), strict=True))
    start = functools.partial(start_state, make_optimizer(config))
    return jax.jit(start, out_shardings=shardings, donate_argnums=0)(trained), frozen


def _read(config: TrainConfig, mesh: Mesh, leaves: LazyParams, wanted: Mapping[str, Any], progress: bool) -> Params:
    """`leaves` of a checkpoint in the dtypes of `wanted`, whose paths are joined; its plain kernels quantized if it is.

    Kernels are quantized as soon as they are read, since there may be no room for all of them before.
    """
    form, cast = config.adapter.weights if config.adapter else None, {}
    for path, leaf in leaves.items():
        name = "/".join(path)
        dtype = wanted[name].dtype
        if _is_plain(leaf):
            leaf = leaf.astype(dtype if _is_plain(wanted[name]) else parse_dtype(config.frozen_dtype), name)
        cast[path] = leaf

    def made(name: str, x: jax.Array) -> dict[str, jax.Array]:
        if _is_plain(wanted[name]) or not _is_plain(x):
            return {name: x}
        return quantize_leaf(name, x, form, delete=True, dtype=config.frozen_dtype)

    shapes = unflatten({"/".join(path): leaf for path, leaf in cast.items()})
    return place(cast, None, param_shardings(shapes, mesh), progress=progress, made=made)


def _is_plain(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _random_parts(config: TrainConfig, mesh: Mesh, parts: Sequence[str]) -> Params:
    if not parts:
        return {}
    dtypes = {part: "float32" if part in TRAINED[config.stage] else config.frozen_dtype for part in parts}
    shapes = abstract_params(config.model)
    shardings = param_shardings({part: shapes[part] for part in parts}, mesh)

    def make(key: jax.Array) -> Params:
        made = init_params(Janus(config.model), key)
        return {part: jax.tree.map(lambda x, part=part: x.astype(dtypes[part]), made[part]) for part in parts}

    return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed))


def folder_of(source: str) -> pathlib.Path:
    """The local folder of a path or a hub id; what the hub has is downloaded, unless it was before."""
    return resolve(source) if hub_id(source) else as_path(source)


def open_sources(config: TrainConfig) -> dict[str, LazyParams]:
    """The parameters of each part that has a source in the config, still in their files."""
    parts: dict[str, LazyParams] = {}
    if config.init_from:
        folder = _source("init_from", config.init_from)
        found, leaves = open_run(folder) or _open_folder(folder, config.adapter)
        _check_sizes("init_from", folder, found, config.model)
        parts = _by_part(leaves)
    for key, part in (
        ("language_from", "language_model"),
        ("vision_from", "vision_model"),
        ("vq_from", "gen_vision_model"),
    ):
        if path := getattr(config, key):
            parts[part] = _open_one(key, _source(key, path), config, part)
    return parts


def _source(key: str, source: str) -> pathlib.Path:
    try:
        return folder_of(source)
    except OSError as error:
        raise OSError(f"{key}: {error}") from None


def _open_folder(folder: pathlib.Path, adapter: AdapterConfig | None) -> tuple[JanusConfig, LazyParams]:
    """The model in `folder`, which may be quantized if that is how `adapter` wants it."""
    try:
        checkpoint = open_checkpoint(folder, quantized=adapter is not None)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"init_from: {error}; it must be a Janus checkpoint or an earlier run's workdir"
        ) from None
    if adapter is not None and checkpoint.weights not in (None, adapter.weights):
        raise ValueError(
            f"init_from: {folder} has {checkpoint.weights} weights; set adapter.weights={checkpoint.weights}, or give "
            "the checkpoint that it was converted from"
        )
    return checkpoint.config, checkpoint.leaves


def _open_one(key: str, path: pathlib.Path, config: TrainConfig, part: str) -> LazyParams:
    """One part, from a whole Janus checkpoint or from a separate file."""
    if not path.exists():
        raise FileNotFoundError(f"{key}: {path} does not exist")
    try:
        if path.is_dir() and (path / "config.json").exists() and _is_janus(path):
            checkpoint = open_checkpoint(path)
            if differing := differing_part(checkpoint.config, config.model, part):
                told = "; ".join(f"{k} is {theirs}, the config's model has {ours}" for k, theirs, ours in differing[:4])
                raise ValueError(f"{path} has a {part} of another model: {told}")
            return _by_part(checkpoint.leaves)[part]
        return open_part(path, config.model, part, print if jax.process_index() == 0 else lambda text: None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from None


def _is_janus(folder: pathlib.Path) -> bool:
    try:
        dialect_of(read_raw_config(folder))
    except ValueError:
        return False
    return True


def _by_part(leaves: LazyParams) -> dict[str, LazyParams]:
    parts: dict[str, LazyParams] = {}
    for path, leaf in leaves.items():
        parts.setdefault(path[0], {})[path] = leaf
    return parts


def _check_sizes(key: str, folder: pathlib.Path, found: JanusConfig, wanted: JanusConfig):
    # The dtype in which a checkpoint is stored is not a size of the model.
    theirs, ours = flat(dataclasses.replace(found, dtype=wanted.dtype)), flat(wanted)
    differing = [f"{k} is {theirs[k]}, the config's model has {ours[k]}" for k in ours if theirs[k] != ours[k]]
    if differing:
        raise ValueError(f"{key}: {folder} has another model: {'; '.join(differing[:4])}")
