"""How arrays are split over a mesh: the whole contract between mesh axes, parameters, activations and batches.

What each mesh axis (`MESH_AXES`) splits, and what does it in a training step (`axes_by_hand`):

    axis      parameters              activations    rows of a batch  in a training step
    `slices`  nothing (copies)        rows           yes              by hand: gradients are summed, once a step
    `data`    nothing (copies)        rows           yes              by hand: gradients are summed, once a step
    `fsdp`    width                   rows           yes              by hand: layers gather their parameters
                                                                      (`gather_layer`), gradients are scattered
    `tensor`  heads, MLP, vocabulary  heads, MLP     no               by the compiler

`slices` are sets of devices that reach one another only through a data-center network, as `jax.Device.slice_index`
says; all other axes are within a slice.

Every dimension has a logical axis, which `RULES` maps to mesh axes; None is whole on every device. In the letters of
the model's einsums:

    letter  dimension                  in parameters  in activations
    B       rows                       -              "batch"
    T, S    tokens of a row; keys      -              "length", which no mesh axis splits
    N       heads                      "heads"        "heads"
    K       key/value heads            "kv_heads"     "kv_heads"
    F       MLP width                  "mlp"          "mlp"
    V       vocabulary, codebook       "vocab"        left to the compiler
    D       width                      "embed"        None
    H, C    head dim; fused, channels  None           None
            stacked layers             None           None

- Parameters: one row of `PARAMETER_AXES` for each path, for training and sampling alike (`param_shardings`).
- Activations: `constrain` where they are computed, in `model/{llama,kv_cache,siglip,vq,janus}.py` and the sampling
  loops. The kernels of `model/attention.py` get each device's rows and heads, at their whole length.
- Batches in training: `batch_sharding` in `train/step/state.py` splits rows and nothing else, `local_rows` are those
  that a process makes, and `train/data/batches.py` makes any rows it is asked for, independent of the mesh.
  `batch_size` is a multiple of `accumulate` times `batch_shards`.
- Batches in sampling: the rows of a call are padded to a multiple of `batch_shards`.
- The training step (`train/step/step.py`) computes losses and gradients inside `jax.shard_map` over `axes_by_hand`,
  on each device for its rows. There `constrain` applies to the other axes only.

To add a mesh axis: name it in `MESH_AXES`, declare in `RULES` what it splits (in `PARAMETER_AXES` too, if that has no
logical axis yet), and give `MeshConfig` in `train/config.py` a field of that name, in the order of `MESH_AXES`: devices
of the last axis are nearest to one another, and `slices` stays first. `tests/step/test_new_axis.py` tries one, and
`test_the_contract_is_one` in `tests/model/test_sharding.py` fails while something is missing. Then, depending on what
it splits:

- "batch", like `data`: nothing more; batches, gradients, memory estimates and `janus_jax.load` follow the tables.
- "heads", "kv_heads", "mlp", "vocab", like `tensor`: nothing more; the compiler splits the work.
- a dimension that no kernel has yet, as of experts: a logical axis in `RULES` and `PARAMETER_AXES`, and in
  `_OUTPUT_AXES` if it is an output of a kernel, so that quantization and adapters know it.
- "embed", like `fsdp`: `_whole` below gathers over one axis, and `_only` in `train/step/step.py` keeps one.
- "length": the kernels in `model/attention.py` and the losses in `train/step/loss.py`, which reorder a row's tokens.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SLICES = "slices"
MESH_AXES = (SLICES, "data", "fsdp", "tensor")

# Logical axis -> mesh axes.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": (SLICES, "data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "length": (),
}

# (parameter path, logical axes without the layer axis). Stacked layers get a leading None.
_PROJ = r"(vision_model/blocks/attn)"
_BLOCK = r"language_model/layers(_\d+)?"
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"vision_model/patch_embed/kernel", (None, None, None, None)),
    (r"vision_model/patch_embed/bias", (None,)),
    (r"vision_model/pos_embed", (None, None)),
    (r"vision_model/(blocks/norm[12]|norm)/(scale|bias)", (None,)),
    (_PROJ + r"/[qkv]/kernel", ("heads", None, "embed")),
    (_PROJ + r"/[qkv]/bias", ("heads", None)),
    (_PROJ + r"/proj/kernel", ("embed", "heads", None)),
    (_PROJ + r"/proj/bias", (None,)),
    (r"vision_model/blocks/mlp/fc1/kernel", ("mlp", "embed")),
    (r"vision_model/blocks/mlp/fc1/bias", ("mlp",)),
    (r"vision_model/blocks/mlp/fc2/kernel", ("embed", "mlp")),
    (r"vision_model/blocks/mlp/fc2/bias", (None,)),
    # The first layer of an adapter reads an encoder's narrow output: only its output is worth splitting.
    (r"(gen_)?aligner/layers_0/kernel", ("mlp", None)),
    (r"(gen_)?aligner/layers_0/bias", ("mlp",)),
    (r"(gen_)?aligner/layers_([2-9]|\d\d+)/kernel", ("embed", "mlp")),
    (r"(gen_)?aligner/layers_([2-9]|\d\d+)/bias", (None,)),
    (r"gen_embed/embedding", (None, None)),
    (r"gen_head/output_mlp_projector/kernel", ("mlp", "embed")),
    (r"gen_head/output_mlp_projector/bias", ("mlp",)),
    (r"gen_head/vision_head/kernel", ("vocab", "embed")),
    (r"gen_head/vision_head/bias", ("vocab",)),
    # 72M parameters of small convolutions: replicated, so that images split over the batch alone.
    (r"gen_vision_model/.*/(kernel|scale|bias|embedding)", ()),
    (r"language_model/embed_tokens/embedding", ("vocab", "embed")),
    (_BLOCK + r"/(input|post_attention)_layernorm/scale", (None,)),
    (_BLOCK + r"/self_attn/q_proj/kernel", ("heads", None, "embed")),
    (_BLOCK + r"/self_attn/[kv]_proj/kernel", ("kv_heads", None, "embed")),
    (_BLOCK + r"/self_attn/qkv_proj/kernel", (None, "heads", None, "embed")),
    (_BLOCK + r"/self_attn/o_proj/kernel", ("embed", "heads", None)),
    (_BLOCK + r"/mlp/(gate|up)_proj/kernel", ("mlp", "embed")),
    (_BLOCK + r"/mlp/gate_up_proj/kernel", (None, "mlp", "embed")),
    (_BLOCK + r"/mlp/down_proj/kernel", ("embed", "mlp")),
    (r"language_model/norm/scale", (None,)),
    (r"language_model/lm_head/kernel", ("vocab", "embed")),
)
_OUTPUT_AXES = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "qkv_proj": 3, "gate_up_proj": 2, "q": 2, "k": 2, "v": 2}
_STACKED = re.compile(r"(language_model/layers|vision_model/blocks)/")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `MESH_AXES`.

    >>> dict(make_mesh({"fsdp": -1, "tensor": 2}, jax.devices()[:8]).shape)
    {'slices': 1, 'data': 1, 'fsdp': 4, 'tensor': 2}

    Args:
      shape: size of each axis; missing axes are 1, and one may be -1 ("the rest"). Default: all devices on `fsdp`.
      devices: default `jax.devices()`.
    Raises: ValueError for an unknown axis, if the product of the sizes is not the number of devices, or if the devices
      are of another number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(MESH_AXES, 1) | dict({"fsdp": -1} if shape is None else shape)
    unknown = [name for name in sizes if name not in MESH_AXES]
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown; known: {', '.join(MESH_AXES)}")
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"a mesh of {asked} does not match the {len(devices)} devices")
    grid, slices = tuple(sizes[name] for name in MESH_AXES), sizes[SLICES]
    _check_slices(slices, devices)
    # Allows sizes that split a slice's physical axes: 32 x 2 does not fit whole axes of 4 x 4 x 4 chips.
    place = functools.partial(mesh_utils.create_device_mesh, grid)
    if slices > 1:
        within, between = (1, *grid[1:]), (slices, *(1 for _ in grid[1:]))
        place = functools.partial(mesh_utils.create_hybrid_device_mesh, within, between)
    placed = place(devices=devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def count_slices(devices: Sequence[jax.Device]) -> int:
    """The number of slices that `devices` are of; 1 if they know of none, as CPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _check_slices(asked: int, devices: Sequence[jax.Device]):
    found = count_slices(devices)
    # JAX calls each host of GPUs a slice, and one axis may span them.
    if asked == found or (asked == 1 and devices[0].platform != "tpu"):
        return
    are = f"the {len(devices)} devices are of {found} slice{'s' if found > 1 else ''}"
    raise ValueError(f"a mesh of {SLICES}={asked}, but {are}; set {SLICES}={found}, and split each with the other axes")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by their path, joined with '/'."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict from leaves by path; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of the parameter at `path`; ValueError unless exactly one row of PARAMETER_AXES matches."""
    in_layer = ndim - is_stacked(path)
    axes = _axes_in_layer(path, in_layer) or (None,) * in_layer
    if is_stacked(path):
        axes = (None, *axes)
    if len(axes) != ndim:
        raise ValueError(f"parameter {path!r} has {ndim} axes, but {len(axes)} in the sharding table")
    return axes


