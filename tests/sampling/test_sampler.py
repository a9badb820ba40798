"""How one token is drawn: frequencies, truncation against transformers' warpers, and settings out of range."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from janus_jax.processing.chat import bucket
from janus_jax.sampling.images import guide
from janus_jax.sampling.sampler import Sampler, _kept, make_sampler


def keys(count: int):
    return jax.random.split(jax.random.key(7), count)


LOGITS = np.log(np.array([0.3, 0.02, 0.25, 0.1, 0.05, 0.2, 0.08], np.float32)) + 3


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.3, 0.02, 0.25, 0.1, 0.05, 0.2, 0.08]),
        ({"temperature": 0.5}, [0.09, 0.0004, 0.0625, 0.01, 0.0025, 0.04, 0.0064]),
        ({"temperature": 2.0}, np.sqrt([0.3, 0.02, 0.25, 0.1, 0.05, 0.2, 0.08])),
        ({"top_k": 3}, [0.3, 0, 0.25, 0, 0, 0.2, 0]),
        ({"top_k": 7}, [0.3, 0.02, 0.25, 0.1, 0.05, 0.2, 0.08]),
        ({"top_k": 1000}, [0.3, 0.02, 0.25, 0.1, 0.05, 0.2, 0.08]),
        # 0.3 + 0.25 falls short of 0.6, so the token that crosses it, 0.2, stays.
        ({"top_p": 0.6}, [0.3, 0, 0.25, 0, 0, 0.2, 0]),
        ({"top_p": 0.54}, [0.3, 0, 0.25, 0, 0, 0, 0]),
        # Of what top_k leaves (0.4, 0.33, 0.27) the first two hold 0.73.
        ({"top_k": 3, "top_p": 0.7}, [0.3, 0, 0.25, 0, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.7}, [0.09, 0, 0.0625, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_frequencies(settings, expected):
    """20 000 draws against the renormalized distribution: none outside it, chi-square within its 1 - 1e-6 quantile."""
    count = 20_000
    sampler = make_sampler(**settings)
    tokens = jax.jit(sampler.__call__)(keys(count), jnp.broadcast_to(LOGITS, (count, len(LOGITS))))
    assert tokens.dtype == jnp.int32
    observed = np.bincount(tokens, minlength=len(LOGITS))
    expected = count * np.array(expected) / np.sum(expected)
    inside = expected > 0
    assert observed[~inside].sum() == 0
    statistic = np.sum((observed[inside] - expected[inside]) ** 2 / expected[inside])
    assert statistic < stats.chi2.ppf(1 - 1e-6, inside.sum() - 1), f"observed {observed}, expected {expected}"


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str
)
def test_greedy_limits(settings, rng):
    logits = rng.standard_normal((50, 300)).astype(np.float32)
    np.testing.assert_array_equal(make_sampler(**settings)(keys(50), jnp.asarray(logits)), logits.argmax(-1))


@pytest.mark.parametrize("logits, top_k", [([3.0, 1, 1, 1, 0], 2), ([200.0, 0, 0, -1], 2), ([0.0, 0, 0], 1)])
def test_ties_at_the_border_of_top_k_all_stay(logits, top_k):
    """Those of next to no probability too: in float32 the likelier ones add up to 1."""
    logits = np.array(logits, np.float32)
    kept = _kept(jnp.asarray(logits)[None], jnp.int32(top_k), jnp.float32(1))[0]
    np.testing.assert_array_equal(kept, logits >= np.sort(logits)[-top_k])


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.05, 1), st.floats(0.1, 5))
def test_truncation_against_transformers(seed, top_k, top_p, spread):
    """The tokens kept are those that TopKLogitsWarper and then TopPLogitsWarper keep."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    logits = np.random.default_rng(seed).normal(0, spread, (2, 40)).astype(np.float32)
    cut = transformers.TopKLogitsWarper(top_k)(None, torch.tensor(logits))
    if top_p < 1:
        cut = transformers.TopPLogitsWarper(top_p)(None, cut)
    np.testing.assert_array_equal(_kept(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)), cut > -np.inf)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -3}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got"):
        make_sampler(**settings)


def test_settings_share_a_program():
    """Changing a temperature, a top_k or a top_p compiles nothing anew: only greedy and truncated are static."""
    structures = {
        jax.tree.structure(make_sampler(*settings)) for settings in ((0.5, 3, 0.9), (1.0, 50, 1.0), (2.0, None, 0.1))
    }
    assert len(structures) == 1
    assert jax.tree.structure(make_sampler(0.5)) not in structures
    assert isinstance(make_sampler(0.5), Sampler) and not make_sampler(0.5).truncated


def test_guide(rng):
    logits = rng.standard_normal((4, 2, 9)).astype(np.float32)
    expected = logits[:, 1] + 5 * (logits[:, 0] - logits[:, 1])
    np.testing.assert_allclose(guide(logits, 5.0), expected, rtol=1e-6)
    np.testing.assert_array_equal(guide(logits[:, :1], 5.0), logits[:, 0])


@hypothesis.given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_bucket(a, b):
    size = bucket(a)
    assert size >= max(a, 32)
    assert size % 16 == 0
    assert bucket(size) == size, "a bucket is its own bucket"
    assert size == 32 or size <= (1.5 if a <= 512 else 1.125) * a, "a third of the work at most is padding, or a ninth"
    if a <= b:
        assert size <= bucket(b)


def test_buckets_are_few():
    assert sorted({bucket(n) for n in range(1, 4097)}) == [
        32, 48, 64, 96, 128, 192, 256, 384, 512,
        *range(576, 1024, 64), *range(1024, 2048, 128), *range(2048, 4097, 256),
    ]  # fmt: skip
