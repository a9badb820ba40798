"""The training loss: next-token cross entropy of answers, text and image codes over packed rows (report, section 2.1).

Tasks have no weights: a step's loss is the sum over all target tokens divided by their number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.model.janus import Janus, place_images
from janus_jax.processing.images import ImageSettings
from janus_jax.sharding import SLICES, manual_axes
from train.config import TASKS

Params = dict[str, Any]

# What `_of_tokens` says of each target token; its sums over all of them and over each kind are divided by their number.
# Metrics and trackers get all of them, the console those in `train.run.metrics._SHOWN`; docs/pods.md, section 7, lists
# them.
PER_TOKEN = ("loss", "accuracy")


def embed_batch(model: Janus, params: Params, batch: dict[str, jax.Array], settings: ImageSettings) -> jax.Array:
    """Embeddings [B, T, D] of a batch of `train.data.batches.Assembler`: text, codes and images in their places."""
    apply = functools.partial(model.apply, {"params": params})
    is_code = batch["is_code"]
    text = apply(jnp.where(is_code, 0, batch["ids"]), method="embed_text")
    codes = apply(jnp.where(is_code, batch["ids"], 0), method="embed_codes")
    x = jnp.where(is_code[..., None], codes, text)
    images = batch["images"]
    rows, most = images.shape[:2]
    if not most:
        return x
    features = apply(normalize(images.reshape(-1, *images.shape[2:]), settings), method="embed_images")
    return place_images(x, batch["is_image"], features.reshape(rows, -1, features.shape[-1]))


def normalize(images: jax.Array, settings: ImageSettings) -> jax.Array:
    """uint8 images [..., 3] as SigLIP's input, as `images.understanding_pixels` computes on the host."""
    pixels = images.astype(jnp.float32) * settings.rescale_factor
    if settings.do_normalize:
        pixels = (pixels - jnp.asarray(settings.mean)) / jnp.asarray(settings.std)
    return pixels


