"""Training of the generation tokenizer, a VQ autoencoder: `python -m train.vq --images FOLDER --out DIR`.

The quantizer and its losses are the reference's (LlamaGen's VectorQuantizer as in janus/models/vq_model.py): codebook
and commitment loss on L2-normalised vectors, straight-through gradient. The reconstruction loss here is the mean
squared error alone: LlamaGen's perceptual and adversarial losses, which sharpen large photographs, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from janus_jax import checkpoint
from janus_jax.config import IMAGE_CHANNELS, JanusConfig, LlamaConfig, SiglipConfig, VQConfig
from janus_jax.images import generation_pixels
from janus_jax.progress import shown, step_bar
from janus_jax.torch_weights import abstract_params
from janus_jax.vq import VQModel


@dataclasses.dataclass(frozen=True)
class VQTrainConfig:
    """One run of `train_vq`.

    Attributes:
      model: sizes.
      steps: updates in all.
      batch_size: images a step, drawn at random.
      learning_rate: of Adam, falling to 0 along a cosine.
      beta: weight of the commitment loss.
      reseed_every: steps after which codes that none of them used are set to encoder outputs. The same steps are the
        window over which usage is counted.
      reseed_until: no code is re-seeded from this step on; from 1 on, all codes start from encoder outputs.
      seed: of initialisation, batches and re-seeding.
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
                raise ValueError(f"VQ training: {name} is {getattr(self, name)}, not a whole number from 1")
        for name in ("learning_rate", "beta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"VQ training: {name} is {getattr(self, name)}, not a number above 0")


class VQState(NamedTuple):
    """Everything that a step changes; `counts` [codebook_size] are the uses of each code in this window."""

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    counts: jax.Array


def _optimizer(config: VQTrainConfig) -> optax.GradientTransformation:
    # Flattened: one small program instead of one for each of a hundred arrays, which XLA takes seconds to compile.
    return optax.flatten(optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)))


def init_vq_state(config: VQTrainConfig) -> VQState:
    """The state before the first step: kernels normal with variance 1 / fan-in, biases 0, scales 1."""
    shape = (1, *[config.model.image_size] * 2, IMAGE_CHANNELS)
    model, rng = VQModel(config.model), np.random.default_rng(config.seed)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape))["params"])

    # By numpy: XLA takes half a minute to compile flax's own initialisation on a CPU.
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
    """`count` whole numbers below `size`, which depend on the seed and the step alone."""
    return np.random.default_rng((config.seed, step)).integers(size, size=count)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def reseed(config: VQTrainConfig, state: VQState, batch: jax.Array, rows: jax.Array) -> VQState:
    """The state with a new window of counts, and every code that had no count in the last one set to an encoder output.

    `rows` [codebook_size] says which of the batch's, [B * num_tokens] of them. Before the first step nothing has been
    counted, so that every code starts so.
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
    Returns: the new state, and scalars: `reconstruction`, `codebook` and `commitment` (unweighted) losses, and of the
      counts so far `usage`, the share of codes in use, and `perplexity`, the exponential of the codes' entropy.
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
    """`usage`, the share of codes with a count above 0, and `perplexity` of counts [codebook_size]."""
    p = counts / jnp.maximum(jnp.sum(counts), 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
    return {"usage": jnp.mean(counts > 0), "perplexity": jnp.exp(entropy)}


def train_vq(
    config: VQTrainConfig, images: np.ndarray, progress: bool | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains a VQ model from random parameters.

    Args:
      images: float32 [N, image_size, image_size, 3] in [-1, 1].
      progress: show a bar; default in a terminal or a notebook.
    Returns: the parameters, a nested dict as under `gen_vision_model`, and what `vq_train_step` reports, [steps] each.
    Raises: ValueError for images of another shape or range, and where the loss stops being a number.
    """
    size = config.model.image_size
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != (size, size, IMAGE_CHANNELS) or not len(images):
        raise ValueError(f"images of shape {list(images.shape)} do not fit: expected [N, {size}, {size}, 3]")
    if not (np.abs(images) <= 1).all():
        raise ValueError("images must lie in [-1, 1], as images.generation_pixels makes them")
    state = init_vq_state(config)
    history = []
    with step_bar("training VQ", config.steps, shown(progress)) as bar:
        for step in range(config.steps):
            batch = images[draw(config, step, len(images), config.batch_size)]
            if step % config.reseed_every == 0 and step < config.reseed_until:
                vectors = config.batch_size * config.model.num_tokens
                state = reseed(config, state, batch, draw(config, step, vectors, config.model.codebook_size))
            elif step % config.reseed_every == 0:
                state = state._replace(counts=jnp.zeros_like(state.counts))
            state, metrics = vq_train_step(config, state, batch)
            history.append(metrics)
            if step % config.reseed_every == config.reseed_every - 1 or step == config.steps - 1:
                metrics = jax.device_get(metrics)
                if not np.isfinite(metrics["reconstruction"]):
                    raise ValueError(
                        f"VQ training: the loss is {metrics['reconstruction']} at step {step + 1}; "
                        f"lower learning_rate ({config.learning_rate})"
                    )
                bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
            bar.update()
    history = jax.device_get(history)
    return state.params, {name: np.array([entry[name] for entry in history]) for name in history[0]}


def save_vq(folder: pathlib.Path, config: VQConfig, params: dict[str, Any]) -> None:
    """Writes a checkpoint folder around a VQ model: all other parts of Janus are there, zeros and one unit wide.

    So everything that opens a Janus checkpoint opens it: `janus_jax.load(folder).encode_images`, or a run's `vq_from`.
    Raises ValueError where the folder has parameters already.
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


def read_images(folder: pathlib.Path, image_size: int) -> np.ndarray:
    """float32 [N, image_size, image_size, 3] in [-1, 1] of all PNG, JPEG and WebP files in `folder`, by name.

    FileNotFoundError where there are none, ValueError naming a file that cannot be read.
    """
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no image files ({', '.join(suffixes)})")
    return np.stack([generation_pixels(path, image_size) for path in paths])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.vq", description="Train a VQ image tokenizer.")
    parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of image files")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="checkpoint folder to write")
    sizes, usual = VQConfig(), VQTrainConfig(model=VQConfig())
    for name in ("ch", "num_res_blocks", "z_channels", "codebook_size", "codebook_dim", "grid", "norm_groups"):
        parser.add_argument(f"--{name}", type=int, default=getattr(sizes, name))
    parser.add_argument("--ch_mult", type=int, nargs="+", default=sizes.ch_mult)
    for name in ("steps", "batch_size", "learning_rate", "beta", "reseed_every", "reseed_until", "seed"):
        parser.add_argument(f"--{name}", type=type(getattr(usual, name)), default=getattr(usual, name))
    args = vars(parser.parse_args(argv))
    try:
        images, out = args.pop("images"), args.pop("out")
        if (out / checkpoint.PARAMS).exists():
            raise ValueError(f"{out} holds a checkpoint already: give another --out")
        settings = {name: args.pop(name) for name in list(args) if hasattr(usual, name)}
        model = VQConfig(**{**args, "ch_mult": tuple(args["ch_mult"])})
        JanusConfig(gen_vision=model)  # checks that the sizes go together
        config = VQTrainConfig(model=model, **settings)
        params, history = train_vq(config, read_images(images, model.image_size), progress=True)
        save_vq(out, model, params)
    except (ValueError, OSError) as error:
        sys.exit(f"train.vq: {error}")
    last = {name: values[-1] for name, values in history.items()}
    print(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()))


if __name__ == "__main__":
    main()
