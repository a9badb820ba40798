"""Guessed codes of images, which of them stand, and what the others become: speculative drawing without its model.

A window has L positions. One pass of a model gives, for every position, the law by which its code has to be drawn if
all codes before it are right. `settle` compares the guesses with these laws. What it returns as drawn has exactly the
distribution of the plain loop, by one of three rules:

- 'same': every position draws with its own random key, the plain loop's. A guess stands if it is what the plain loop
  draws there, so that the images are those of the plain loop, code for code. (A fixed point by shared noise, as in
  Wiggers and Hoogeboom, "Predictive Sampling with Forecasting Autoregressive Models", 2020.)
- 'maximal': a guess x of law q stands with probability min(1, p(x) / q(x)), else the position is drawn from what p has
  more than q. Positions behind the first that falls are treated alike, and q becomes p everywhere: their codes have the
  law p by now, whether kept or drawn anew. (Speculative Jacobi decoding, arXiv 2410.01699, with the maximal coupling of
  2510.24211.)
- 'gumbel': as 'maximal' up to the first that falls. Those behind it are drawn with the position's own key, the same in
  every pass.

Laws are what remains after guidance, temperature, top-k and top-p (`Sampler.scaled`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from janus_jax.sampling.sampler import Sampler

Coupling = Literal["same", "maximal", "gumbel"]
COUPLINGS: tuple[Coupling, ...] = ("same", "maximal", "gumbel")
# Guesses for positions that no pass has seen: the last code that is known, the code above, or drawn by the last law.
Fresh = Literal["left", "above", "sampled"]
FRESH: tuple[Fresh, ...] = ("left", "above", "sampled")


# ---------------------------------------------------------------- one window of one image


class Settled(NamedTuple):
    """What a pass came to.

    Attributes:
      codes: [L] int32. The first `count` are drawn for good; the others are guesses.
      count: int32 scalar from 1 to L.
      laws: [L, V] float32 probabilities that `codes` were drawn by; None where no rule asks for them ('same').
    """

    codes: jax.Array
    count: jax.Array
    laws: jax.Array | None


def settle(
    coupling: Coupling,
    drawn: jax.Array,
    guesses: jax.Array,
    tries: jax.Array | None = None,
    logits: jax.Array | None = None,
    laws: jax.Array | None = None,
) -> Settled:
    """Settles the window of an image; 'same' takes only `drawn` and `guesses`.

    Args:
      drawn: [L] int32, drawn by the positions' laws with keys that are the same in every pass, as in the plain loop.
      guesses: [L - 1] int32, of all positions but the last, each drawn by its law before this pass looked at it.
      tries: [L] random keys of the positions, of this pass alone.
      logits: [L, V] of which the softmax is each position's law, -inf for codes that are cut off.
      laws: [L - 1, V], of the guesses: probabilities; one-hot for a guess made without drawing.
    """
    if coupling == "same":
        return Settled(drawn, _leading(guesses == drawn[:-1]), None)
    p = jax.nn.softmax(logits, axis=-1)
    pick, pick_other = jnp.moveaxis(jax.vmap(jax.random.split)(tries), 1, 0)
    chance = jax.vmap(jax.random.uniform)(pick[:-1])
    stands = chance * _of(laws, guesses) < _of(p[:-1], guesses)
    more = jnp.maximum(p[:-1] - laws, 0)
    # By rounding alone nothing may be more; then the two laws are the same.
    more = jnp.where((more > 0).any(-1, keepdims=True), more, p[:-1])
    others = jax.vmap(jax.random.categorical)(pick_other, jnp.log(jnp.append(more, p[-1:], axis=0))).astype(jnp.int32)
    count = _leading(stands)
    codes = jnp.where(jnp.append(stands, False), jnp.append(guesses, 0), others)
    if coupling == "gumbel":
        behind = jnp.arange(len(codes)) >= jnp.where(count == len(codes), count - 1, count)
        codes = jnp.where(behind, drawn, codes)
    return Settled(codes, count, p)


def _of(laws: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(laws, codes[:, None], axis=1)[:, 0]


def _leading(stands: jax.Array) -> jax.Array:
    """How many codes are drawn for good: the guesses before the first that falls, and what is drawn in its place."""
    return 1 + jnp.cumprod(stands.astype(jnp.int32)).sum()


def moved(
    settled: Settled, fresh: jax.Array, fresh_laws: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The guesses [L - 1] of the next window, which begins behind the codes drawn for good, and their laws.

    Where this window had no guess yet the next one's is `fresh` [L - 1], of `fresh_laws` [L - 1, V].
    """
    length = len(settled.codes)
    where = settled.count + jnp.arange(length - 1)
    known, where = where < length, jnp.minimum(where, length - 1)
    guesses = jnp.where(known, settled.codes[where], fresh)
    if settled.laws is None or fresh_laws is None:
        return guesses, None
    return guesses, jnp.where(known[:, None], settled.laws[where], fresh_laws)