def _axes_in_layer(path: str, ndim: int) -> tuple[str | None, ...]:
    if path.endswith("/kernel_scale"):  # of `janus_jax.weights.quantize`
        kernel = path.removesuffix("_scale")
        outputs, axes = output_axes(kernel), _axes_in_layer(kernel, ndim)
        # int4's groups, on the last axis, may be fewer than its shards.
        return axes[:outputs] if ndim == outputs else (*axes[:-1], None)
    module, _, leaf = path.rpartition("/")
    if leaf in _ADAPTER_AXES:
        kernel = f"{module}/kernel"
        return _ADAPTER_AXES[leaf](_axes_in_layer(kernel, ndim), output_axes(kernel), _is_fused(path))
    rows = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ValueError(f"parameter {path!r} must match exactly one row of the sharding table, got {len(rows)}")
    return rows[0]


# Beside a kernel, of `janus_jax.weights.adapters`: (the kernel's axes, how many are outputs, whether it is fused).
_ADAPTER_AXES: dict[str, Callable[[tuple[str | None, ...], int, bool], tuple[str | None, ...]]] = {
    "lora_a": lambda axes, outputs, fused: (*(None,) * (1 + fused), *axes[outputs:]),
    "lora_b": lambda axes, outputs, fused: (*axes[:outputs], None),
    "lora_gain": lambda axes, outputs, fused: axes[:outputs],
    "lora_magnitude": lambda axes, outputs, fused: axes[:outputs],
    "lora_norm": lambda axes, outputs, fused: axes[:outputs],
    "lora_scale": lambda axes, outputs, fused: (),
}


