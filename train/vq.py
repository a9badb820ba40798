"""Training of the generation tokenizer, a VQ autoencoder: `python -m train.vq --images FOLDER --out DIR`.

The quantizer and its losses are the reference's (LlamaGen's VectorQuantizer as in janus/models/vq_model.py): codebook
and commitment loss on L2-normalized vectors, straight-through gradient. The reconstruction loss here is the mean
squared error alone: LlamaGen's perceptual and adversarial losses, which sharpen large photographs, are left out.

The images are read during training. The state is saved in `DIR/training` every `--save_every` steps; the same command
resumes from there, with the same results. At the end only the checkpoint remains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from janus_jax.config import IMAGE_CHANNELS, JanusConfig, LlamaConfig, SiglipConfig, VQConfig
from janus_jax.io.messages import print_any_text, print_error
from janus_jax.io.progress import shown, step_bar
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path, local_only
from janus_jax.model.vq import VQModel
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params
from train.autoencoder.images import ImageFiles, read_ahead
from train.autoencoder.kept import KeptTraining
from train.run.faults import AGAIN, BAD_INPUT, INTERRUPTED, Notice, Stopped

REPORTED = ("reconstruction", "codebook", "commitment", "usage", "perplexity")


@dataclasses.dataclass(frozen=True)
class VQTrainConfig:
    """One run of `train_vq`.

    Attributes:
      model: sizes.
      steps: number of updates.
      batch_size: images per step, drawn at random.
      learning_rate: learning rate of Adam, decayed to 0 along a cosine.
      beta: weight of the commitment loss.
      reseed_every: interval, in steps, after which codes not used within it are set to encoder outputs. It is also the
        window over which usage is counted.
      reseed_until: the step from which codes are no longer re-seeded; from 1 on, all codes start as encoder outputs.
      seed: seed of initialization, batches and re-seeding.
    """

    model: VQConfig
    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    beta: float = 0.25
    reseed_every: int = 100
    reseed_until: int = 1000
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "reseed_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"VQ training: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "beta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"VQ training: {name} must be a number above 0, got {getattr(self, name)}")


class VQState(NamedTuple):
    """Everything that a step changes; `counts` [codebook_size] are the uses of each code in the current window."""

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    counts: jax.Array


def _optimizer(config: VQTrainConfig) -> optax.GradientTransformation:
    # Flattened into one small program: XLA takes seconds to compile one for each of a hundred arrays.
    return optax.flatten(optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)))


def init_vq_state(config: VQTrainConfig) -> VQState:
    """The state before the first step: kernels normal with variance 1 / fan-in, biases 0, scales 1."""
    shape = (1, *[config.model.image_size] * 2, IMAGE_CHANNELS)
    model, rng = VQModel(config.model), np.random.default_rng(config.seed)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape))["params"])

    # With numpy: XLA takes half a minute to compile flax's own initialization on a CPU.
    def made(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name in ("bias", "scale"):
            return jnp.full(leaf.shape, float(name == "scale"))
        fan_in = math.prod(leaf.shape[:-1]) if name == "kernel" else 1
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32))

    params = jax.tree_util.tree_map_with_path(made, abstract)
    counts = jnp.zeros(config.model.codebook_size, jnp.int32)
    return VQState(jnp.int32(0), params, _optimizer(config).init(params), counts)


def draw(config: VQTrainConfig, step: int, size: int, count: int) -> np.ndarray:
    """`count` integers below `size`, which depend only on the seed and the step."""
    return np.random.default_rng((config.seed, step)).integers(size, size=count)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def reseed(config: VQTrainConfig, state: VQState, batch: jax.Array, rows: jax.Array) -> VQState:
    """The state with a new window of counts, and every code not used in the last window set to an encoder output.

    `rows` [codebook_size] selects the output for each code, among the B * num_tokens of the batch. Before the first
    step nothing has been counted, so every code starts as an encoder output.
    """
    z = VQModel(config.model).apply({"params": state.params}, batch, method="reconstruct")[1].z
    z, codebook = z.reshape(-1, config.model.codebook_dim), state.params["quantize"]["embedding"]
    codebook = jnp.where((state.counts == 0)[:, None], z[rows], codebook)
    params = state.params | {"quantize": {"embedding": codebook}}
    return state._replace(params=params, counts=jnp.zeros_like(state.counts))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def vq_train_step(config: VQTrainConfig, state: VQState, batch: jax.Array) -> tuple[VQState, dict[str, jax.Array]]:
    """One update.

    Args:
      batch: images [B, image_size, image_size, 3] in [-1, 1].
    Returns: the new state, and scalars: the `reconstruction`, `codebook` and `commitment` (unweighted) losses, and from
      the counts so far `usage`, the share of codes in use, and `perplexity`, the exponential of the codes' entropy.
    """

    def loss_fn(params):
        reconstruction, quantized = VQModel(config.model).apply({"params": params}, batch, method="reconstruct")
        losses = {
            "reconstruction": jnp.mean((reconstruction - batch) ** 2),
            "codebook": quantized.codebook_loss,
            "commitment": quantized.commitment_loss,
        }
        total = losses["reconstruction"] + losses["codebook"] + config.beta * losses["commitment"]
        return total, (losses, quantized.codes)

    grads, (losses, codes) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = _optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    counts = state.counts.at[codes.reshape(-1)].add(1)
    return VQState(state.step + 1, params, opt_state, counts), losses | usage(counts)


def usage(counts: jax.Array) -> dict[str, jax.Array]:
    """`usage`, the share of codes with a count above 0, and `perplexity`, of counts [codebook_size]."""
    p = counts / jnp.maximum(jnp.sum(counts), 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
    return {"usage": jnp.mean(counts > 0), "perplexity": jnp.exp(entropy)}


def train_vq(
    config: VQTrainConfig,
    images: np.ndarray | ImageFiles,
    progress: bool | None = None,
    kept: KeptTraining | None = None,
    told: Callable[[int], bool] = lambda step: False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains a VQ model from random parameters, or from the state saved in `kept`.

    Args:
      images: float32 [N, image_size, image_size, 3] in [-1, 1], or files that are read when they are drawn.
      progress: show a bar; default in a terminal or a notebook.
      kept: saves and restores the state; None to save nothing.
      told: called after each step; True to save and stop there.
    Returns: the parameters, a nested dict as under `gen_vision_model`, and `vq_train_step`'s reports, [steps] each.
    Raises: ValueError for images of another shape or range, and if the loss is not finite; Stopped if `told` stops it.
    """
    images = images if isinstance(images, ImageFiles) else _checked(images, config.model.image_size)
    state, history = init_vq_state(config), {name: [] for name in REPORTED}
    if kept and kept.latest:
        state, history = kept.restore(state, REPORTED)
    first, pending = int(state.step), []

    def drawn(step: int) -> np.ndarray:
        return draw(config, step, len(images), config.batch_size)

    with (
        step_bar("training VQ", config.steps, shown(progress)) as bar,
        contextlib.closing(read_ahead(images, drawn, range(first, config.steps))) as batches,
    ):
        bar.update(first)
        for step, batch in batches:
            if step % config.reseed_every == 0 and step < config.reseed_until:
                vectors = config.batch_size * config.model.num_tokens
                state = reseed(config, state, batch, draw(config, step, vectors, config.model.codebook_size))
            elif step % config.reseed_every == 0:
                state = state._replace(counts=jnp.zeros_like(state.counts))
            state, metrics = vq_train_step(config, state, batch)
            pending.append(metrics)
            done, last = step + 1, step + 1 == config.steps
            stop = told(done) and not last
            save = kept is not None and not last and (done % kept.every == 0 or stop)
            if done % config.reseed_every == 0 or last or save:
                _take(history, pending)
                loss = history["reconstruction"][-1]
                if not np.isfinite(loss):
                    raise ValueError(
                        f"VQ training: the loss is {loss} at step {done}; lower learning_rate ({config.learning_rate})"
                    )
                bar.set_postfix({name: f"{values[-1]:.4g}" for name, values in history.items() if values})
            if save:
                kept.save(state, history)
            if stop:
                where = f"; saved after step {done}; run the same command to resume" if kept else ""
                raise Stopped(f"preempted{where}", AGAIN)
            bar.update()
    return state.params, {name: np.array(values) for name, values in history.items()}


