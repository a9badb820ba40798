"""How far a model in other forms (quantized weights, narrow dtypes) is from itself in float32, by its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.config import JanusConfig
from janus_jax.model.janus import Janus, init_params
from janus_jax.sharding import flatten, unflatten
from janus_jax.weights import quantize

FORMS = (*quantize.FORMS, "bfloat16", "float16")
_PARTS = ("language_model", "gen_head")  # all that logits of text tokens take
_HEADS = {"image logits": "image_logits", "text logits": "text_logits"}


def compare(
    config: JanusConfig, forms: Sequence[str], seed: int, tokens: int, log: Callable[[str], None]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By form and kind of logits: relative error in norm, share of positions with the same first choice, and the mean
    divergence (Kullback-Leibler, nats) of what would be drawn from them, against float32.

    Args:
      forms: of FORMS. Quantized weights are computed with in float32, and the others in their dtype.
      tokens: text tokens of one row.
    """
    log("float32")
    right = logits(config, "float32", seed, tokens)
    found = {}
    for form in forms:
        log(form)
        ours = logits(config, form, seed, tokens)
        found[form] = {kind: _differences(ours[kind], right[kind]) for kind in right}
    return found


def logits(config: JanusConfig, form: str, seed: int, tokens: int) -> dict[str, np.ndarray]:
    """Logits [tokens, vocabulary] of random tokens by random weights in `form`, by kind; both are of `seed`."""
    dtype = jnp.dtype("float32" if form in quantize.FORMS else form)
    plain, model = Janus(config), Janus(config, dtype, dtype)
    make = jax.jit(lambda key: {part: init_params(plain, key)[part] for part in _PARTS})
    params: dict[str, Any] = {}
    made = flatten(make(jax.random.key(seed)))
    for path in sorted(made):  # one at a time, each given back before the next
        x = made.pop(path)
        params |= quantize.quantize_leaf(path, x, form, True) if form in quantize.FORMS else {path: x.astype(dtype)}
    del x

    @jax.jit
    def run(params: dict[str, Any], ids: jax.Array) -> dict[str, jax.Array]:
        def call(method: str, *args: jax.Array) -> jax.Array:
            return model.apply({"params": params}, *args, method=method)

        hidden = call("hidden", call("embed_text", ids), jnp.arange(tokens)[None], jnp.ones_like(ids))
        return {kind: call(method, hidden)[0] for kind, method in _HEADS.items()}

    ids = np.random.default_rng(seed).integers(5, config.language.vocab_size - 5, (1, tokens)).astype(np.int32)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), run(unflatten(params), ids))


def _differences(ours: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    error = np.linalg.norm(ours - right) / np.linalg.norm(right)
    same = (ours.argmax(-1) == right.argmax(-1)).mean()
    p, q = _log_shares(right), _log_shares(ours)
    return float(error), float(same), float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_shares(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def table(found: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """What `compare` found, in Markdown."""
    kinds = list(next(iter(found.values())))
    lines = [f"| relative error, same first choice, KL | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for form, by_kind in found.items():
        cells = [f"{error:.1%}, {same:.0%}, {kl:.1e}" for error, same, kl in by_kind.values()]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)
