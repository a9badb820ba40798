"""Reads adapters in PEFT's files, adapter_config.json and adapter_model.safetensors; `peft_writing` writes them.

In three namings: of transformers' Janus, of the original, and of the original's `language_model` alone, around
which many wrap PEFT. Settings that change what an adapter computes are implemented or refused.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from janus_jax.config import JanusConfig
from janus_jax.hub import resolve
from janus_jax.io.fields import Fields, shown
from janus_jax.io.files import read_json_object
from janus_jax.io.messages import did_you_mean, one_line
from janus_jax.io.stores import as_path, lexists
from janus_jax.weights.adapters.adapter import (
    Adapter,
    Delta,
    Place,
    axes_of,
    linear_slots,
    module_name,
    scale_of,
)
from janus_jax.weights.formats.stored_tensor import Tensor
from janus_jax.weights.formats.torch_files import open_file
from janus_jax.weights.torch_names import DIALECTS, Slot, slots

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
PREFIX, BASE = "base_model.model.", ".base_layer.weight"
_DECODER, _OF_DECODER = "decoder", "language_model."
_MOST = 2**20  # of ranks and alphas

# What only training, PEFT's own bookkeeping, or the choice of layers (which the tensors show) depend on.
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "revision", "task_type", "target_modules",
    "eva_config", "qalora_group_size", "runtime_config",
)  # fmt: skip
_READ = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save",
    "init_lora_weights", "bias",
)  # fmt: skip
# Initializations that leave the base model's weights as they are.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_NOTHING = (None, False, "", "none")


def is_adapter(folder: str | os.PathLike) -> bool:
    return (as_path(folder) / CONFIG).is_file()


# ---------------------------------------------------------------- reading


def read_adapter(path_or_hub_id: str | os.PathLike, config: JanusConfig) -> Adapter:
    """The adapter in a folder or on the hub, for a model of `config`.

    Raises: FileNotFoundError for missing files; ValueError in one line for settings that are not implemented, and for
      tensors that are missing, unknown, or of another model's shape.
    """
    folder = resolve(path_or_hub_id)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{one_line(folder)} has no {CONFIG}; expected the folder of a PEFT adapter")
    try:
        settings = _Settings.read(read_json_object(folder / CONFIG))
    except ValueError as error:
        raise ValueError(f"{one_line(folder / CONFIG)}: {error}") from None
    weights = folder / (WEIGHTS if lexists(folder / WEIGHTS) else _PICKLED)
    if not lexists(weights):
        raise FileNotFoundError(f"{one_line(folder)} has neither {WEIGHTS} nor {_PICKLED}")
    try:
        return _adapter(open_file(weights), settings, config, str(folder))
    except ValueError as error:
        raise ValueError(f"{one_line(weights)}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Settings:
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    saved: tuple[str, ...]
    base: str

    @staticmethod
    def read(raw: Mapping[str, Any]) -> _Settings:
        fields = Fields(raw)
        kind = fields.text("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type is {shown(kind)}; only LORA is implemented")
        for key, value in raw.items():
            if key not in (*_WITHOUT_EFFECT, *_READ) and value not in (*_NOTHING, {}, []):
                raise ValueError(f"{one_line(key)} is {shown(value)}, which is not implemented")
        if raw.get("bias") not in _NOTHING:
            raise ValueError(f"bias is {shown(raw['bias'])}, which is not implemented; only 'none' is")
        start = raw.get("init_lora_weights", True)
        if not isinstance(start, (bool, str, type(None))) or start not in _INITIALIZATIONS:
            raise ValueError(
                f"init_lora_weights is {shown(start)}, which changes the base model's weights and is not implemented; "
                "save it with PEFT's path_initial_model_for_weight_conversion to get a plain LoRA"
            )
        return _Settings(
            rank=fields.integer("r", 1, _MOST, 8),
            alpha=fields.number("lora_alpha", 0, _MOST, 8),
            ranks=_patterns(fields, "rank_pattern", lambda below, key: below.integer(key, 1, _MOST)),
            alphas=_patterns(fields, "alpha_pattern", lambda below, key: below.number(key, 0, _MOST)),
            rslora=fields.flag("use_rslora", False, null=True),
            dora=fields.flag("use_dora", False, null=True),
            saved=_names(fields, "modules_to_save"),
            base=fields.text("base_model_name_or_path", "", null=True),
        )

    def of(self, module: str, patterns: Mapping[str, Any], usual: Any) -> Any:
        """The first of `patterns` whose regular expression matches the module's name or its end, as in PEFT."""
        return next((x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), usual)


def _patterns(fields: Fields, key: str, value: Any) -> dict[str, Any]:
    below = fields.block(key, {}, null=True)
    for pattern in below.raw:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{key} has {shown(pattern)}, which is not a regular expression ({error})") from None
        # Somebody else's: one of these kinds could be tried for years.
        if len(pattern) > 300 or len(re.findall(r"[*+{]", pattern)) > 4 or re.search(r"\)[*+{]", pattern):
            raise ValueError(f"{key} has {shown(pattern)}, which is too involved; name the modules in full")
    return {pattern: value(below, pattern) for pattern in below.raw}


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.get(key, [], null=True)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.wrong(key, value, "a list of strings")
    return tuple(value)