def token_values(
    model: Janus,
    params: Params,
    batch: dict[str, jax.Array],
    settings: ImageSettings,
    chunk: int,
    scaled: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of a batch, and what `cross_entropy` says of each target token, 0 at positions without a task.

    The sum alone is differentiated.

    Args:
      chunk: tokens of each row whose logits are in memory at a time.
      scaled: whether the loss will be multiplied before it is differentiated, as in float16, whose gradients would
        underflow otherwise. They are then computed in the backward pass, from logits that are computed again.
    """
    x = embed_batch(model, params, batch, settings)
    hidden = model.apply({"params": params}, x, batch["positions"], batch["segment_ids"], method="hidden")
    is_code = batch["tasks"] == TASKS["generation"]
    is_text = (batch["tasks"] > 0) & ~is_code
    heads = (
        ("text_logits", is_text, {"language_model": {"lm_head": params["language_model"]["lm_head"]}}),
        ("image_logits", is_code, {"gen_head": params["gen_head"]}),
    )
    total, of_heads = 0, []
    for method, wanted, own in heads:

        def logits(own: Params, hidden: jax.Array, method: str = method) -> jax.Array:
            return model.apply({"params": own}, hidden, method=method)

        with jax.named_scope(method):
            args = logits, own, hidden, batch["targets"], wanted, chunk
            if scaled:
                values = cross_entropy(*args)
                loss = values["loss"].sum()
            else:
                loss, values = summed_cross_entropy(*args)
        total += loss
        of_heads.append(values)
    return total, jax.tree.map(jnp.add, *of_heads)


def cross_entropy(
    logits: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    chunk: int,
) -> dict[str, jax.Array]:
    """What `logits(params, hidden)` says of `targets` where `wanted`, each [B, T] in float32 and 0 elsewhere.

    'loss' is -log p of the target, the only one that is differentiated; 'accuracy' is 1 where no token is likelier.

    The wanted tokens of each row are moved to its front and processed in chunks, whose logits are recomputed in the
    backward pass; a chunk in which no row has a wanted token costs nothing. The gradients of those `params` that are
    differentiated are summed over the chunks in float32, whatever their dtype.

    Args:
      logits: (params, hidden states [B, C, D]) to float32 logits [B, C, V].
      hidden: [B, T, D].
      targets, wanted: [B, T].
      chunk: C; it divides T.
    """
    arrays, back = _chunks(hidden, targets, wanted, chunk)
    return back(_in_chunks(logits, params, *arrays))


def summed_cross_entropy(
    logits: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    chunk: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the losses, which alone can be differentiated, and the values of `cross_entropy`, for its arguments.

    The gradients of a sum are known, but for one factor, as soon as the logits are. So they are computed right then,
    where `cross_entropy` computes the logits again.
    """
    arrays, back = _chunks(hidden, targets, wanted, chunk)
    total, found = _summed_in_chunks(logits, params, *arrays)
    return total, back(found)


def _chunks(hidden, targets, wanted, chunk):
    """The arrays as [chunks, B, C, ...], the wanted tokens first, and the number of chunks that have some; and the
    function that puts a tree of [chunks, B, C] in the order of the tokens."""
    batch, length, _ = hidden.shape
    order = jnp.argsort(~wanted, axis=1, stable=True)
    # The same number of chunks on all devices of a slice, since they must run the same collectives; other slices do not
    # take part in these, and would be waited for in each micro-batch.
    most = wanted.sum(1).max()
    if axes := tuple(axis for axis in manual_axes() if axis != SLICES):
        most = jax.lax.pmax(most, axes)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
        return x.reshape(batch, length // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    def back(found: Any) -> Any:
        places = jnp.argsort(order, axis=1)
        joined = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length), found)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1), joined)

    return (split(hidden), split(targets), split(wanted), -(-most // chunk)), back


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(logits, params, hidden, targets, wanted, count):
    """`_of_tokens`, each [chunks, B, C], in the first `count` chunks; 0 in the others."""

    def one(number, args):
        skipped = dict.fromkeys(PER_TOKEN, jnp.zeros(args[2].shape))
        do = functools.partial(_of_tokens, logits, params)
        return number + 1, jax.lax.cond(number < count, do, lambda *_: skipped, *args)

    return jax.lax.scan(one, 0, (hidden, targets, wanted))[1]


def _of_tokens(logits, params, hidden, targets, wanted):
    """The values of PER_TOKEN by name, [B, C]; whatever is added to both is summed and written as the loss is."""
    scores = logits(params, hidden)
    # By comparison rather than gathering, which stays local if the vocabulary is split over devices.
    chosen = jnp.where(jnp.arange(scores.shape[-1]) == targets[..., None], scores, 0).sum(-1)
    found = {"loss": jax.nn.logsumexp(scores, axis=-1) - chosen, "accuracy": chosen >= scores.max(-1)}
    return {name: jnp.where(wanted, value, 0).astype(jnp.float32) for name, value in found.items()}


def _in_chunks_forward(logits, params, *arrays):
    own, others, *arrays = _parted(params, *arrays)
    return _in_chunks(logits, _joined(own, others), *arrays), (own, others, *arrays)


def _parted(params, *arrays):
    """The differentiated parameters, the others with None in place of those, and the arrays."""
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_primal)
    own = structure.unflatten([leaf.value if leaf.perturbed else None for leaf in leaves])
    others = structure.unflatten([None if leaf.perturbed else leaf.value for leaf in leaves])
    return own, others, *(array.value for array in arrays)


def _is_primal(x):
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _joined(own: Params, others: Params) -> Params:
    return jax.tree.map(lambda x, y: y if x is None else x, own, others, is_leaf=lambda x: x is None)


def _in_chunks_backward(logits, residuals, cotangents):
    own, others, *arrays = residuals
    # Those of the other values are zeros: only the loss is differentiated.
    _, of_own, of_hidden = _gradients_in_chunks(logits, own, others, *arrays, cotangents["loss"])
    return of_own, of_hidden, None, None, None


def _gradients_in_chunks(logits, own, others, hidden, targets, wanted, count, cotangents):
    """The values of `_in_chunks`, and the gradients of its losses, each times its cotangent, by `own` and `hidden`."""

    def one(carry, args):
        number, total = carry
        hidden, targets, wanted, cotangent = args

        def do(total):
            def loss(own, hidden):
                found = _of_tokens(logits, _joined(own, others), hidden, targets, wanted)
                return found["loss"], found

            _, gradient, found = jax.vjp(loss, own, hidden, has_aux=True)
            of_own, of_hidden = gradient(cotangent)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, of_own), (found, of_hidden)

        def skip(total):
            return total, (dict.fromkeys(PER_TOKEN, jnp.zeros(wanted.shape)), jnp.zeros_like(hidden))

        total, found = jax.lax.cond(number < count, do, skip, total)
        return (number + 1, total), found

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)
    (_, total), (found, of_hidden) = jax.lax.scan(one, (0, zeros), (hidden, targets, wanted, cotangents))
    return found, jax.tree.map(lambda x, g: g.astype(x.dtype), own, total), of_hidden


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_in_chunks(logits, params, hidden, targets, wanted, count):
    """The sum of `_in_chunks`'s losses, and its values."""
    found = _in_chunks(logits, params, hidden, targets, wanted, count)
    return found["loss"].sum(), found


