"""Windows of guessed codes through the model: the images of the plain loop, code for code, whatever is guessed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.sampling.finite import NotFinite
from janus_jax.sampling.images import generate_codes, start_image
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.speculative import (
    _AUTO,
    behind_first,
    check_speculate,
    continue_windows,
    slots_of,
    window_of,
)
from janus_jax.sharding import make_mesh
from tests.sampling.test_sampling import GREEDY, image_keys, pairs

WINDOW = 4
COLD = make_sampler(0.3, top_k=20, top_p=0.9)


def draw(case, sampler, ids=None, mask=None, keys=None, speculate=WINDOW, model=None, params=None, **settings):
    if ids is None:
        ids, mask = pairs(case)
    keys = image_keys(len(ids)) if keys is None else keys
    given = (model or case.model, params or case.params, ids, mask, keys)
    codes, logits = generate_codes(*given, sampler=sampler, speculate=speculate, guidance=3.0, **settings)
    assert logits is None
    return np.asarray(codes)


@pytest.fixture(scope="module")
def plain(tiny):
    """Codes of the plain loop, by sampler."""
    return functools.cache(lambda sampler_name: draw(tiny, SAMPLERS[sampler_name], speculate=False))


SAMPLERS = {"greedy": GREEDY, "cold": COLD}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_plain_loops_codes(tiny, plain, name):
    """Prompts of different lengths, padded on the left; also with progress shown, in pieces."""
    codes = plain(name)
    np.testing.assert_array_equal(draw(tiny, SAMPLERS[name]), codes)
    seen = []
    np.testing.assert_array_equal(draw(tiny, SAMPLERS[name], progress=seen.append), codes)
    assert sum(seen) == codes.shape[1]


def test_guesses_that_are_right(tiny, plain):
    """Right guesses are all taken, and the code behind them; of others, what comes before the first wrong one."""
    codes, (ids, mask) = plain("cold"), pairs(tiny)
    tokens, keys, weight = codes.shape[1], image_keys(len(ids)), jnp.float32(3.0)
    slots = slots_of(ids.shape[2], tokens, WINDOW)
    state = start_image(tiny.model, tiny.params, ids, mask, keys, weight, COLD, tokens, False, slots)
    begun = behind_first(tiny.model, state.cache, state.codes[:, 0], state.failed, tokens, WINDOW)
    guesses = np.pad(codes, ((0, 0), (0, WINDOW)))
    size = tiny.config.gen_vision.codebook_size
    guesses[1, 3] = (guesses[1, 3] + 1) % size
    guesses[2, 1] = (guesses[2, 1] + 1) % size
    begun = dataclasses.replace(begun, images=dataclasses.replace(begun.images, codes=jnp.asarray(guesses)))
    after = continue_windows(tiny.model, tiny.params, begun, keys, weight, COLD, jnp.int32(2), window=WINDOW).images
    assert after.done.tolist() == [1 + WINDOW, 4, 2] and after.passes.tolist() == [2, 2, 2]
    for row, done in enumerate(after.done.tolist()):
        np.testing.assert_array_equal(after.codes[row, :done], codes[row, :done])


def test_where_logits_are_not_finite(tiny, plain):
    """The error of the plain loop: a damaged code is named where it is drawn for good, not where it is guessed."""
    codes = plain("greedy")
    step, code = next((i, c) for i, c in enumerate(codes[1][:-1]) if c not in codes[[0, 2]] and c not in codes[1][:i])
    embedding = tiny.params["gen_embed"]["embedding"].at[int(code)].set(jnp.nan)
    broken = tiny.params | {"gen_embed": {"embedding": embedding}}
    told = []
    for speculate in (False, WINDOW):
        with pytest.raises(NotFinite) as caught:
            draw(tiny, GREEDY, params=broken, speculate=speculate)
        assert caught.value.rows == [1]
        told.append(str(caught.value))
    assert told[0] == told[1] and f"after code {step} " in told[0]


@pytest.mark.parametrize("images", [slice(1, 2), slice(None)], ids=["one row", "pairs"])
def test_as_it_is_computed_on_a_cpu(tiny, images):
    """Layers apart; padded prompts, and the single row of an image without guidance, whose keys are kept twice."""
    ids, mask = (x[images, : 1 if images.stop else 2] for x in pairs(tiny))
    assert images.stop or not mask.all()
    model = dataclasses.replace(tiny.unstacked.model, cpu=True)
    given = {"ids": ids, "mask": mask, "model": model, "params": tiny.unstacked.params}
    np.testing.assert_array_equal(draw(tiny, COLD, **given), draw(tiny, COLD, speculate=False, **given))


@pytest.mark.slow
def test_on_a_mesh(tiny, plain):
    """The rows split by two, each half with a length for each row."""
    ids, mask = (np.concatenate([x, x[:1]]) for x in pairs(tiny))
    keys = image_keys(4).at[3].set(image_keys(1)[0])
    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        np.testing.assert_array_equal(draw(tiny, COLD, ids, mask, keys)[:3], plain("cold"))


# ---------------------------------------------------------------- which window


@pytest.mark.parametrize("wrong", [0, 1, -4, 17, True, None, 2.0, "on", "8", [4], float("nan")])
def test_windows_that_are_refused(tiny, wrong):
    with pytest.raises(
        ValueError, match=r"^speculate must be 'auto', False or a window from 2 to 16, an image's codes, got"
    ):
        check_speculate(wrong, 16)
    with pytest.raises(ValueError, match="speculate must be 'auto', False or a window from 2 to"):
        draw(tiny, GREEDY, speculate=wrong)


def test_windows_that_are_taken():
    assert [check_speculate(x, 16) for x in ("auto", False, 2, np.int64(16))] == ["auto", False, 2, 16]
    assert check_speculate(10**6) == 10**6  # how many codes an image has is known later


def test_logits_are_of_the_plain_loop(tiny):
    with pytest.raises(ValueError, match="speculate does not go with keep_logits"):
        draw(tiny, GREEDY, keep_logits=True)
    assert window_of("auto", 576, 1, 2, keep_logits=True) == 0


def test_meshes_that_split_a_pair():
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        assert window_of(8, 576, images=4, pair=2, keep_logits=False) == 8
        with pytest.raises(ValueError, match=r"a multiple of the mesh's 4 shards, got 2: the two rows of an image"):
            window_of(8, 576, images=2, pair=2, keep_logits=False)
        assert window_of("auto", 576, images=4, pair=2, keep_logits=False) == 0
    with jax.set_mesh(make_mesh({"tensor": 8})):
        assert window_of(8, 576, images=1, pair=2, keep_logits=False) == 8


def test_auto(monkeypatch):
    """Smaller windows for more images, and none where it would not pay, or was not measured."""
    monkeypatch.setitem(_AUTO, "cpu", (16, 64))
    windows = [window_of("auto", 144, images, 2, False) for images in (1, 4, 8, 1000)]
    assert windows == [16, 8, 4, 0]
    assert window_of("auto", 16, 1, 2, False) == window_of(False, 144, 1, 2, False) == 0
    with jax.set_mesh(make_mesh({"tensor": 8})):
        assert window_of("auto", 144, 1, 2, False) == 0
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert window_of("auto", 144, 1, 2, False) == 16
    monkeypatch.setattr(jax, "default_backend", lambda: "unheard of")
    assert window_of("auto", 144, 1, 2, False) == 0
