"""Reads an earlier run's workdir, for a run that starts from it."""

from __future__ import annotations

import pathlib
from typing import Any

from janus_jax.config import JanusConfig
from janus_jax.io.files import read_json_object
from janus_jax.io.store_access import is_store
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import LazyParams, abstract_params
from train.step.leaves import split

RUN, FROZEN, CHECKPOINTS = "run.json", "frozen", "checkpoints"  # see `train.run.checkpoints` for what each holds
REFERENCE = "reference"  # what reinforcement learning keeps of the first state, with the frozen parameters
COMPLETE = "complete.json"  # see `train.workdir.in_store`


def open_run(folder: pathlib.Path) -> tuple[JanusConfig, LazyParams] | None:
    """The model and the newest parameters of the run in `folder`, still in their files; None if there is no run.

    Raises: ValueError if the run has no complete checkpoint, or one is damaged.
    """
    if not (folder / RUN).exists():
        return None
    try:
        raw = read_json_object(folder / RUN)["config"]
        config, adapter = model_config(raw["model"]), raw.get("adapter")
        trained, frozen = split(abstract_params(config), raw["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RUN} is not a run's description ({error})") from None
    if adapter is not None:
        raise ValueError(
            f"{folder} is a run that trains an adapter; to start from its result, merge its export into the model with "
            "convert/to_torch.py --adapter DIR --merge, and name that folder"
        )
    steps = complete_steps(folder)
    if not steps:
        raise ValueError(f"{folder} has a run without a complete checkpoint; let it save one first")
    leaves = checkpoint.array_leaves(whole(folder / CHECKPOINTS / str(max(steps))) / "trained", trained)
    return config, leaves | (
        checkpoint.array_leaves(whole(folder / FROZEN), frozen, beside=REFERENCE) if frozen else {}
    )


def complete_steps(folder: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints of the run in `folder`."""
    if is_store(folder):
        found = [path.parent for path in (folder / CHECKPOINTS).glob(f"*/{COMPLETE}")]
    else:
        found = list((folder / CHECKPOINTS).glob("*"))
    return [int(path.name) for path in found if path.name.isdigit()]


def whole(folder: pathlib.Path) -> pathlib.Path:
    """Where the arrays of `folder`, a complete checkpoint or the frozen parameters, are: in a store, one start's."""
    if not is_store(folder):
        return folder
    start = read_json_object(folder / COMPLETE).get("folder")
    if not isinstance(start, str) or not start.isalnum():
        raise ValueError(f"{folder / COMPLETE} does not name the folder of a start; delete {folder}")
    return folder / start


def model_config(raw: dict[str, Any]) -> JanusConfig:
    """The JanusConfig written by `overrides.to_json`."""
    usual = JanusConfig()
    fields = {name: value for name, value in raw.items() if not isinstance(value, dict)}
    for name, values in raw.items():
        if isinstance(values, dict):
            cls = type(getattr(usual, name))
            fields[name] = cls(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            )
    return JanusConfig(**fields)
