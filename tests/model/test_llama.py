"""The decoder: against the oracle, and its cache against its own full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import PRESETS
from janus_jax.model.attention import attend, causal_mask
from janus_jax.model.janus import Janus
from janus_jax.model.kv_cache import cache_bytes, init_cache

LENGTHS = (9, 5, 1)  # of three prompts in one batch, padded on the left


def left_padded(rng, width: int, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [3, T, D] and mask [3, T] of prompts of LENGTHS, with `padding` more slots than the longest needs."""
    total = max(LENGTHS) + padding
    mask = np.arange(total) >= total - np.array(LENGTHS)[:, None]
    x = np.zeros((len(LENGTHS), total, width), np.float32)
    x[:, padding:] = rng.standard_normal((len(LENGTHS), max(LENGTHS), width))
    return x, mask


def positions_of(mask: np.ndarray) -> np.ndarray:
    return np.maximum(np.cumsum(mask, 1) - 1, 0)


def full_forward(case, x, mask):
    return np.asarray(case.run("hidden", x, positions_of(mask), mask.astype(np.int32)))


def fill(case, x, mask, slots: int):
    """Hidden states and cache of a prefill."""
    cache = init_cache(case.config.language, len(x), slots, case.model.dtype, case.model.scan_layers)
    return case.run("prefill", x, mask, cache)


def test_hidden_with_left_padding(case, rng, oracle, close):
    x, mask = left_padded(rng, case.config.language.width)
    theirs = oracle.hidden(case.torch_model, x, mask)
    close(full_forward(case, x, mask)[mask], theirs[mask], "hidden states, full forward")
    close(fill(case, x, mask, 12)[0][mask], theirs[mask], "hidden states, prefill")


def test_unstacked_layers(case, rng, oracle, close):
    x, mask = left_padded(rng, case.config.language.width)
    theirs = oracle.hidden(case.torch_model, x, mask)
    close(full_forward(case.unstacked, x, mask)[mask], theirs[mask], "hidden states, full forward")


def test_attention_on_cpu(case, rng, oracle, close):
    """What CPU computes, of a batch that is long enough for flat products."""
    on_cpu = dataclasses.replace(case.unstacked, model=case.unstacked.model.clone(cpu=True))
    x, mask = left_padded(rng, case.config.language.width, padding=150)
    theirs = oracle.hidden(case.torch_model, x, mask)
    close(full_forward(on_cpu, x, mask)[mask], theirs[mask], "hidden states, full forward")
    close(fill(on_cpu, x, mask, 200)[0][mask], theirs[mask], "hidden states, prefill")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_attention_weights(case, scan_layers, rng, oracle, close):
    """Sown for who asks for them, and nothing else changes."""
    ours = case if scan_layers else case.unstacked
    x, mask = left_padded(rng, case.config.language.width)
    theirs = oracle.attention_weights(case.torch_model, x, mask)
    given = {"params": ours.params}, x, positions_of(mask), mask.astype(np.int32)
    hidden, seen = ours.model.apply(*given, method="hidden", mutable=["intermediates"])
    assert np.array_equal(hidden, ours.model.apply(*given, method="hidden"))
    decoder = seen["intermediates"]["language_model"]
    layers = range(case.config.language.layers)
    weights = (
        decoder["layers"]["self_attn"]["weights"][0]
        if scan_layers
        else np.stack([decoder[f"layers_{i}"]["self_attn"]["weights"][0] for i in layers])
    )
    rows = np.asarray(weights).reshape(theirs.shape).transpose(1, 3, 0, 2, 4)[mask]
    close(rows, theirs.transpose(1, 3, 0, 2, 4)[mask], "attention weights of each token")


def test_heads(case, rng, oracle, close):
    hidden = rng.standard_normal((2, 3, case.config.language.width)).astype(np.float32)
    theirs = case.torch_model.lm_head(oracle.torch.tensor(hidden)).detach().numpy()
    close(case.run("text_logits", hidden), theirs, "text head")
    close(case.run("image_logits", hidden), oracle.image_logits(case.torch_model, hidden), "image head")


def test_embed_text(case, rng, oracle, close):
    ids = rng.integers(0, case.config.language.vocab_size, (2, 5))
    close(case.run("embed_text", ids), oracle.embed_text(case.torch_model, ids), "text embeddings", 0)


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_cached_decode_equals_full_forward(case, scan_layers, rng, oracle, close):
    """Prompt, then one, one, three and one tokens, in a cache with slots to spare."""
    case = case if scan_layers else case.unstacked
    x, mask = left_padded(rng, case.config.language.width)
    new = rng.standard_normal((len(x), 6, x.shape[-1])).astype(np.float32)
    whole, whole_mask = np.concatenate([x, new], 1), np.pad(mask, ((0, 0), (0, 6)), constant_values=True)
    theirs = oracle.hidden(case.torch_model, whole, whole_mask)
    close(full_forward(case, whole, whole_mask)[whole_mask], theirs[whole_mask], "full forward")

    _, cache = fill(case, x, mask, slots=20)
    pieces = []
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6)):
        hidden, cache = case.run("decode", new[:, start:stop], cache)
        pieces.append(hidden)
    close(np.concatenate(pieces, 1), theirs[:, -6:], "cached decode")
    assert int(cache.length) == whole.shape[1]
    np.testing.assert_array_equal(cache.positions, whole_mask.sum(1))
    np.testing.assert_array_equal(cache.mask, np.pad(whole_mask, ((0, 0), (0, 20 - whole.shape[1]))))


