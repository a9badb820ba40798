"""Writes adapters as PEFT's files, for the names of transformers' Janus or of the original."""

from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from janus_jax.config import JanusConfig
from janus_jax.weights.adapters.adapter import Adapter, Delta, alpha_of, module_name
from janus_jax.weights.adapters.peft_files import BASE, CONFIG, PREFIX, WEIGHTS, by_module
from janus_jax.weights.formats.safetensors_files import TensorToWrite, write_safetensors
from janus_jax.weights.torch_names import DIALECTS, Slot, slots


def write_adapter(folder: pathlib.Path, adapter: Adapter, config: JanusConfig, dialect: str = "transformers"):
    """Writes PEFT's two files into `folder`, with the names of `dialect`: 'transformers' or 'original'."""
    if dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, filled in by_module(config, dialect).items():
        places = [adapter.deltas.get((slot.path[:-1], slot.layer)) for slot in filled]
        if not any(places):
            continue
        delta = _joined(module, places, filled)
        ranks[module], alphas[module] = delta.rank, alpha_of(delta.scale, delta.rank, adapter.rslora)
        tensors[f"{module}.lora_A.weight"] = delta.a
        tensors[f"{module}.lora_B.weight"] = delta.b
        if delta.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = delta.magnitude
    saved: dict[str, list[Slot]] = {}
    for slot in slots(config, dialect) if adapter.saved else ():
        if (slot.path, slot.layer) in adapter.saved:
            saved.setdefault(slot.name, []).append(slot)
    for name, own in saved.items():
        if len(own) != own[0].section[1]:
            raise ValueError(f"{name} is saved in part, which the {dialect} dialect cannot say")
        name = module_name(name) + BASE if module_name(name) in ranks else name
        tensors[name] = np.concatenate([slot.to_torch(adapter.saved[slot.path, slot.layer]) for slot in own])
    (rank, _), *_ = collections.Counter(ranks.values()).most_common(1) or ((8, 0),)
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1) or ((8, 0),)
    # The settings of PEFT's earlier releases, which refuse those they do not know.
    settings = {
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted({module_name(name) for name in saved} - ranks.keys()) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: x for module, x in ranks.items() if x != rank},
        "revision": None,
        "target_modules": _targets(config, dialect, ranks),
        "task_type": None,
        "use_dora": adapter.dora,
        "use_rslora": adapter.rslora,
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    arrays = ((name, np.ascontiguousarray(x, np.float32)) for name, x in tensors.items())
    write_safetensors(
        folder / WEIGHTS, [TensorToWrite(PREFIX + name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays]
    )


def _joined(module: str, deltas: list[Delta | None], filled: list[Slot]) -> Delta:
    """The change of a module in torch's shapes: that of its one layer, or of SigLIP's q, k and v under one another."""
    flat = [
        None
        if d is None
        else Delta(
            d.a.reshape(d.rank, -1),
            d.b.reshape(-1, d.rank),
            d.scale,
            None if d.magnitude is None else d.magnitude.reshape(-1),
        )
        for d in deltas
    ]
    first = next(d for d in flat if d)
    if len(flat) == 1:
        return first
    if first.magnitude is not None and not all(flat):
        raise ValueError(f"{module} has DoRA magnitudes for some of q, k and v, which the original's names cannot say")
    magnitude = None if first.magnitude is None else np.concatenate([d.magnitude for d in flat if d])
    alike = all(d and np.array_equal(d.a, first.a) and d.scale == first.scale for d in flat)
    if alike:
        return Delta(first.a, np.concatenate([d.b for d in flat if d]), first.scale, magnitude)
    # Of different inputs: their ranks side by side, each reaching its own rows.
    a = np.concatenate([d.a for d in flat if d])
    b = np.zeros((sum(slot.torch_shape[0] for slot in filled), len(a)), np.float32)
    row = column = 0
    for d, slot in zip(flat, filled, strict=True):
        if d:
            b[row : row + slot.torch_shape[0], column : column + d.rank] = d.b * (d.scale / first.scale)
            column += d.rank
        row += slot.torch_shape[0]
    return Delta(a, b, first.scale, magnitude)


def _targets(config: JanusConfig, dialect: str, modules: Mapping[str, Any]) -> str:
    """A regular expression that matches `modules` in full and no other: SigLIP's have the decoder's names there."""
    everything = collections.Counter(_numberless(module) for module in by_module(config, dialect))
    here = collections.Counter(_numberless(module) for module in modules)
    whole = [name for name, count in here.items() if everything[name] == count]
    rest = [re.escape(module) for module in modules if _numberless(module) not in whole]
    return "|".join((*whole, *rest))


def _numberless(module: str) -> str:
    """A module's name as a regular expression for it in every layer."""
    return re.sub(r"(?<=layers\\\.|blocks\\\.)\d+", r"\\d+", re.escape(module))
