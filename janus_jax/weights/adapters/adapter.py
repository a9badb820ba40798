"""What a low-rank adapter is, and which of the model's layers it changes, chosen by their names in the reference.

LoRA (arXiv 2106.09685) adds scale * b @ a to a kernel, scale = alpha / rank; rsLoRA (2312.03732) divides by the rank's
square root; DoRA (2402.09353) then gives every output of the sum the norm that its magnitude says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from janus_jax.config import JanusConfig
from janus_jax.io.fields import shown
from janus_jax.io.messages import did_you_mean
from janus_jax.sharding import output_axes
from janus_jax.weights.torch_names import LINEAR, Path, Slot, slots

# Sets of linear layers, as regular expressions over the original's names.
_ATTENTION = r"language_model\.model\.layers\.\d+\.self_attn\.[qkvo]_proj"
_MLP = r"language_model\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
SETS = {
    "attention": _ATTENTION,
    "mlp": _MLP,
    "decoder": f"{_ATTENTION}|{_MLP}",
    "aligners": r"(gen_)?aligner\.layers\.\d+",
    "heads": r"language_model\.lm_head|gen_head\.\w+",
    "vision": r"vision_model\.vision_tower\.blocks\.\d+\.(attn|mlp)\.\w+",
    "all": r".*",
}

# A linear layer (path without the kernel's name) or a parameter, and the layer's index where layers are stacked.
Place = tuple[Path, int | None]


@dataclasses.dataclass(frozen=True)
class Delta:
    """The change of one kernel.

    Attributes:
      a: float32 [rank, *inputs].
      b: float32 [*outputs, rank].
      scale: factor of b @ a.
      magnitude: float32 [*outputs], the norms of a DoRA; None for the others.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of one model.

    Attributes:
      deltas: changes by linear layer.
      saved: whole parameters, in the shape of one layer, that replace the model's (PEFT's `modules_to_save`).
      rslora, dora: its kind; plain LoRA if neither.
      base: the model that it was trained over, as its files say; empty if unknown.
      source: where it was read from, for messages.
    """

    deltas: dict[Place, Delta]
    saved: dict[Place, np.ndarray]
    rslora: bool = False
    dora: bool = False
    base: str = ""
    source: str = "the adapter"

    @property
    def num_parameters(self) -> int:
        sizes = [x.size for d in self.deltas.values() for x in (d.a, d.b, d.magnitude) if x is not None]
        return sum(sizes) + sum(x.size for x in self.saved.values())


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The inverse of `scale_of`; an integer where rounding alone keeps it from being one."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def padded(deltas: Sequence[Delta | None]) -> tuple[np.ndarray, np.ndarray]:
    """a [X, rank, *inputs] and b [X, *outputs, rank] of X like changes: zeros for lower ranks, and for None."""
    some = next(delta for delta in deltas if delta)
    rank = max(delta.rank for delta in deltas if delta)
    a = np.zeros((len(deltas), rank, *some.a.shape[1:]), np.float32)
    b = np.zeros((len(deltas), *some.b.shape[:-1], rank), np.float32)
    for i, delta in enumerate(deltas):
        if delta:
            a[i, : delta.rank] = delta.a
            b[i, ..., : delta.rank] = delta.b
    return a, b


# ---------------------------------------------------------------- which layers


@functools.lru_cache(maxsize=8)
def linear_slots(config: JanusConfig, dialect: str = "original") -> tuple[Slot, ...]:
    """The kernels that an adapter may change: the linear layers of decoder, aligners, heads and SigLIP."""
    return tuple(slot for slot in slots(config, dialect) if slot.layout == LINEAR and slot.path[-1] == "kernel")


def module_name(tensor: str) -> str:
    """A module's name from that of its weight or bias."""
    return re.sub(r"\.(weight|bias)$", "", tensor)


def axes_of(slot: Slot) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a linear layer's outputs and inputs in our shape."""
    count = output_axes("/".join(slot.path))
    return slot.shape[:count], slot.shape[count:]


def chosen(config: JanusConfig, targets: Iterable[str], key: str = "targets") -> list[Slot]:
    """The linear layers of `targets`, each a name of `SETS`, or a regular expression for a module's name in the
    original dialect, or for the end of one after a dot: 'q_proj', 'layers\\.[0-3]\\.mlp\\.up_proj', 'gen_head\\.\\w+'.

    SigLIP's q, k and v are one module there, attn.qkv, and are chosen together.

    Raises: ValueError in one line for a target that names no linear layer, with the nearest that do.
    """
    linear, wanted = linear_slots(config), set()
    for target in targets:
        pattern = _compiled(SETS.get(target, target), target, key)
        found = {slot.name for slot in linear if pattern.fullmatch(module_name(slot.name))}
        if not found:
            raise ValueError(f"{key}: {shown(target)} names no linear layer of the model{_nearest(config, target)}")
        wanted |= found
    return [slot for slot in linear if slot.name in wanted]


def saved_slots(config: JanusConfig, names: Iterable[str], dialect: str = "original", key: str = "save") -> list[Slot]:
    """The parameters of the modules in `names` (`modules_to_save`): whole names, or ends of them after a dot.

    Raises: ValueError in one line for a name that no module has.
    """
    made: dict[tuple[Path, int | None], Slot] = {}
    everything = slots(config, dialect)
    for name in names:
        pattern = re.compile(rf"(.*\.)?{re.escape(name)}(\..*)?")
        found = [slot for slot in everything if pattern.fullmatch(module_name(slot.name))]
        if not found:
            known = [part for slot in everything for part in module_name(slot.name).split(".")]
            raise ValueError(f"{key}: {shown(name)} names no module of the model{did_you_mean(name, known)}")
        made |= {(slot.path, slot.layer): slot for slot in found}
    return list(made.values())


def _compiled(pattern: str, target: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key}: {shown(target)} is not a regular expression ({error})") from None


def _nearest(config: JanusConfig, target: str) -> str:
    names = [module_name(slot.name) for slot in linear_slots(config)]
    ends = [name.rpartition(".")[2] for name in names]
    return did_you_mean(target, [*SETS, *(end for end in ends if not end.isdigit()), *names], 3)