def _summed_in_chunks_forward(logits, params, *arrays):
    own, others, *arrays = _parted(params, *arrays)
    cotangents = jnp.ones(arrays[1].shape, jnp.float32)
    found, of_own, of_hidden = _gradients_in_chunks(logits, own, others, *arrays, cotangents)
    return (found["loss"].sum(), found), (of_own, of_hidden)


def _summed_in_chunks_backward(logits, residuals, cotangents):
    cotangent, of_values = cotangents
    if not all(isinstance(value, jax.custom_derivatives.SymbolicZero) for value in of_values.values()):
        raise TypeError("summed_cross_entropy: only the sum can be differentiated; use cross_entropy for single losses")
    of_own, of_hidden = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), residuals)
    return of_own, of_hidden, None, None, None


_summed_in_chunks.defvjp(_summed_in_chunks_forward, _summed_in_chunks_backward, symbolic_zeros=True)


def token_sums(values: Mapping[str, jax.Array], tasks: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, to be added up over batches and divided once, see `combined`.

    Args:
      values: as from `token_values`, each [B, T].
      tasks: [B, T], as in the batch.
    Returns: the sum of each value and 'tokens', their number; and '<name>_<kind>' of each kind. float32 scalars.
    """
    sums = {}
    for ending, of_kind in {"": tasks > 0, **{f"_{kind}": tasks == task for kind, task in TASKS.items()}}.items():
        sums |= {f"{name}{ending}": jnp.where(of_kind, value, 0).sum() for name, value in values.items()}
        sums[f"tokens{ending}"] = of_kind.sum(dtype=jnp.float32)
    return sums


def combined(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines the metrics of several steps, for every name.

    - 'tokens' and 'tokens_<kind>' are summed, and those of PER_TOKEN are divided by them, omitted if there are none;
      steps whose update was skipped ('finite' is 0) do not count.
    - Anything else is the mean of its finite values, NaN if it has none.
    """
    endings = ("", *(f"_{kind}" for kind in TASKS))
    tokens_of = {f"{name}{ending}": f"tokens{ending}" for name in PER_TOKEN for ending in endings}
    taken, result = [one for one in steps if one.get("finite", 1)], {}
    for name in steps[0]:
        total = sum(one[name] for one in taken)
        if name.startswith("tokens"):
            result[name] = total
        elif name in tokens_of:
            if tokens := sum(one[tokens_of[name]] for one in taken):
                result[name] = total / tokens
        else:
            finite = [one[name] for one in steps if math.isfinite(one[name])]
            result[name] = sum(finite) / len(finite) if finite else math.nan
    return result
