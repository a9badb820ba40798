"""VQ codes on all devices of a process, while the next images are read."""

import jax
import numpy as np
import pytest

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import get_preset
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params
from tests.data.test_prepare import SIDE, content, encode
from train.fleet.encoder import vq_encoder
from train.prepare import prepare
from train.raw.sources import open_source

CONFIG = get_preset("janus_tiny")


@pytest.mark.slow
def test_codes_are_the_same_on_any_number_of_devices(tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(CONFIG))
    checkpoint.save(tmp_path, CONFIG, params)
    write_tokenizer(tmp_path, image_size=SIDE)
    pixels = rng.uniform(-1, 1, (16, SIDE, SIDE, 3)).astype(np.float32)
    assert len(jax.devices()) == 8
    expected, found = vq_encoder(tmp_path, jax.devices()[:1])[0](pixels), None
    for count in (2, 8):
        encode_on = vq_encoder(tmp_path, jax.devices()[:count])[0]
        found = encode_on(pixels)
        assert len(found.sharding.device_set) == count
        np.testing.assert_array_equal(found, expected)
    # A number of images that eight devices do not divide.
    np.testing.assert_array_equal(encode_on(pixels[:13]), expected[:13])


class Late:
    """Codes that a device may still be computing; notes how many batches had been started when they are waited for."""

    def __init__(self, images, log):
        self.codes, self.log = encode(images), log
        log.append("started")

    def __array__(self, *_, **__):
        self.log.append("waited for")
        return self.codes


def test_the_next_images_are_read_while_others_are_encoded(captions, processor, tmp_path):
    source, log = open_source(captions), []
    given = {"shard_size": 10, "max_bad_share": 0.5, "context": 100, "progress": False, "batch_size": 2}
    prepare(source, tmp_path / "whole", "generation", processor, encode=encode, **given)
    prepare(source, tmp_path / "out", "generation", processor, encode=lambda images: Late(images, log), **given)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # In each shard, of eight and of ten samples: one batch is always being encoded while another is waited for.
    for batches, begin in ((4, 0), (5, 8)):
        own = log[begin : begin + 2 * batches]
        assert own == ["started", *["started", "waited for"] * (batches - 1), "waited for"], own
    assert len(log) == 18