_LORA = re.compile(r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")


def _adapter(tensors: dict[str, Tensor], settings: _Settings, config: JanusConfig, source: str) -> Adapter:
    strange = [name for name in tensors if not name.startswith(PREFIX)]
    if strange:
        raise ValueError(f"the tensor {one_line(strange[0])} is not named like PEFT's, which begin with {PREFIX}")
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    # By module, 'A', 'B' or the magnitude; the others are whole parameters.
    low: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    bases: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if found := _LORA.fullmatch(name):
            low[found[1]][found[2].removesuffix(".weight")] = tensor
        elif name.endswith(BASE):  # of the text head, which PEFT saves with an adapter that changes it
            bases[name.removesuffix(BASE)] = tensor
        else:
            whole[name] = tensor

    linear = {naming: by_module(config, naming) for naming in (*DIALECTS, _DECODER)}
    naming = max(linear, key=lambda naming: sum(module in linear[naming] for module in low))
    unknown = [module for module in low if module not in linear[naming]]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"it changes {one_line(unknown[0])}{more}, which is no linear layer of the model"
            f"{did_you_mean(unknown[0], linear[naming])}"
        )
    deltas: dict[Place, Delta] = {}
    for module, own in low.items():
        deltas |= _deltas(module, own, linear[naming][module], settings)
    if alone := sorted(bases.keys() - low.keys()):
        raise ValueError(f"{one_line(alone[0])} has {BASE[1:]} and no adapter")
    whole |= {f"{module}.weight": tensor for module, tensor in bases.items()}
    saved = _saved(whole, bases, settings, config, naming)
    if not deltas and not saved:
        raise ValueError("it has no tensors")
    return Adapter(deltas, saved, settings.rslora, settings.dora, settings.base, source)


def by_module(config: JanusConfig, naming: str) -> dict[str, list[Slot]]:
    """The linear layers in each module of a naming: one, or SigLIP's q, k and v in the original's."""
    made: dict[str, list[Slot]] = {}
    for slot in linear_slots(config, "original" if naming == _DECODER else naming):
        if naming != _DECODER or slot.name.startswith(_OF_DECODER):
            name = slot.name.removeprefix(_OF_DECODER) if naming == _DECODER else slot.name
            made.setdefault(module_name(name), []).append(slot)
    return made


def _deltas(module: str, own: Mapping[str, Tensor], filled: list[Slot], settings: _Settings) -> dict[Place, Delta]:
    """The changes of the linear layers in `module`: one, or SigLIP's q, k and v in the original's."""
    rank = settings.of(module, settings.ranks, settings.rank)
    rows, width = filled[0].tensor_shape
    expected = {"lora_A": (rank, width), "lora_B": (rows, rank)}
    if settings.dora:
        expected["lora_magnitude_vector"] = (rows,)
    for kind in own.keys() - expected.keys():
        raise ValueError(f"{one_line(module)} has {kind}, but use_dora is false in {CONFIG}")
    values = {}
    for kind, shape in expected.items():
        if kind not in own:
            raise ValueError(f"{one_line(module)} has no {kind}")
        # Older releases of PEFT wrote magnitudes [1, out] or [out, 1].
        found = own[kind].view()
        if kind == "lora_magnitude_vector" and found.size == rows:
            found = found.reshape(shape)
        if found.shape != shape:
            raise ValueError(
                f"{one_line(module)}.{kind} is {list(found.shape)}, and this model with rank {rank} has {list(shape)}"
            )
        values[kind] = np.asarray(found, np.float32)
        if not np.isfinite(values[kind]).all():
            raise ValueError(f"{one_line(module)}.{kind} has numbers that are not finite")
    scale = scale_of(settings.of(module, settings.alphas, settings.alpha), rank, settings.rslora)
    made: dict[Place, Delta] = {}
    for slot in filled:
        outputs, inputs = axes_of(slot)
        part = slice(slot.section[0] * slot.torch_shape[0], (slot.section[0] + 1) * slot.torch_shape[0])
        magnitude = values["lora_magnitude_vector"][part].reshape(outputs) if settings.dora else None
        made[slot.path[:-1], slot.layer] = Delta(
            values["lora_A"].reshape(rank, *inputs), values["lora_B"][part].reshape(*outputs, rank), scale, magnitude
        )
    return made


def _saved(
    whole: Mapping[str, Tensor], bases: Mapping[str, Tensor], settings: _Settings, config: JanusConfig, naming: str
) -> dict[Place, np.ndarray]:
    """The parameters of `modules_to_save`, which PEFT finds by the ends of the names of modules, or of those around."""
    own = _OF_DECODER if naming == _DECODER else ""
    filled = [slot for slot in slots(config, "original" if own else naming) if slot.name.startswith(own)]
    listed = re.compile(r".*(" + "|".join(map(re.escape, settings.saved)) + r")(\..*)?")
    made: dict[Place, np.ndarray] = {}
    used, ends = set(), set()
    for slot in filled:
        name = slot.name.removeprefix(own)
        tensor, found = whole.get(name), listed.fullmatch(module_name(name)) if settings.saved else None
        if tensor is None or not (found or module_name(name) in bases):
            continue
        if tuple(tensor.shape) != slot.tensor_shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, and this model's is {list(slot.tensor_shape)}")
        used.add(name)
        if found:
            ends.add(found[1])
        rows = slot.torch_shape[0]
        part = tensor.view()[slot.section[0] * rows : (slot.section[0] + 1) * rows]
        index = (slice(None),) * len(slot.shape)
        made[slot.path, slot.layer] = np.asarray(slot.from_torch(part, index), np.float32)
    if unknown := sorted(whole.keys() - used):
        raise ValueError(f"the tensor {one_line(unknown[0])} is neither an adapter's nor in modules_to_save")
    for name in settings.saved:
        if not any(end.endswith(name) for end in ends):
            known = [part for slot in filled for part in module_name(slot.name.removeprefix(own)).split(".")]
            raise ValueError(
                f"modules_to_save has {shown(name)}, of which there is no tensor{did_you_mean(name, known)}"
            )
    return made
