"""Speculative drawing on a toy whose whole distribution is known: 4 symbols, 5 positions, correlated and guided.

The toy goes through the code that draws images; only the model's pass is a table. Public implementations' errors are
made in it, and the same test finds them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from janus_jax.sampling.acceptance import COUPLINGS, FRESH, Guesses, Settled, advanced, settled_windows
from janus_jax.sampling.sampler import guide, make_sampler, step_keys

SYMBOLS, POSITIONS, WINDOW, GUIDANCE = 4, 5, 3, 1.8
PLAIN, CUT = make_sampler(1.1), make_sampler(0.9, top_k=3, top_p=0.95)
# [rows of guidance, position, the code before, the one before that, code]; the last symbol stands for no code.
TABLE = np.random.default_rng(4).normal(0, 0.7, (2, POSITIONS + WINDOW, SYMBOLS + 1, SYMBOLS + 1, SYMBOLS))


def logits_of(position, before, earlier):
    """Guided logits [..., SYMBOLS] of codes, from two codes before each."""
    table = jnp.asarray(TABLE, jnp.float32)
    both = jnp.stack([row[position, before, earlier] for row in table], axis=1)
    return guide(both, GUIDANCE)


def enumerated(sampler) -> np.ndarray:
    """Probabilities [SYMBOLS ** POSITIONS] of all results."""
    every = np.array(list(itertools.product(range(SYMBOLS), repeat=POSITIONS)))
    padded = np.concatenate([np.full((len(every), 2), SYMBOLS), every], axis=1)
    chances = np.ones(len(every))
    for i in range(POSITIONS):
        where = np.full(len(every), i)
        law = jax.nn.softmax(sampler.scaled(logits_of(where, padded[:, i + 1], padded[:, i])), axis=-1)
        chances *= np.asarray(law, np.float64)[np.arange(len(every)), every[:, i]]
    return chances / chances.sum()


@functools.partial(jax.jit, static_argnames=("coupling", "fresh", "tamper"))
def speculate(keys, sampler, coupling, fresh="left", tamper=None):
    """Codes [B, POSITIONS] and passes [B]; `tamper` changes what a pass has settled, as errors do."""
    nothing = jnp.full(len(keys), SYMBOLS)
    start = logits_of(jnp.zeros_like(nothing), nothing, nothing)
    first = sampler(step_keys(keys, 0), start)
    failed = jnp.full(len(keys), -1, jnp.int32)

    def one_pass(state: Guesses) -> Guesses:
        given = state.window(WINDOW)
        earlier = jnp.take_along_axis(state.codes, jnp.maximum(state.done - 2, 0)[:, None], axis=1)
        earlier = jnp.where(state.done[:, None] > 1, earlier, SYMBOLS)
        earlier = jnp.concatenate([earlier, given[:, :-1]], axis=1)
        where = state.done[:, None] + jnp.arange(WINDOW)
        logits = logits_of(where.reshape(-1), given.reshape(-1), earlier.reshape(-1)).reshape(*given.shape, SYMBOLS)
        settled = settled_windows(coupling, state, keys, logits, sampler)
        if tamper is not None:
            settled = tamper(keys, state, settled)
        return advanced(state, settled, keys, logits, sampler, fresh, grid=2)

    state = Guesses.after_first(first, failed, POSITIONS, WINDOW, coupling, SYMBOLS)
    state = jax.lax.while_loop(lambda state: (state.done < POSITIONS).any(), one_pass, state)
    return state.codes[:, :POSITIONS], state.passes


@functools.partial(jax.jit, static_argnames=("count",))
def keys_of(count):
    return jax.random.split(jax.random.key(0), count)


def chi_square(codes, chances) -> float:
    """The p-value of Pearson's test that `codes` [B, POSITIONS] have the probabilities `chances`."""
    cells = np.asarray(codes) @ SYMBOLS ** np.arange(POSITIONS - 1, -1, -1)
    seen, expected = np.bincount(cells, minlength=len(chances)), chances * len(cells)
    assert not seen[chances == 0].any(), "what is cut off was drawn"
    rare = expected < 5
    seen, expected = (np.append(x[~rare], x[rare].sum()) for x in (seen, expected))
    if expected[-1] < 5:
        seen, expected = seen[:-1], expected[:-1] * seen[:-1].sum() / expected[:-1].sum()
    return stats.chisquare(seen, expected).pvalue


# ---------------------------------------------------------------- exactness

