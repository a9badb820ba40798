"""The understanding encoder and its adapter against the oracle."""

import dataclasses

import numpy as np
import pytest


@pytest.fixture
def pixels(case, rng):
    size = case.config.vision.image_size
    return rng.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("cpu", [False, True])
def test_features(case, cpu, pixels, oracle, close):
    case = dataclasses.replace(case, model=case.model.clone(cpu=cpu))
    ours = case.run("image_features", pixels)
    assert ours.shape == (3, case.config.vision.num_patches, case.config.vision.width)
    close(ours, oracle.image_features(case.torch_model, pixels), "SigLIP features")


def test_aligned_features(case, pixels, oracle, close):
    close(case.run("embed_images", pixels), oracle.embed_images(case.torch_model, pixels), "aligned features")


def test_images_do_not_see_each_other(tiny, rng):
    size = tiny.config.vision.image_size
    pixels = rng.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
    other = pixels.copy()
    other[1] = -pixels[1]
    before, after = (np.asarray(tiny.run("image_features", x)) for x in (pixels, other))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.abs(before[1] - after[1]).max() > 0.1
