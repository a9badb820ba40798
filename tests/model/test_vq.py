"""The generation tokenizer against the oracle, and its codes against the original's golden ones."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import read_config
from janus_jax.model.janus import Janus
from janus_jax.sampling.images import decode_images
from janus_jax.weights.torch_weights import read_params

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"


def quantizer_input(module: Janus, images):
    vq = module.gen_vision_model
    return vq.quant_conv(vq.encoder(images))


def nearest(module: Janus, z):
    return module.gen_vision_model.quantize.nearest(z)


def lookup(module: Janus, codes):
    return module.gen_vision_model.quantize.lookup(codes)


@pytest.fixture
def images(case, rng):
    size = case.config.gen_vision.image_size
    return rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


@pytest.fixture
def codes(case, rng):
    g = case.config.gen_vision
    return rng.integers(0, g.codebook_size, (2, g.num_tokens))


def test_encoder_features(case, images, oracle, close):
    close(case.run(quantizer_input, images), oracle.vq_features(case.torch_model, images), "encoder and quant_conv")


def test_encoder_features_of_a_faint_image(case, images, oracle, close):
    """So faint that the group norms' eps is felt. torch's own float32 is off by 1e-3 here: it cancels large means."""
    images = images / 100
    theirs = oracle.vq_features(case.torch_model, images, oracle.torch.float64)
    close(case.run(quantizer_input, images), theirs, "encoder and quant_conv")


def test_encode_codes(case, images, oracle):
    ours, theirs = np.asarray(case.run("encode_codes", images)), oracle.encode_codes(case.torch_model, images)
    assert len(np.unique(theirs)) > 4, "too few codes in use to prove anything"
    np.testing.assert_array_equal(ours, theirs)


def test_decode_codes(case, codes, oracle, close):
    ours = case.run("decode_codes", codes)
    size = case.config.gen_vision.image_size
    assert ours.shape == (2, size, size, 3)
    close(ours, oracle.decode_codes(case.torch_model, codes), "decoded image")


def test_embed_codes(case, codes, oracle, close):
    close(case.run("embed_codes", codes), oracle.embed_codes(case.torch_model, codes), "gen_embed and gen_aligner")


def test_codes_of_the_original(tiny):
    """transformers' encode leaves the normalization out; these codes are the original implementation's."""
    golden = np.load(GOLDEN / "golden.npz")
    config = read_config(GOLDEN)
    assert config == tiny.config
    params, _ = read_params(GOLDEN, config, dtype="float32")
    original = dataclasses.replace(tiny, params=params)
    codes = original.run("encode_codes", golden["vq_image"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(codes, golden["vq_ids"])


def test_nearest_ignores_lengths(tiny, rng):
    """Every code is the nearest to its own direction, whatever the length, though codebook rows differ in length."""
    codes = np.arange(tiny.config.gen_vision.codebook_size)
    vectors = np.asarray(tiny.run(lookup, codes))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)
    scaled = vectors * rng.uniform(0.01, 100, (len(codes), 1)).astype(np.float32)
    np.testing.assert_array_equal(tiny.run(nearest, scaled), codes)


def test_decode_images_truncates(tiny, rng):
    """uint8 as in the original: clip((x + 1) / 2 * 255), then the fraction is dropped, not rounded."""
    g = tiny.config.gen_vision
    codes = jnp.asarray(rng.integers(0, g.codebook_size, (2, g.num_tokens)))
    images, finite = map(np.asarray, decode_images(tiny.model, tiny.params, codes))
    assert finite.tolist() == [True, True]
    assert images.dtype == np.uint8
    expected = np.clip((np.asarray(tiny.run("decode_codes", codes), np.float64) + 1) / 2 * 255, 0, 255)
    assert (np.abs(images - expected) <= 1).all()
    settled = np.abs(expected - np.round(expected)) > 1e-3  # whole numbers may fall either way
    np.testing.assert_array_equal(images[settled], np.floor(expected[settled]))
    assert (np.floor(expected[settled]) != np.round(expected[settled])).any(), "nothing here tells the two apart"