FEW, MANY = 40_000, pytest.param(2_000_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_whole_distribution(coupling, count):
    codes, passes = speculate(keys_of(count), PLAIN, coupling)
    assert chi_square(codes, enumerated(PLAIN)) > 0.01
    assert 2 < passes.mean() < POSITIONS and len(np.unique(passes)) > 2, "images do not go on by their own counts"


@pytest.mark.parametrize(
    "coupling, count", [("gumbel", FEW), pytest.param("maximal", 2_000_000, marks=pytest.mark.slow)]
)
def test_with_codes_cut_off(coupling, count):
    codes, _ = speculate(keys_of(count), CUT, coupling, "sampled")
    chances = enumerated(CUT)
    assert (chances == 0).sum() > 100
    assert chi_square(codes, chances) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
def test_every_first_guess(coupling, fresh):
    codes, _ = speculate(keys_of(1_000_000), PLAIN, coupling, fresh)
    assert chi_square(codes, enumerated(PLAIN)) > 0.01


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_an_image_depends_on_its_key_alone(coupling):
    keys, picks = keys_of(FEW), jnp.array([*range(7, 20)] * (FEW // 13) + [5] * (FEW % 13))
    codes, passes = speculate(keys, PLAIN, coupling)
    others, own = speculate(keys[picks], PLAIN, coupling)
    np.testing.assert_array_equal(others, codes[picks])
    np.testing.assert_array_equal(own, passes[picks])


def one_by_one(keys, sampler) -> np.ndarray:
    """The plain loop's codes."""
    codes = np.full((len(keys), POSITIONS + 2), SYMBOLS)
    for i in range(POSITIONS):
        logits = logits_of(jnp.full(len(keys), i), codes[:, i + 1], codes[:, i])
        codes[:, i + 2] = sampler(step_keys(keys, i), logits)
    return codes[:, 2:]


GREEDY = make_sampler(0)


@pytest.mark.parametrize(
    "coupling, sampler",
    [
        ("same", PLAIN),
        pytest.param("maximal", GREEDY, marks=pytest.mark.slow),
        pytest.param("gumbel", GREEDY, marks=pytest.mark.slow),
    ],
)
def test_code_for_code(coupling, sampler):
    """By shared noise alone, and greedy by any rule, the images are the plain loop's."""
    keys = keys_of(FEW)
    codes, passes = speculate(keys, sampler, coupling)
    np.testing.assert_array_equal(codes, one_by_one(keys, sampler))
    assert passes.mean() < POSITIONS


# ---------------------------------------------------------------- errors that the test must find


def keeps_old_laws(keys, state: Guesses, settled: Settled) -> Settled:
    """Guesses that stand keep the law that they were once drawn by, as in SCD's `_call_maximal`."""
    kept = settled.codes[:, :-1] == state.window(WINDOW)[:, 1:]
    return settled._replace(
        laws=settled.laws.at[:, :-1].set(jnp.where(kept[..., None], state.laws, settled.laws[:, :-1]))
    )


def in_step(keys, state: Guesses, settled: Settled, keep_old: bool) -> Settled:
    """Both images of two go on by the smaller count, and codes behind a fall are drawn anew, as in SJD's batches."""
    ahead, own = jnp.arange(WINDOW), settled.count[:, None]
    anew = jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, 1000), number))(keys, state.passes)
    drawn = jax.vmap(jax.random.categorical)(anew, jnp.log(settled.laws))
    codes = jnp.where(ahead < own, settled.codes, drawn).astype(jnp.int32)
    laws = settled.laws
    if keep_old:
        stood = (ahead[:-1] < own - 1)[..., None]
        laws = laws.at[:, :-1].set(jnp.where(stood, state.laws, laws[:, :-1]))
    return Settled(codes, settled.count.reshape(-1, 2).min(1).repeat(2), laws)


in_step_with_old_laws = functools.partial(in_step, keep_old=True)
in_step_with_new_laws = functools.partial(in_step, keep_old=False)


@pytest.mark.parametrize("error", [keeps_old_laws, in_step_with_old_laws], ids=["scd", "sjd"])
def test_known_errors_are_found(error):
    codes, _ = speculate(keys_of(FEW), PLAIN, "maximal", tamper=error)
    assert chi_square(codes, enumerated(PLAIN)) < 1e-9


@pytest.mark.slow
def test_going_on_in_step_is_no_error_by_itself():
    codes, _ = speculate(keys_of(FEW), PLAIN, "maximal", tamper=in_step_with_new_laws)
    assert chi_square(codes, enumerated(PLAIN)) > 0.01
