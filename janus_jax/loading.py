"""`janus_jax.load`: loads a pipeline from a folder or hub id."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax.config import JanusConfig
from janus_jax.hub import hub_id, resolve
from janus_jax.io.messages import one_line
from janus_jax.io.progress import shown
from janus_jax.model.janus import Janus
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.sampling.footprint import refuse_too_large
from janus_jax.sharding import MESH_AXES, make_mesh, param_shardings
from janus_jax.weights.adapters.attach import attach
from janus_jax.weights.adapters.peft_files import read_adapter
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.fuse import fuse, fusible
from janus_jax.weights.quantize import FORMS, is_quantized, quantize, quantize_leaf, quantized_shapes
from janus_jax.weights.torch_names import Path
from janus_jax.weights.torch_weights import LazyArray, abstract_params, parse_dtype, place


def load(
    path_or_hub_id: str | os.PathLike,
    dtype: Any = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    *,
    weights: str | None = None,
    scan_layers: bool | None = None,
    fused: bool | None = None,
    roles: str | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike | None = None,
    progress: bool | None = None,
    ahead: Callable[[JanusPipeline], Any] | None = None,
) -> JanusPipeline:
    """Loads a Janus checkpoint.

    >>> janus = load("deepseek-ai/Janus-Pro-1B", weights="int8")
    >>> codes = janus.generate_codes("a red bicycle", n=2, seed=7)
    >>> codes.shape == (2, janus.config.gen_vision.num_tokens)
    True

    Args:
      path_or_hub_id: a folder in the original, the transformers or our converted layout; or `owner/name` on the
        Hugging Face hub, from which only the needed files are downloaded.
      dtype: dtype of parameters and computation; default bfloat16, but float32 on CPU, where bfloat16 draws
        no faster, and float16 on GPUs without bfloat16 units.
      mesh: a mesh of `sharding.make_mesh` (or the sizes of its axes, as for it): each shard is read directly onto its
        device. Default: one device.
      weights: 'int8' or 'int4' stores the decoder's and the heads' kernels in that form, see `quantize`; default
        `dtype`, or the form of a folder that was converted with `convert/from_torch.py --weights`.
      scan_layers: whether the decoder's layers are stacked; default False: sampling would copy each in every step.
      fused: whether q, k and v, and gate and up, are one kernel each in `params`, see `fuse.fuse`; default if possible,
        but not on CPU, where separate products are faster.
      roles: 'pro' or 'old' to choose the chat roles; by default they are detected, see `detect_roles`.
      revision: branch, tag or commit on the hub.
      adapter: folder of a low-rank adapter to use, as by `JanusPipeline.load_adapter`.
      progress: show a bar; default in a terminal or a notebook.
      ahead: called while the weights are read, with a pipeline that has shapes as parameters, to compile ahead, such
        as `lambda janus: janus.compile_images("a cat")`.
    Raises: OSError for missing files, ValueError for inconsistent files or arguments, and `memory.OutOfMemory`, before
      weights are read, if they do not fit in free memory; each in one line that names the cause.
    """
    if weights is not None and weights not in FORMS:
        raise ValueError(f"weights must be 'int8' or 'int4', or None to use dtype, got {weights!r}")
    folder = resolve(path_or_hub_id, revision)
    mesh = make_mesh(mesh) if isinstance(mesh, Mapping) else mesh
    if mesh is not None and set(mesh.axis_names) != set(MESH_AXES):
        raise ValueError(f"the mesh must have the axes {MESH_AXES}, got {mesh.axis_names}; use sharding.make_mesh")
    device = first_device(mesh)
    dtype = parse_dtype(default_dtype(device) if dtype is None else dtype)
    checkpoint = open_checkpoint(folder, quantized=True)
    if checkpoint.weights and weights not in (None, checkpoint.weights):
        raise ValueError(
            f"{one_line(path_or_hub_id)} has {checkpoint.weights} weights already; for weights={weights!r} give the "
            "checkpoint that it was converted from"
        )
    weights = weights or checkpoint.weights
    config = checkpoint.config
    given = {"scan_layers": scan_layers, "fused": fused}
    how = layout(config, device.platform, mesh is not None) | {name: x for name, x in given.items() if x is not None}
    scan_layers, fused = how["scan_layers"], how["fused"]
    if fused and not fusible(config.language):
        c = config.language
        raise ValueError(
            f"fused=True: {c.heads} heads and {c.kv_heads} key/value heads cannot be one kernel; leave it out"
        )
    processor = None
    if (folder / "tokenizer.json").exists():
        processor = Processor.from_folder(folder, config, roles, hub_id(path_or_hub_id))
    shardings = plain_shardings = None
    if mesh is not None:
        plain = abstract_params(config, scan_layers)
        plain_shardings = param_shardings(plain, mesh)
        shardings = param_shardings(quantized_shapes(plain, checkpoint.weights), mesh)
    model = Janus(config, jnp.dtype(dtype), jnp.dtype(dtype), **how)

    # Before gigabytes are read for nothing; it is small, and is read again below.
    adapting = None if adapter is None else read_adapter(adapter, config)
    beside = 0 if adapting is None else adapting.num_parameters
    refuse_too_large(
        path_or_hub_id, config, dtype, weights, plain_shardings, mesh, stored=bool(checkpoint.weights), adapter=beside
    )

    def arranged(params: Any) -> Any:
        params = quantize(params, weights) if weights else params
        params = fuse(params) if fused else params
        return params if adapting is None else attach(params, adapting, 1.0, model.dtype, None)

    def pipeline(params: Any) -> JanusPipeline:
        return JanusPipeline(config, params, model, processor, mesh, source=str(path_or_hub_id))

    with ThreadPoolExecutor(1) as thread:
        if ahead is not None:
            shapes = jax.eval_shape(arranged, abstract_params(config, scan_layers, dtype))
            compiling = thread.submit(ahead, pipeline(shapes))
        leaves, made = checkpoint.leaves, None
        if weights:
            leaves = {path: _as_read(path, leaf, dtype, weights) for path, leaf in leaves.items()}
        if weights and not checkpoint.weights:
            # One at a time: there may be room for the quantized weights, and not for all of them as they are read.
            made = functools.partial(quantize_leaf, form=weights, delete=True, dtype=dtype)
        params = place(leaves, None if weights else dtype, shardings, scan_layers, progress=shown(progress), made=made)
        params = fuse(params, delete=True) if fused else params
    if ahead is not None:
        compiling.result()
    janus = pipeline(params)
    if adapter is not None:
        janus.load_adapter(adapter)
    return janus


def _as_read(path: Path, leaf: LazyArray, dtype: np.dtype, form: str) -> LazyArray:
    """`leaf` in the dtype in which it goes to the device: a kernel that is or will be quantized never wider than it is
    stored, and int8's scales in float32."""
    name = "/".join(path)
    narrow = is_quantized(name) and leaf.dtype.itemsize <= dtype.itemsize
    exact = form == "int8" and name.endswith("/kernel_scale")
    return leaf if narrow or exact else leaf.astype(dtype, name)


def first_device(mesh: Mesh | None) -> jax.Device:
    """The device whose kind decides `load`'s defaults: all devices of a mesh are alike."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def default_dtype(device: jax.Device) -> str:
    """`load`'s default dtype on `device`: the narrowest that it computes in fast and with little loss."""
    if device.platform == "cpu":
        return "float32"  # bfloat16 is emulated slowly there, or draws no faster (processors with units for it)
    # NVIDIA's GPUs have bfloat16 units from compute capability 8.0 on; elsewhere XLA widens whole kernels in each call.
    capability = str(getattr(device, "compute_capability", "")) if device.platform in ("gpu", "cuda") else ""
    return "float16" if re.fullmatch(r"[1-7]\.\d+", capability) else "bfloat16"


def layout(config: JanusConfig, platform: str, on_mesh: bool = False) -> dict[str, Any]:
    """`load`'s defaults for attributes of `Janus`: those that are faster for sampling on `platform`."""
    cpu = platform == "cpu"
    return {
        "scan_layers": False,
        "cpu": cpu and not on_mesh,
        "fused": fusible(config.language) and not cpu,
    }
