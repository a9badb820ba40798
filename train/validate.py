"""Refuses, before anything is loaded, a run that cannot work."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from janus_jax.config import original_config
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path, local_only
from janus_jax.model.attention import takes
from janus_jax.sharding import RULES, axes_by_hand, batch_shards
from train.config import KINDS, TRAINED, TrainConfig
from train.rl.checks import check_rl
from train.step.leaves import abstract_leaves
from train.watch.writers import JSONL, WRITERS

# Counts larger than any run's, beyond which arrays would be too large or 32-bit counters wrap.
_COUNT = 2**31 - 1
_MOST = dict.fromkeys(("steps", "log_every", "save_every", "keep", "max_skipped", "export_every"), _COUNT)
_MOST |= dict.fromkeys(("profile_start", "profile_steps", "optimizer.warmup_steps", "data.early_steps"), _COUNT)
_MOST |= {"evaluation.every": _COUNT, "evaluation.batches": _COUNT, "samples.every": _COUNT, "samples.images": 1024}
_MOST |= {"evals.every": _COUNT, "evals.limit": _COUNT, "evals.batch_size": 2**20}
_MOST |= {"batch_size": 2**20, "accumulate": 2**20, "data.images_per_row": 4096, "data.workers": 1024}
_MOST_RANK = 2**16
_MOST |= {"samples.guidance": 1e6, "samples.temperature": 1e6, "watchdog": 1e9}


def validate(config: TrainConfig) -> list[str]:
    """Checks `config` by itself, without files or devices.

    Returns: remarks, one line each, on settings that work but are probably not intended.
    Raises: ValueError in one line, naming the first key that cannot work.
    """
    remarks, problems = examine(config)
    if problems:
        raise ValueError(problems[0])
    return remarks


def examine(config: TrainConfig) -> tuple[list[str], list[str]]:
    """The remarks of `validate`, and a problem of each aspect of `config` that cannot work, in one line each."""
    remarks, problems = [], []
    for check in (_check_run, _check_counts, _check_attention, _check_data, _check_optimizer, _check_watching,
                  _check_export):  # fmt: skip
        try:
            remarks += check(config) or []
        except ValueError as error:
            problems.append(str(error))
    return remarks, problems


def _check_run(config: TrainConfig):
    c = config
    for key in ("name", "workdir"):
        _require(getattr(c, key), f"{key} is empty")
    _require(c.stage in TRAINED, f"stage must be one of {', '.join(map(str, TRAINED))}, got {c.stage}")
    if c.adapter is not None:
        _check_adapter(config)
    for key in ("compute_dtype", "frozen_dtype"):
        _require(
            c.adapter is not None or getattr(c, key) != "float16",
            f"{key}=float16 has too little range for the gradients of whole parts; use bfloat16, or train an adapter",
        )
    _require(c.init_from or c.tokenizer, "tokenizer is empty, and there is no init_from to take one from")
    try:
        as_path(c.workdir)
    except ValueError as error:
        raise ValueError(f"workdir: {error}") from None


def _check_counts(config: TrainConfig):
    c, d = config, config.data
    for key in ("steps", "batch_size", "accumulate", "loss_chunk", "log_every", "save_every", "keep", "max_skipped"):
        _require(getattr(c, key) >= 1, f"{key} must be at least 1, got {getattr(c, key)}")
    for key in ("export_every", "profile_start", "profile_steps"):
        _require(getattr(c, key) >= 0, f"{key} must be at least 0, got {getattr(c, key)}")
    for key, most in _MOST.items():
        value = functools.reduce(getattr, key.split("."), c)
        _require(value <= most, f"{key} must be at most {most:,}, got {value}")
    _require(0 <= c.seed < 2**32, f"seed must be from 0 to {2**32 - 1}, got {c.seed}")
    _require(c.watchdog >= 0, f"watchdog must be at least 0 (0 for never), got {c.watchdog}")
    _require(
        c.batch_size % c.accumulate == 0,
        f"batch_size={c.batch_size} must be a multiple of accumulate={c.accumulate}, the micro-batches of a step",
    )
    whole = c.grpo is None and c.dpo is None
    _require(
        not whole or d.context % c.loss_chunk == 0,
        f"loss_chunk={c.loss_chunk} does not divide data.context={d.context}",
    )


def _check_attention(config: TrainConfig):
    c, d, language = config, config.data, config.model.language
    _require(
        c.attention == "auto"
        or takes(c.attention, d.context, language.heads, language.kv_heads, language.head_dim, c.compute_dtype),
        f"attention={c.attention} does not support data.context={d.context} with {language.heads} heads of "
        f"{language.head_dim} and {language.kv_heads} key/value heads in {c.compute_dtype}; use attention=auto",
    )


def _check_watching(config: TrainConfig) -> list[str]:
    c, e, s, b = config, config.evaluation, config.samples, config.evals
    for option in c.compiler_options or ():
        _require("=" in option, f"compiler_options must be name=value, such as xla_dump_to=dump, got {option}")
    known = (JSONL, *WRITERS)
    for name in c.writers:
        _require(name in known, f"writers must be among {', '.join(known)}, got {name}")
    _require(JSONL in c.writers, f"writers must include {JSONL}, which a resumed run and figures read")
    _require(e.every >= 0, f"evaluation.every must be at least 0 (0 for never), got {e.every}")
    if e.every:
        _require(e.batches >= 1, f"evaluation.batches must be at least 1, got {e.batches}")
        folders = e.understanding + e.text + e.generation
        _require(folders, f"evaluation.every={e.every}, but evaluation names no folders; evaluation.every=0 for never")
    _require(s.every >= 0, f"samples.every must be at least 0 (0 for never), got {s.every}")
    if s.every:
        _require(s.prompts, f"samples.every={s.every}, but samples.prompts is empty; samples.every=0 for never")
        _require(s.images >= 1, f"samples.images must be at least 1, got {s.images}")
        _require(s.temperature >= 0, f"samples.temperature must be at least 0 (0 is greedy), got {s.temperature}")
        codes, most = c.model.gen_vision.num_tokens, c.model.language.max_positions
        _require(codes < most, f"samples.every={s.every}: an image's {codes} codes exceed the model's {most} positions")
    for key in ("every", "limit", "batch_size"):
        _require(getattr(b, key) >= 0, f"evals.{key} must be at least 0 (0 for {_NONE[key]}), got {getattr(b, key)}")
    if not b.every:
        return [f"evals.tasks={_commas(b.tasks)} are not asked: evals.every is 0"] if b.tasks else []
    _require(b.tasks, f"evals.every={b.every}, but evals.tasks is empty; evals.every=0 for never")
    _require(b.data, f"evals.every={b.every}, but evals.data names no folder of the benchmarks' data")
    if b.every % c.save_every and b.every < c.steps:
        return [
            f"evals.every={b.every} is no multiple of save_every={c.save_every}: a run that is stopped while it asks "
            "goes on from an earlier step, and asks again"
        ]
    return []


_NONE = {"every": "never", "limit": "all", "batch_size": "as many as fit"}


def _check_export(config: TrainConfig):
    try:
        original_config(dataclasses.replace(config.model, dtype="bfloat16"))  # as the run exports it, at the end
    except ValueError as error:
        raise ValueError(f"model: {error}, so the run could not export it; change the model's sizes") from None


def _check_adapter(config: TrainConfig):
    a = config.adapter
    _require(1 <= a.rank <= _MOST_RANK, f"adapter.rank must be from 1 to {_MOST_RANK}, got {a.rank}")
    _require(0 < a.alpha <= _MOST_RANK, f"adapter.alpha must be above 0 and at most {_MOST_RANK}, got {a.alpha}")
    _require(config.init_from, "init_from is empty, but an adapter changes a trained model: name its checkpoint")
    _require(
        config.stage == max(TRAINED),
        f"stage={config.stage} and an adapter exclude each other, since below an adapter all parts are frozen: "
        f"set stage={max(TRAINED)} or adapter=none",
    )
    try:
        abstract_leaves(config)
    except ValueError as error:
        raise ValueError(str(error).replace("weights='int", "adapter.weights='int")) from None


def check_mesh(config: TrainConfig, mesh: Mesh):
    """ValueError in one line if `mesh` does not fit the rest of `config`."""
    shards, axes = batch_shards(mesh), " x ".join(RULES["batch"])
    parts = config.accumulate * (config.grpo.updates if config.grpo else 1)
    if config.batch_size % (parts * shards):
        of_updates = f" of each of grpo.updates={config.grpo.updates}" if config.grpo else ""
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into accumulate={config.accumulate} micro-batches"
            f"{of_updates} over {shards} {axes} shards of the mesh; make it a multiple of {parts * shards}"
        )
    manual = axes_by_hand(mesh)
    automatic = [axis for axis in mesh.axis_names if axis not in manual and mesh.shape[axis] > 1]
    if not automatic:
        return
    here, whole = PartitionSpec(tuple(automatic)), PartitionSpec()
    local = functools.partial(jax.lax.with_sharding_constraint, shardings=here)
    try:
        with jax.set_mesh(mesh):
            step = jax.shard_map(local, mesh=mesh, in_specs=whole, out_specs=whole, axis_names=manual, check_vma=False)
            jax.eval_shape(step, jax.ShapeDtypeStruct((mesh.size,), jnp.float32))
    except NotImplementedError:
        raise ValueError(
            f"JAX {jax.__version__} cannot train with mesh.{automatic[0]}={mesh.shape[automatic[0]]}; use a newer JAX, "
            f"or mesh.{automatic[0]}=1"
        ) from None


def _require(condition: object, message: str):
    if not condition:
        raise ValueError(message)


def _check_data(config: TrainConfig) -> list[str]:
    d, remarks = config.data, []
    _require(d.workers >= 0, f"data.workers must be at least 0 (0 for threads), got {d.workers}")
    most = config.model.language.max_positions
    _require(1 <= d.context <= most, f"data.context must be from 1 to the model's {most} positions, got {d.context}")
    if config.grpo or config.dpo:
        return check_rl(config)
    _require(
        len(d.ratio) == 3 and all(type(share) is int and share >= 0 for share in d.ratio) and sum(d.ratio) > 0,
        f"data.ratio must be three integers of at least 0 ({' : '.join(KINDS)}), not all 0, got {_commas(d.ratio)}",
    )
    for kind, share in zip(KINDS, d.ratio, strict=True):
        folders, weights = getattr(d, kind), getattr(d, f"{kind}_weights")
        _require(
            folders or not share,
            f"data.ratio={_commas(d.ratio)} asks for {kind} samples, but data.{kind} names no folder",
        )
        _require(
            not weights or len(weights) == len(folders),
            f"data.{kind}_weights has {len(weights)} weights for the {len(folders)} folders of data.{kind}",
        )
        _require(
            all(0 < weight < math.inf for weight in weights),
            f"data.{kind}_weights must be numbers above 0, got {_commas(weights)}",
        )
        if folders and not share:
            remarks.append(f"data.{kind} is not read: its share of data.ratio={_commas(d.ratio)} is 0")
    for key in ("guidance_dropout", "caption_cut", "max_bad_share"):
        _require(0 <= getattr(d, key) <= 1, f"data.{key} must be between 0 and 1, got {getattr(d, key)}")
    _require(0 < d.cache_gb <= 1e6, f"data.cache_gb must be above 0 and at most 1,000,000, got {d.cache_gb}")
    if d.cache:
        try:
            local_only(d.cache)
        except ValueError as error:
            raise ValueError(f"data.cache: {error}") from None
        if not any(is_store(folder) for kind in (*KINDS, "early_generation") for folder in getattr(d, kind)):
            remarks.append(f"data.cache={d.cache} is not used: no folder of data is in a store")
    _require(d.early_steps >= 0, f"data.early_steps must be at least 0, got {d.early_steps}")
    _require(
        bool(d.early_steps) == bool(d.early_generation),
        f"data.early_steps={d.early_steps} and data.early_generation={_commas(d.early_generation)}: "
        "give both, or neither",
    )
    _require(
        not d.early_generation or d.ratio[2],
        f"data.early_generation is set, but data.ratio={_commas(d.ratio)} asks for no generation samples",
    )
    codes = config.model.gen_vision.num_tokens
    _require(
        not d.ratio[2] or codes < d.context, f"data.context must exceed the {codes} codes of an image, got {d.context}"
    )
    if d.ratio[0]:
        patches = config.model.vision.num_patches
        _require(
            d.images_per_row >= 1,
            f"data.images_per_row must be at least 1 for understanding samples, got {d.images_per_row}",
        )
        _require(patches < d.context, f"data.context must exceed the {patches} patches of an image, got {d.context}")
        if d.images_per_row * patches > d.context:
            remarks.append(
                f"data.images_per_row={d.images_per_row}: a row of {d.context} tokens only has room for "
                f"{d.context // patches} images of {patches} patches; encoding the rest is wasted"
            )
    return remarks


def _check_optimizer(config: TrainConfig) -> list[str]:
    o = config.optimizer
    for key in ("learning_rate", "eps", "clip"):
        _require(0 < getattr(o, key) < math.inf, f"optimizer.{key} must be a number above 0, got {getattr(o, key)}")
    for key in ("b1", "b2"):
        _require(0 <= getattr(o, key) < 1, f"optimizer.{key} must be from 0 to below 1, got {getattr(o, key)}")
    for key in ("warmup_steps", "weight_decay"):
        _require(0 <= getattr(o, key) < math.inf, f"optimizer.{key} must be at least 0, got {getattr(o, key)}")
    if o.warmup_steps >= config.steps:
        return [f"optimizer.warmup_steps={o.warmup_steps}: all {config.steps} steps are warm-up"]
    return []


def _commas(values: tuple) -> str:
    return ",".join(map(str, values))