def _checked(images: np.ndarray, size: int) -> np.ndarray:
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != (size, size, IMAGE_CHANNELS) or not len(images):
        raise ValueError(f"images must have shape [N, {size}, {size}, 3], got {list(images.shape)}")
    if not (np.abs(images) <= 1).all():
        raise ValueError("images must be in [-1, 1], as from images.generation_pixels")
    return images


def _take(history: dict[str, list[float]], pending: list[dict[str, jax.Array]]):
    """Moves the reports of `pending` steps from the device into `history`."""
    for metrics in jax.device_get(pending):
        for name, value in metrics.items():
            history[name].append(value)
    pending.clear()


def save_vq(folder: pathlib.Path, config: VQConfig, params: dict[str, Any]) -> None:
    """Writes a checkpoint folder around a VQ model: all other parts of Janus are one unit wide and zero.

    So everything that opens a Janus checkpoint opens it: `janus_jax.load(folder).encode_images`, or a run's `vq_from`.
    Raises ValueError if the folder already has parameters.
    """
    whole = JanusConfig(
        vision=SiglipConfig(image_size=1, patch_size=1, width=1, layers=1, heads=1),
        gen_vision=config,
        language=LlamaConfig(
            vocab_size=1, width=1, mlp_dim=1, layers=1, heads=1, kv_heads=1, head_dim=2, max_positions=1
        ),
        gen_head_width=1,
        dtype="float32",
    )
    rest = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(whole))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, whole, rest | {"gen_vision_model": params})


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Returns 0 on success, else an exit code of `train.run.faults`, with one line on standard error."""
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m train.vq", description="Train a VQ image tokenizer.")
    parser.add_argument("--images", required=True, help="folder of image files")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--save_every", type=int, default=1000, help="steps between saves of the state (default 1000)")
    sizes, usual = VQConfig(), VQTrainConfig(model=VQConfig())
    for name in ("ch", "num_res_blocks", "z_channels", "codebook_size", "codebook_dim", "grid", "norm_groups"):
        parser.add_argument(f"--{name}", type=int, default=getattr(sizes, name))
    parser.add_argument("--ch_mult", type=int, nargs="+", default=sizes.ch_mult)
    for name in ("steps", "batch_size", "learning_rate", "beta", "reseed_every", "reseed_until", "seed"):
        parser.add_argument(f"--{name}", type=type(getattr(usual, name)), default=getattr(usual, name))
    args = vars(parser.parse_args(argv))
    try:
        last = _run(args)
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print_error(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume from the last saved state", file=sys.stderr)
        return INTERRUPTED
    print(f"{args['out']}: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()))
    return 0


def _run(args: dict[str, Any]) -> dict[str, float]:
    """Trains with the settings of the command line; returns the report of the last step."""
    out = as_path(args["out"])
    local_only(args["images"], "read from")
    # In a store, what a killed process has left of the arrays is written again.
    if (out / ("config.json" if is_store(out) else checkpoint.PARAMS)).exists():
        raise ValueError(f"{out} already has a checkpoint; choose another --out")

    def chosen(cls: type) -> dict[str, Any]:
        return {f.name: args[f.name] for f in dataclasses.fields(cls) if f.name in args}

    model = VQConfig(**chosen(VQConfig) | {"ch_mult": tuple(args["ch_mult"])})
    JanusConfig(gen_vision=model)  # checks that the sizes are consistent
    config = VQTrainConfig(model=model, **chosen(VQTrainConfig))
    images = ImageFiles(pathlib.Path(args["images"]), model.image_size)
    kept = KeptTraining(out / "training", config, images.fingerprint(), args["save_every"])
    if kept.latest:
        print(f"resuming after step {kept.latest}", flush=True)
    with Notice() as notice:
        params, history = train_vq(config, images, kept=kept, told=notice.after)
    save_vq(out, model, params)
    kept.remove()
    return {name: values[-1] for name, values in history.items()}


if __name__ == "__main__":
    sys.exit(main())
