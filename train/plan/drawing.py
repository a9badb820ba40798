"""The programs that draw pictures and that serve, compiled for TPUs or GPUs that need not be present."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from janus_jax.loading import layout
from janus_jax.model.janus import Janus
from janus_jax.sampling.cache import cache_sizes
from janus_jax.sampling.images import begin_windows, continue_image, decode_images, start_image
from janus_jax.sampling.sampler import Sampler
from janus_jax.sampling.speculative import Speculate, continue_windows, shared_window, slots_of, window_of
from janus_jax.serving import programs as serving
from janus_jax.serving.device import CONTEXT, cache_slots
from janus_jax.sharding import activation_spec, make_mesh, param_shardings
from janus_jax.weights.fuse import fuse
from janus_jax.weights.quantize import quantized_shapes
from janus_jax.weights.torch_weights import abstract_params
from train.config import TrainConfig
from train.plan import hlo
from train.plan.executed import executed_flops
from train.plan.moved import loop_bytes, program_bytes
from train.plan.programs import Compiled, Made, compile_lowered, devices_of, fitting, placed, report, shard_bytes
from train.plan.topologies import GPUS, Topology

_PROMPT = 64  # tokens of a sampled prompt


def compile_sampling(
    config: TrainConfig,
    place: Topology,
    images: int = 1,
    weights: str | None = None,
    decoder: bool = True,
    speculate: Speculate = False,
) -> list[Compiled]:
    """`config`'s model for `place`: the image loop with guidance and, with `decoder`, the VQ decoder.

    It computes in bfloat16, or float16 on GPUs without bfloat16 units. A cache that grows is compiled at its largest
    size.

    Args:
      weights: the form of quantized kernels, see `quantize`; None for plain ones.
      speculate: codes that a pass is given of each image, see `sampling.speculative`; False for the plain loop.
    Raises: ValueError for `speculate` that is out of range, or where the mesh would split an image's two rows.
    """
    mesh, model, params = _loaded(config, place, weights)
    with fitting(config, place), jax.set_mesh(mesh):
        window = window_of(speculate, config.model.gen_vision.num_tokens, images, pair=2, keep_logits=False)
        made = drawing(mesh, model, params, images, _PROMPT, window=window)
        decode = compile_decoding(mesh, model, params, images) if decoder else None
    name = f"{config.name} sampling {images}" + (f" {weights}" if weights else "")
    name += f", {window} codes a pass" if window else ""
    sizes = {"parameters": shard_bytes(params)}
    done = [
        report(f"{name}: prefill", place, mesh, sizes, made.prefill),
        report(
            name, place, mesh, sizes | {"cache": made.cache}, made.loop, copies=made.copies,
            accessed=loop_bytes(made.loop.text), floor=made.floor, executed=executed_flops(made.loop.text),
        ),
    ]  # fmt: skip
    if decode:
        vq = {"parameters": shard_bytes(params["gen_vision_model"])}
        done.append(report(f"{name}: VQ decode", place, mesh, vq, decode))
    return done


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The programs that draw the codes of a batch of pictures.

    Attributes:
      prefill: of the prompts, with the first code.
      loop: over the other codes, with the cache at its largest; its text has one step.
      slots: the sizes of the cache, smallest first.
      cache: bytes of the largest on a device.
      floor: bytes of it and of the parameters that a step reads.
      copies: lines of the copies in the loop that are as large as a layer's cache or kernel.
    """

    prefill: Made
    loop: Made
    slots: list[int]
    cache: int
    floor: float
    copies: tuple[str, ...]