def _is_fused(path: str) -> bool:
    return path.split("/")[-2] in ("qkv_proj", "gate_up_proj")


def is_stacked(path: str) -> bool:
    """Whether the parameter at `path` has all layers, stacked on a leading axis."""
    return _STACKED.match(path) is not None


def output_axes(path: str) -> int:
    """How many leading axes of a layer's kernel are output axes."""
    name = path.split("/")[-2]
    return _OUTPUT_AXES.get(name, 1)


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    rule = RULES[name] if name is not None else ()
    return (rule,) if isinstance(rule, str) else rule


def param_shardings(abstract: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """NamedSharding of every parameter.

    Args:
      abstract: nested dict of objects with a `shape`.
    Raises: ValueError naming the parameters whose axes the mesh does not divide.
    """
    shardings, misfits = {}, []
    for path, leaf in flatten(abstract).items():
        spec = []
        for size, name in zip(leaf.shape, logical_axes(path, len(leaf.shape)), strict=True):
            axes = _mesh_axes(name)
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                misfits.append(f"{path} {tuple(leaf.shape)}: {name} {size} over {'*'.join(axes)}={ways}")
            spec.append(axes if len(axes) != 1 else axes[0])
        shardings[path] = NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))
    if misfits:
        shown = "; ".join(misfits[:4]) + (f"; and {len(misfits) - 4} more" if len(misfits) > 4 else "")
        raise ValueError(f"the mesh {dict(mesh.shape)} does not divide the model: {shown}")
    return unflatten(shardings)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` constrained to the current mesh by the logical names of its axes; unchanged if no mesh is set.

    A dimension that the mesh axes do not divide (one chat on eight data shards) stays whole.
    """
    shape = automatic_axes()
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, names, shape)) if shape else x


def automatic_axes() -> dict[str, int]:
    """Sizes of the current mesh's axes over which the compiler splits work; inside `shard_map`, those it leaves."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in sizes if kind == AxisType.Auto}


def axes_by_hand(mesh: Mesh) -> set[str]:
    """The mesh axes that a training step handles by hand, in `jax.shard_map`; the compiler splits over the others."""
    by_hand = set(RULES["batch"])
    # If nothing is left for the compiler to split, all axes are taken by hand.
    left = any(size > 1 for axis, size in mesh.shape.items() if axis not in by_hand)
    return by_hand if left else set(mesh.axis_names)


def manual_axes() -> tuple[str, ...]:
    """The axes of the enclosing `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def gather_layer(prefix: str, dtype: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's `variables` whole and in `dtype`, from this device's shards along `fsdp`; inside `jax.shard_map`.

    Shards are gathered in `dtype`. The gradient of a gathered parameter is reduce-scattered in their own dtype.

    Args:
      prefix: prefix of the parameters' paths, such as 'language_model/layers/'.
    """
    return {
        kind: _gather({prefix + path: x for path, x in flatten(tree).items()}, dtype, prefix)
        for kind, tree in variables.items()
    }


def gather_but_layers(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """All `params` whole and in `dtype`, except those of stacked layers, which the layers gather (`gather_layer`)."""
    flat = flatten(params)
    layers = {path: x for path, x in flat.items() if is_stacked(path)}
    others = {path: x for path, x in flat.items() if path not in layers}
    return unflatten(layers | flatten(_gather(others, dtype)))


def computing_dtype(path: str, own: Any, dtype: Any) -> Any:
    """The dtype in which the parameter at `path`, stored in `own`, enters a computation in `dtype`.

    It is `dtype`, except for quantized kernels, and for factors of whole outputs, whose rounding would change them all.
    """
    factor = path.rpartition("/")[2] in ("kernel_scale", "lora_scale", "lora_norm", "lora_magnitude")
    return jnp.dtype(own if factor or not jnp.issubdtype(own, jnp.inexact) else dtype)


def cast(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """`params` as they enter a computation in `dtype`."""
    return unflatten({p: x.astype(computing_dtype(p, x.dtype, dtype)) for p, x in flatten(params).items()})


def _gather(flat: Mapping[str, jax.Array], dtype: Any, prefix: str = "") -> dict[str, Any]:
    def whole(path: str, x: jax.Array) -> jax.Array:
        axes, wanted = _axes_in_layer(path, x.ndim), computing_dtype(path, x.dtype, dtype)
        if (wanted, x.dtype) == (jnp.float16, jnp.float32):
            wanted = x.dtype  # it is trained, and a sum over all uses of an embedding can leave float16's range
        if "embed" not in axes:
            return x.astype(wanted)
        return _whole(axes.index("embed"), wanted, x.dtype, x)

    return unflatten({path.removeprefix(prefix): whole(path, x) for path, x in flat.items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _whole(axis: int, dtype: Any, own: Any, x: jax.Array) -> jax.Array:
    # Over a new leading axis: along the last axis, TPU's compiler turns the gradient's reduce-scatter into an
    # all-reduce, with twice the traffic.
    shards = jax.lax.all_gather(x.astype(dtype), RULES["embed"])
    return jnp.moveaxis(shards, 0, axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _scattered(axis: int, dtype: Any, own: Any, _: None, grad: jax.Array) -> tuple[jax.Array]:
    shards = jax.lax.axis_size(RULES["embed"])
    grad = grad.astype(own).reshape(*grad.shape[:axis], shards, -1, *grad.shape[axis + 1 :])
    return (jax.lax.psum_scatter(jnp.moveaxis(grad, axis, 0), RULES["embed"]),)


_whole.defvjp(lambda axis, dtype, own, x: (_whole(axis, dtype, own, x), None), _scattered)


def activation_spec(shape: Sequence[int], names: Sequence[str | None], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """PartitionSpec of an activation of `shape` with the logical axes `names`."""
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = tuple(axis for axis in _mesh_axes(name) if axis in mesh_shape)
        spec.append(axes if axes and size % math.prod(mesh_shape[axis] for axis in axes) == 0 else None)
    return PartitionSpec(*spec)


def batch_shards(mesh: Mesh | None) -> int:
    """The number of shards over which the rows of a batch are split; 1 without a mesh."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
