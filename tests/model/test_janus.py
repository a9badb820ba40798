"""The whole model: understanding and text generation against the oracle, with images placed in left-padded prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model.janus import Janus, init_params, place_images
from janus_jax.sampling.text import embed_prompt, generate_tokens
from janus_jax.sharding import flatten


@pytest.fixture(scope="module")
def prompts(case):
    """A batch of prompts with two, one and one images: ids, mask, pixels [3, 2, h, w, 3], and the four images alone."""
    rng, v = np.random.default_rng(2), case.config.vision
    placeholder = case.config.language.vocab_size - 1
    image = [placeholder] * v.num_patches

    def draw(n):
        return list(rng.integers(5, placeholder, n))

    rows = [draw(3) + image + draw(2) + image + draw(4), draw(6) + image + draw(1), image + draw(5)]
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    pixels = rng.uniform(-1, 1, (3, 2, v.image_size, v.image_size, 3)).astype(np.float32)
    return ids, mask, pixels, pixels[[0, 0, 1, 2], [0, 1, 0, 0]]


def embed(case, ids, pixels):
    return embed_prompt(case.model, case.params, ids, ids == case.config.language.vocab_size - 1, pixels)


def keys(count: int):
    return jax.random.split(jax.random.key(0), count)


def test_understanding_logits(case, prompts, oracle, close):
    ids, mask, pixels, images = prompts
    x = embed(case, ids, pixels)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    logits = case.run("text_logits", case.run("hidden", x, positions, mask.astype(np.int32)))
    close(np.asarray(logits)[mask], oracle.text_logits(case.torch_model, ids, mask, images)[mask], "text logits")


def test_images_reach_their_own_slots(tiny, rng):
    """Swapping a row's two images swaps their embeddings; a row's spare image is ignored."""
    v, placeholder = tiny.config.vision, tiny.config.language.vocab_size - 1
    n = v.num_patches
    row = np.array([1, 2] + [placeholder] * n + [3] + [placeholder] * n + [4])
    ids = np.stack([row, np.concatenate([np.full(n, 5), row[:-n]])])
    ids[1, -1 - n :] = 6
    pixels = rng.uniform(-1, 1, (2, 2, v.image_size, v.image_size, 3)).astype(np.float32)
    straight, swapped = (np.asarray(embed(tiny, ids, p)) for p in (pixels, pixels[:, ::-1]))
    first, second = slice(2, 2 + n), slice(3 + n, 3 + 2 * n)
    np.testing.assert_allclose(straight[0, first], swapped[0, second], atol=1e-5)
    np.testing.assert_allclose(straight[0, second], swapped[0, first], atol=1e-5)
    assert np.abs(straight[0, first] - straight[0, second]).max() > 0.1
    spare = pixels.copy()
    spare[1, 1] = 0
    np.testing.assert_array_equal(straight[1], np.asarray(embed(tiny, ids, spare))[1])


def test_place_images():
    x = -np.arange(1, 11, dtype=np.float32).reshape(2, 5, 1)
    where = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]], bool)
    features = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1)
    placed = place_images(jnp.asarray(x), jnp.asarray(where), jnp.asarray(features))[..., 0]
    np.testing.assert_array_equal(placed, [[-1, 1, 2, -4, 3], [-6, -7, -8, 4, -10]])


@pytest.mark.slow
def test_greedy_text_stops_at_eos(case, prompts, oracle):
    """Tokens identical to transformers' generate; the end of the sentence is a token that rows reach at odd times."""
    ids, mask, pixels, images = prompts
    x = embed(case, ids, pixels)
    endless = oracle.generate_text(case.torch_model, ids, mask, images, 16, eos_id=-1)
    assert endless.shape == (3, 16)
    ours = generate_tokens(case.model, case.params, x, mask, keys(3), eos_id=-1, max_new_tokens=16)
    np.testing.assert_array_equal(ours, endless)

    eos = int(endless[0, 6])  # one row at least stops before the last token
    theirs = oracle.generate_text(case.torch_model, ids, mask, images, 16, eos_id=eos)
    ours = np.asarray(generate_tokens(case.model, case.params, x, mask, keys(3), eos_id=eos, max_new_tokens=16))
    assert (ours[0, np.argmax(ours[0] == eos) :] == eos).all(), "a row that is done repeats eos"
    stop = theirs.shape[1]
    np.testing.assert_array_equal(ours[:, :stop], theirs)
    assert (ours[:, stop:] == eos).all()


def test_text_without_images(tiny, rng, oracle):
    ids = rng.integers(5, 500, (2, 7))
    mask = np.ones_like(ids, bool)
    mask[1, :3] = False
    x = embed_prompt(tiny.model, tiny.params, ids, np.zeros_like(mask), None)
    ours = generate_tokens(tiny.model, tiny.params, x, mask, keys(2), eos_id=-1, max_new_tokens=8)
    np.testing.assert_array_equal(ours, oracle.generate_text(tiny.torch_model, ids, mask, None, 8, eos_id=-1))


def test_init_params_has_the_checkpoint_s_tree(case):
    """Same paths and shapes from init as from the checkpoint, in both layouts of the decoder's layers."""
    for made in (case, case.unstacked):
        init = jax.eval_shape(lambda key, model=made.model: init_params(model, key), jax.random.key(0))
        shapes = {path: leaf.shape for path, leaf in flatten(init).items()}
        assert shapes == {path: leaf.shape for path, leaf in flatten(made.params).items()}


def test_init_params_dtype(tiny):
    model = Janus(tiny.config, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