def drawing(
    mesh: Mesh,
    model: Janus,
    params: Any,
    images: int,
    prompt: int,
    rows: int = 2,
    truncated: bool = False,
    window: int = 0,
) -> Drawing:
    """Compiles what draws so many `images` at a time, of prompts of `prompt` tokens.

    Args:
      params: `jax.ShapeDtypeStruct`s with shardings.
      rows: of a prompt: 2 with guidance.
      truncated: whether top-k or top-p are in use.
      window: codes of each image that a pass is given; 0 for the plain loop.
    """
    codes = model.config.gen_vision.num_tokens
    ids, mask = (_over_rows(mesh, (images, rows, prompt), dtype) for dtype in (jnp.int32, bool))
    keys = _over_rows(mesh, (images,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    scalar, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    sampler = Sampler(temperature=scalar, top_k=count, top_p=scalar, truncated=truncated)
    grown = cache_sizes(model, params, rows * images, prompt, codes)
    slots = [slots_of(prompt, codes, window)] if window else grown
    with jax.set_mesh(mesh):
        given = (params, ids, mask, keys, scalar, sampler, codes, False)
        start = compile_lowered(start_image.lower(model, *given, slots[0]))
        state = placed(start_image.eval_shape(model, *given, slots[-1]), start.compiled.output_shardings)
        if window:
            begun = jax.eval_shape(functools.partial(begin_windows, model, num_tokens=codes, window=window), state)
            begun = dataclasses.replace(begun, cache=state.cache)
            lowered = continue_windows.lower(model, params, begun, keys, scalar, sampler, count, window=window)
        else:
            lowered = continue_image.lower(model, params, state, keys, scalar, sampler, count, count)
        loop = compile_lowered(lowered)
    cache = shard_bytes(state.cache)
    decoder = {k: v for k, v in params.items() if k in ("language_model", "gen_aligner", "gen_embed", "gen_head")}
    read = dict(decoder, language_model={k: v for k, v in decoder["language_model"].items() if k.startswith("layers")})
    copies = tuple(one.line for one in hlo.copies(loop.text, _least(params, state.cache)))
    return Drawing(start, loop, slots, cache, float(shard_bytes(read) + cache), copies)


def compile_decoding(mesh: Mesh, model: Janus, params: Any, images: int) -> Made:
    """Compiles what makes pictures of the codes of so many `images`."""
    codes = _over_rows(mesh, (images, model.config.gen_vision.num_tokens), jnp.int32)
    with jax.set_mesh(mesh):
        vq = {"gen_vision_model": params["gen_vision_model"]}
        return compile_lowered(decode_images.lower(model, vq, codes))


def _over_rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that is split as `janus_jax.sampling.batches.put` does it."""
    spec = activation_spec(shape, ("batch",) + (None,) * (len(shape) - 1), mesh.shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compile_serving(
    config: TrainConfig, place: Topology, slots: int, weights: str | None = None, speculate: Speculate = False
) -> list[Compiled]:
    """The step of `janus_jax.serving` with so many rows for `config`'s model on `place`; see `compile_sampling`.

    The cache has its largest size by default, and all of it counts as filled; both heads are read, as in a step of
    answers and images.

    Args:
      speculate: codes that images are given, most of them guesses; False for the last one alone.
    Raises: ValueError for a number that is out of range.
    """
    window = shared_window(speculate, config.model.gen_vision.num_tokens, slots)
    mesh, model, params = _loaded(config, place, weights)
    with jax.set_mesh(mesh), fitting(config, place):
        context = min(config.model.language.max_positions, CONTEXT)
        size = cache_slots(context, window)[-1]
        empty = compile_lowered(serving.new_cache.lower(model, slots, size))
        cache = placed(serving.new_cache.eval_shape(model, slots, size), empty.compiled.output_shardings)
        tokens, active = jax.ShapeDtypeStruct((slots, window), jnp.int32), jax.ShapeDtypeStruct((slots,), bool)
        given = model, params, cache, tokens, serving.Rows.idle(slots), active
        made = compile_lowered(serving.step.lower(*given, window=window))
    sizes = {"parameters": shard_bytes(params), "cache": shard_bytes(cache)}
    read = {name: params[name] for name in ("language_model", "gen_aligner", "gen_head")}
    read["language_model"] = {name: x for name, x in read["language_model"].items() if name != "embed_tokens"}
    name = f"{config.name} serving {slots} slots" + (f" {weights}" if weights else "")
    name += f", {window} codes of an image" if window > 1 else ""
    found = tuple(one.line for one in hlo.copies(made.text, _least(params, cache), anywhere=True))
    accessed, floor = program_bytes(made.text), float(shard_bytes(read) + sizes["cache"])
    more = {"copies": found, "accessed": accessed, "floor": floor, "executed": executed_flops(made.text)}
    return [report(name, place, mesh, sizes, made, **more)]


def _loaded(config: TrainConfig, place: Topology, weights: str | None) -> tuple[Mesh, Janus, Any]:
    """The mesh, the model and its parameters' shapes as `janus_jax.load` would have them on `place`."""
    devices = devices_of(place)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    gpu = GPUS.get(place.generation)
    dtype = jnp.float16 if gpu and gpu.capability < 8 else jnp.bfloat16
    model = Janus(config.model, dtype=dtype, **layout(config.model, devices[0].platform, on_mesh=True))
    params = abstract_params(config.model, model.scan_layers, dtype)
    params = quantized_shapes(params, weights)
    params = jax.eval_shape(fuse, params) if model.fused else params
    return mesh, model, placed(params, param_shardings(params, mesh))


def _least(params: Any, cache: Any) -> int:
    """Bytes of the smaller one of a layer's keys and a layer's kernel, on one device."""
    kernel = params["language_model"]["layers_0"]["self_attn"]["o_proj"]["kernel"]
    return min(shard_bytes(cache.keys[0]), shard_bytes(kernel))