# ---------------------------------------------------------------- images of a batch, each by its own count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guesses:
    """Codes of B images: drawn for good, and guessed.

    Attributes:
      codes: [B, num_tokens + L] int32: the first `done` of an image are drawn for good, the L - 1 behind them guesses.
      done, passes: [B] int32, codes drawn for good, and the passes that they took, the prompt's being the first.
      failed: [B] int32, see `finite.note_failure`.
      laws: [B, L - 1, V] by which the guesses were drawn; None for 'same'.
    """

    codes: jax.Array
    done: jax.Array
    passes: jax.Array
    failed: jax.Array
    laws: jax.Array | None

    @classmethod
    def after_first(
        cls, first: jax.Array, failed: jax.Array, num_tokens: int, window: int, coupling: Coupling, codebook: int
    ) -> Guesses:
        """With one code [B] drawn, which is also the guess for all others."""
        codes = jnp.broadcast_to(first[:, None], (len(first), num_tokens + window))
        laws = None if coupling == "same" else jax.nn.one_hot(codes[:, : window - 1], codebook)
        done, passes = (jnp.ones_like(first) for _ in range(2))  # two arrays, since they are donated
        return cls(codes, done, passes, failed, laws)

    def window(self, length: int) -> jax.Array:
        """[B, L] codes to be given to the next pass: each image's last code, and the guesses behind it."""
        return jax.vmap(lambda codes, at: jax.lax.dynamic_slice(codes, (at,), (length,)))(self.codes, self.done - 1)


def settled_windows(
    coupling: Coupling, state: Guesses, keys: jax.Array, logits: jax.Array, sampler: Sampler
) -> Settled:
    """`settle` for guided logits [B, L, V] of the windows of all images; keys [B] as for the plain loop."""
    batch, length, _ = logits.shape
    own = _keys_of(keys, state.done, length)
    drawn = sampler(own.reshape(-1), logits.reshape(batch * length, -1)).reshape(batch, length)
    guesses = state.window(length)[:, 1:]
    if coupling == "same":
        return jax.vmap(functools.partial(settle, coupling))(drawn, guesses)
    tries = jax.vmap(lambda keys, number: jax.vmap(lambda key: jax.random.fold_in(key, number))(keys))(
        own, state.passes
    )
    return jax.vmap(functools.partial(settle, coupling))(drawn, guesses, tries, sampler.scaled(logits), state.laws)


def advanced(
    state: Guesses,
    settled: Settled,
    keys: jax.Array,
    logits: jax.Array,
    sampler: Sampler,
    fresh: Fresh = "left",
    grid: int = 1,
) -> Guesses:
    """The images after a pass; arguments as for `settled_windows`, codes lie in rows of `grid`."""
    length = logits.shape[1]
    num_tokens = state.codes.shape[1] - length
    count = jnp.minimum(settled.count, num_tokens - state.done)
    done = state.done + count
    codes = _written(state.codes, settled.codes, state.done)

    where = done[:, None] + jnp.arange(length - 1)
    unseen = jnp.broadcast_to(settled.codes[:, -1:], where.shape)
    if fresh == "above":
        above = jnp.take_along_axis(codes, jnp.maximum(where - grid, 0), axis=1)
        unseen = jnp.where(where < grid, unseen, above)
    if fresh == "sampled":
        own = _keys_of(keys, done, length - 1)
        unseen = sampler(own.reshape(-1), jnp.repeat(logits[:, -1], length - 1, axis=0)).reshape(where.shape)
    laws = None
    if settled.laws is not None:
        certain = jax.nn.one_hot(unseen, logits.shape[-1])
        laws = jnp.broadcast_to(settled.laws[:, -1:], certain.shape) if fresh == "sampled" else certain
    guesses, laws = jax.vmap(moved)(settled, unseen, laws)

    bad = ~jnp.isfinite(logits).all(-1) & (jnp.arange(length) < count[:, None])
    failed = jnp.where((state.failed < 0) & bad.any(1), state.done + jnp.argmax(bad, axis=1), state.failed)
    # Behind the last code of an image that is done anything may be written.
    codes = _written(codes, guesses, done)
    return Guesses(codes, done, state.passes + (count > 0), failed.astype(jnp.int32), laws)


def _keys_of(keys: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """The plain loop's keys [B, count] of positions from `start` [B] on, see `sampler.step_keys`."""
    steps = start[:, None] + jnp.arange(count)
    return jax.vmap(lambda key, steps: jax.vmap(functools.partial(jax.random.fold_in, key))(steps))(keys, steps)


def _written(codes: jax.Array, new: jax.Array, where: jax.Array) -> jax.Array:
    """`codes` [B, ...] with `new` [B, n] from `where` [B] on."""
    return jax.vmap(lambda codes, new, at: jax.lax.dynamic_update_slice(codes, new, (at,)))(codes, new, where)
