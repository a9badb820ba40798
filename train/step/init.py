"""The first state of a run: each part of the model from the source in the config, or random."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from janus_jax.config import JanusConfig, dialect_of
from janus_jax.model.janus import Janus, init_params
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.part_configs import differing_part
from janus_jax.weights.parts import open_part
from janus_jax.weights.torch_weights import LazyParams, place, read_raw_config
from train.config import TrainConfig
from train.overrides import flat
from train.step.earlier import open_run
from train.step.state import Params, TrainState, make_optimizer, split, start_state, state_shardings


def first_state(config: TrainConfig, mesh: Mesh, progress: bool = False) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen parameters, on `mesh`.

    Each part is read from its source in the config, directly into its shards; parts without a source are random.

    Raises: FileNotFoundError or ValueError, in one line, for sources that are missing or of another model.
    """
    shardings, frozen_shardings = state_shardings(config, mesh)
    sources = open_sources(config)
    dtypes = dict.fromkeys(shardings.trained, "float32") | dict.fromkeys(frozen_shardings, config.frozen_dtype)
    of_part = {**shardings.trained, **frozen_shardings}
    params = _random_parts(config, {part: of_part[part] for part in of_part if part not in sources}, dtypes)
    for part, leaves in sources.items():
        params |= place(leaves, dtypes[part], {part: of_part[part]}, progress=progress)
    trained, frozen = split(params, config.stage)
    start = functools.partial(start_state, make_optimizer(config))
    return jax.jit(start, out_shardings=shardings, donate_argnums=0)(trained), frozen


def _random_parts(config: TrainConfig, shardings: Params, dtypes: Mapping[str, str]) -> Params:
    if not shardings:
        return {}

    def make(key: jax.Array) -> Params:
        made = init_params(Janus(config.model), key)
        return {part: jax.tree.map(lambda x, part=part: x.astype(dtypes[part]), made[part]) for part in shardings}

    return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed))


def open_sources(config: TrainConfig) -> dict[str, LazyParams]:
    """The parameters of each part that has a source in the config, still in their files."""
    parts: dict[str, LazyParams] = {}
    if config.init_from:
        folder = pathlib.Path(config.init_from)
        found, leaves = open_run(folder) or _open_folder(folder)
        _check_sizes("init_from", folder, found, config.model)
        parts = _by_part(leaves)
    for key, part in (
        ("language_from", "language_model"),
        ("vision_from", "vision_model"),
        ("vq_from", "gen_vision_model"),
    ):
        if path := getattr(config, key):
            parts[part] = _open_one(key, pathlib.Path(path), config, part)
    return parts


def _open_folder(folder: pathlib.Path) -> tuple[JanusConfig, LazyParams]:
    try:
        checkpoint = open_checkpoint(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"init_from: {error}; it must be a Janus checkpoint or an earlier run's workdir"
        ) from None
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