def test_longer_padding_changes_nothing(tiny, rng, close):
    width = tiny.config.language.width
    (x, mask), (longer, longer_mask) = (left_padded(np.random.default_rng(1), width, padding) for padding in (0, 7))
    new = rng.standard_normal((len(x), 1, width)).astype(np.float32)
    results = []
    for prompt, prompt_mask in ((x, mask), (longer, longer_mask)):
        hidden, cache = fill(tiny, prompt, prompt_mask, slots=30)
        results.append((hidden[:, -1], tiny.run("decode", new, cache)[0]))
    for short, long in zip(*results, strict=True):
        close(long, short, "hidden states", 1e-5)


def test_packed_segments_equal_apart(case, rng, oracle, close):
    """Three samples in one row, positions restarting, against each of them alone in the oracle."""
    lengths = (5, 8, 3)
    samples = [rng.standard_normal((1, n, case.config.language.width)).astype(np.float32) for n in lengths]
    row = np.concatenate(samples, 1)
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = np.asarray(case.run("hidden", row, positions, segments))
    theirs = np.concatenate([oracle.hidden(case.torch_model, s, np.ones(s.shape[:2])) for s in samples], 1)
    close(packed, theirs, "packed hidden states")

    changed = row.copy()
    changed[:, 5:13] += 1
    again = np.asarray(case.run("hidden", changed, positions, segments))
    np.testing.assert_array_equal(again[:, segments[0] != 2], packed[:, segments[0] != 2])
    assert (again[:, 5:13] != packed[:, 5:13]).any(axis=-1).all()


def test_hidden_is_causal(tiny, rng):
    x = rng.standard_normal((1, 8, tiny.config.language.width)).astype(np.float32)
    ones = np.ones((1, 8), np.int32)
    before = np.asarray(tiny.run("hidden", x, np.arange(8)[None], ones))
    x[:, 5] += 1
    after = np.asarray(tiny.run("hidden", x, np.arange(8)[None], ones))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bfloat16(tiny, scan_layers, rng):
    """In bfloat16 the same layers run, cache included, near the float32 result and with float32 logits."""
    exact = tiny if scan_layers else tiny.unstacked
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact.params)
    model = Janus(tiny.config, dtype=jnp.bfloat16, scan_layers=scan_layers)
    half = dataclasses.replace(exact, model=model, params=params)
    x, mask = left_padded(rng, tiny.config.language.width)
    new = rng.standard_normal((len(x), 1, x.shape[-1])).astype(np.float32)
    logits = []
    for case, dtype in ((exact, jnp.float32), (half, jnp.bfloat16)):
        _, cache = fill(case, x.astype(dtype), mask, 12)
        hidden, cache = case.run("decode", new.astype(dtype), cache)
        assert hidden.dtype == cache.keys[0].dtype == cache.values[0].dtype == dtype
        logits.append(case.run("text_logits", hidden))
        assert logits[-1].dtype == jnp.float32
    error = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    assert 1e-5 < error < 0.05, f"relative error {error:.2e}, and bfloat16 keeps 8 bits"


def test_cache_bytes():
    language = PRESETS["janus_pro_7b"].language
    cache = jax.eval_shape(lambda: init_cache(language, 32, 600, jnp.bfloat16))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.keys, *cache.values))
    assert cache_bytes(language, 32, 600, jnp.bfloat16) == total == 2 * 30 * 4096 * 32 * 600 * 2


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attend(kv_heads, rng, oracle, close):
    q = rng.standard_normal((2, 5, 6, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, kv_heads, 7, 8)).astype(np.float32)
    mask = rng.random((2, 5, 7)) < 0.6
    mask[..., 0] = True
    tensors = [oracle.torch.tensor(a) for a in (q.swapaxes(1, 2), k, v, mask[:, None])]
    sdpa = oracle.torch.nn.functional.scaled_dot_product_attention
    theirs = sdpa(*tensors[:3], attn_mask=tensors[3], enable_gqa=True).numpy().swapaxes(1, 2)
    close(jax.jit(attend)(q, k, v, mask), theirs, "attention with a mask", 1e-6)
    close(jax.jit(attend)(q, k, v), sdpa(*tensors[:3], enable_gqa=True).numpy().swapaxes(1, 2), "without", 1e-6)


def test_attend_nowhere_is_the_mean(rng):
    q = rng.standard_normal((1, 2, 3, 4)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 3, 5, 4)).astype(np.float32)
    y = jax.jit(attend)(q, k, v, np.zeros((1, 2, 5), bool))
    np.testing.assert_allclose(y[0, 0], v[0].mean(1), rtol=1e-5, atol=1e-6)


def test_causal_mask():
    mask = np.asarray(jax.jit(causal_mask)(jnp.array([[0, 1, 1, 2]])))[0].astype(int)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
