"""The pipeline: drawing, codes and pixels, and what it says of bad input."""

# ruff: noqa: F811  (fixtures are imported)

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from janus_jax import load, make_mesh
from janus_jax.sampling.images import continue_image, encode_codes, start_image
from janus_jax.sampling.sampler import Options, image_keys
from janus_jax.sharding import flatten
from tests.library.tiny_janus import (  # noqa: F401
    LONG,
    MESHES,
    OTHER,
    SHORT,
    codes,
    folder,
    janus,
    nearly_equal,
    raises_one_line,
)

# ---------------------------------------------------------------- text to image


@pytest.mark.slow
def test_images_come_prompt_by_prompt(janus, codes):
    images = janus.generate_images([SHORT, OTHER], n=5, batch_size=5)
    assert len(images) == 10 and all(isinstance(image, Image.Image) for image in images)
    assert {(image.size, image.mode) for image in images} == {((16, 16), "RGB")}
    expected = janus.decode_codes(np.concatenate([codes, janus.generate_codes(OTHER, n=5)]))
    assert nearly_equal(np.stack(images), expected)
    assert len({image.tobytes() for image in images}) == 10, "the images are alike, which proves nothing"


def test_codes_are_codes(janus, codes):
    assert codes.shape == (5, janus.config.gen_vision.num_tokens) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < janus.config.gen_vision.codebook_size
    assert len({tuple(row) for row in codes}) == 5


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batch_size_changes_nothing(janus, codes, batch_size):
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5, batch_size=batch_size), codes)


def test_fewer_images_are_the_first_ones(janus, codes):
    np.testing.assert_array_equal(janus.generate_codes([SHORT], n=2), codes[:2])
    np.testing.assert_array_equal(janus.generate_codes(SHORT), codes[:1])


def test_other_prompts_beside_change_nothing(janus, codes):
    """Longer prompts pad this one further, and parts of four mix the two."""
    mixed = janus.generate_codes([LONG, SHORT], n=5, batch_size=4)
    np.testing.assert_array_equal(mixed[5:], codes)
    assert (mixed[:5] != codes).any(axis=1).all()
    swapped = janus.generate_codes([SHORT, LONG], n=5, batch_size=4)
    np.testing.assert_array_equal(swapped, np.concatenate([mixed[5:], mixed[:5]]))


def test_seeds(janus, codes):
    other = janus.generate_codes(SHORT, n=5, seed=1)
    assert (other != codes).any(axis=1).all()
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5, seed=np.int64(1)), other)
    # One seed for each image: each as the first image of that seed.
    listed = janus.generate_codes(SHORT, n=5, seed=[1, 0, 1, 2**32 - 1, 0])
    np.testing.assert_array_equal(listed[:3], np.stack([other[0], codes[0], other[0]]))
    np.testing.assert_array_equal(listed[4], codes[0])
    assert not any((listed[3] == row).all() for row in (codes[0], other[0]))


def test_seeds_are_given_prompt_by_prompt(janus, codes):
    other = janus.generate_codes(OTHER, seed=9)
    np.testing.assert_array_equal(
        janus.generate_codes([SHORT, OTHER], seed=[0, 9], batch_size=1), np.concatenate([codes[:1], other])
    )


def test_image_keys_belong_to_seed_and_index():
    keys = [jax.random.key_data(image_keys(3, prompts, n)) for prompts, n in ((1, 4), (2, 2))]
    np.testing.assert_array_equal(keys[1], np.concatenate([keys[0][:2]] * 2))
    assert len(np.unique(keys[0], axis=0)) == 4


def test_guidance_of_one_is_the_conditional_model(janus, codes):
    """At half the rows: the result is that of both rows with weight 1, and of the conditional rows alone."""
    ours = janus.generate_codes(SHORT, n=5, cfg_weight=1)
    assert (ours != codes).any()
    row = janus.processor.text_to_image_prompt(SHORT)
    ids, mask = janus.processor.left_pad([row, janus.processor.unconditional(row)] * 5, 32)
    ids, mask = ids.reshape(5, 2, 32), mask.reshape(5, 2, 32).astype(bool)
    options, keys = Options(cfg_weight=1.0), image_keys(0, 1, 5)
    np.testing.assert_array_equal(janus.sample_codes(ids, mask, keys, options), ours)
    np.testing.assert_array_equal(janus.sample_codes(ids[:, :1], mask[:, :1], keys, options), ours)


def test_greedy(janus, codes):
    greedy = janus.generate_codes(SHORT, n=2, temperature=0)
    np.testing.assert_array_equal(greedy[0], greedy[1])
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=2, temperature=0, seed=5), greedy)
    assert (greedy != codes[:2]).any()
    # The likeliest code alone, by either truncation.
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=2, top_k=1), greedy)
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=2, top_p=1e-6), greedy)


def test_settings_share_one_program(janus, codes):
    programs = (start_image, continue_image)
    before = [program._cache_size() for program in programs]
    assert min(before) > 0
    janus.generate_codes(OTHER, n=5, cfg_weight=3, temperature=0.7, seed=8)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    "shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[:-1]), MESHES[-1]], ids=str
)
def test_meshes_change_nothing(folder, janus, codes, shape):
    """Five images fit neither eight shards nor four."""
    spread = load(folder, mesh=shape)
    kernel = spread.params["gen_head"]["vision_head"]["kernel"]
    assert len(kernel.devices()) == 8
    assert kernel.is_fully_replicated == (shape == {"data": 8})
    np.testing.assert_array_equal(spread.generate_codes(SHORT, n=5), codes)
    assert jax.sharding.get_abstract_mesh().empty, "the mesh leaked out of the call"


@pytest.mark.slow
def test_mesh_decodes_and_answers(folder, janus, codes):
    spread = load(folder, mesh=make_mesh(MESHES[-1]))
    images = spread.decode_codes(codes)
    assert nearly_equal(images, janus.decode_codes(codes))
    pieces = spread.stream_chat("What is it?", (), 6, system_prompt="")
    first = next(pieces)
    assert jax.sharding.get_abstract_mesh().empty, "the mesh leaked out of the generator"
    assert "".join([first, *pieces]).strip() == janus.chat("What is it?", (), 6, system_prompt="")


# ---------------------------------------------------------------- codes and pixels


def test_decoding_in_parts(janus, codes):
    whole = janus.decode_codes(codes)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8
    assert nearly_equal(janus.decode_codes(codes, batch_size=2), whole)
    assert len({image.tobytes() for image in whole}) == 5


def test_decoding_follows_the_memory(janus, codes, monkeypatch):
    sizes = []

    def decode(model, params, part):
        sizes.append(len(part))
        images = jnp.broadcast_to(jnp.asarray(part)[:, :1, None, None], (len(part), 16, 16, 3)).astype(jnp.uint8)
        return images, jnp.ones(len(part), bool)

    monkeypatch.setattr("janus_jax.pipeline.decode_images", decode)
    many = np.tile(codes, (8, 1))
    for free, size in ((None, 14), (10**12, 14), (1, 1)):
        monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device, free=free: free)
        sizes.clear()
        np.testing.assert_array_equal(janus.decode_codes(many)[:, 0, 0, 0], many[:, 0])
        assert set(sizes) == {size}, f"{free} bytes are free"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((0, 16), np.int32), r"shape \[B, 16\], got \[0, 16\]"),
        (np.zeros((2, 15), np.int32), r"shape \[B, 16\], got \[2, 15\]"),
        (np.zeros(16, np.int32), r"shape \[B, 16\], got \[16\]"),
        (np.full((1, 16), 256), "from 0 to 255"),
        (np.full((1, 16), -1), "from 0 to 255"),
        (np.zeros((1, 16)), "integers"),
    ],
)
def test_what_is_no_code_is_refused(janus, wrong, message):
    with raises_one_line(message):
        janus.decode_codes(wrong)


def test_encoding(janus, codes, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    ours = janus.encode_images([pixels, Image.fromarray(pixels[:, 12:28]), tmp_path / "wide.png"])
    assert ours.shape == (3, 16) and ours.dtype == np.int32
    assert ours.min() >= 0 and ours.max() < 256 and len(np.unique(ours)) > 3
    # The middle of a long side counts, whatever the image comes as.
    np.testing.assert_array_equal(ours[1:], ours[:1].repeat(2, axis=0))
    scaled = jnp.asarray(pixels[None, :, 12:28].repeat(3, axis=0) / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(encode_codes(janus.model, janus.params, scaled), ours)


@pytest.mark.slow
def test_encoding_in_parts(janus, monkeypatch):
    pictures = list(np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8))
    whole, sizes = janus.encode_images(pictures), []

    def encode(model, params, part):
        sizes.append(len(part))
        return encode_codes(model, params, part)

    monkeypatch.setattr("janus_jax.pipeline.encode_codes", encode)
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: 1)
    np.testing.assert_array_equal(janus.encode_images(pictures), whole)
    np.testing.assert_array_equal(janus.encode_images(pictures, batch_size=2), whole)
    assert sizes == [1] * 5 + [2] * 3
    with raises_one_line("no images to encode"):
        janus.encode_images([])


# ---------------------------------------------------------------- what drawing refuses


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("", {}, "what to draw, got ''"),
        (" \n", {}, "says what to draw"),
        ([SHORT, ""], {}, "what to draw, got ''"),
        ([SHORT, None], {}, "what to draw, got None"),
        ([], {}, "prompts is empty"),
        ("cat " * 600, {}, r"\d{3} tokens and 16 new tokens exceeds the model's 512 positions"),
        (SHORT, {"n": 0}, "n must be .*, got 0"),
        (SHORT, {"n": -2}, "n must be .*, got -2"),
        (SHORT, {"n": float("nan")}, "n must be .*, got nan"),
        (SHORT, {"n": 1.5}, "n must be .*, got 1.5"),
        (SHORT, {"cfg_weight": -1}, "cfg_weight must be .*, got -1"),
        (SHORT, {"cfg_weight": float("nan")}, "cfg_weight must be .*, got nan"),
        (SHORT, {"cfg_weight": float("inf")}, "cfg_weight must be .*, got inf"),
        (SHORT, {"temperature": -0.1}, "temperature must be .*, got -0.1"),
        (SHORT, {"temperature": float("nan")}, "temperature must be .*, got nan"),
        (SHORT, {"temperature": float("inf")}, "temperature must be .*, got inf"),
        (SHORT, {"top_p": 0}, "top_p must be .*, got 0"),
        (SHORT, {"top_p": 1.5}, "top_p must be .*, got 1.5"),
        (SHORT, {"top_p": float("nan")}, "top_p must be .*, got nan"),
        (SHORT, {"top_k": 0}, "top_k must be .*, got 0"),
        (SHORT, {"top_k": 2.5}, "top_k must be .*, got 2.5"),
        (SHORT, {"top_k": float("nan")}, "top_k must be .*, got nan"),
        (SHORT, {"seed": -1}, "seed must be .*, got -1"),
        (SHORT, {"seed": 2**32}, "seed must be .*, got 4294967296"),
        (SHORT, {"seed": 0.5}, "seed must be .*, got 0.5"),
        (SHORT, {"seed": None}, "seed must be .*, got None"),
        (SHORT, {"seed": [1, 2]}, "2 seeds for 1 images"),
        ([SHORT, OTHER], {"n": 2, "seed": [1, 2, 3]}, "3 seeds for 4 images"),
        (SHORT, {"seed": [float("nan")]}, "seed must be .*, got nan"),
        (SHORT, {"batch_size": 0}, "batch_size must be .*, got 0"),
        (SHORT, {"batch_size": float("nan")}, "batch_size must be .*, got nan"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(janus, monkeypatch, prompts, settings, message):
    monkeypatch.setattr("janus_jax.pipeline.generate_codes", lambda *args, **kwargs: pytest.fail("it was drawn"))
    for draw in (janus.generate_images, janus.generate_codes):
        with raises_one_line(message):
            draw(prompts, **settings)


def test_bad_batch_size_of_decoding(janus, codes):
    with raises_one_line("batch_size must be .*, got 0"):
        janus.decode_codes(codes, batch_size=0)


# ---------------------------------------------------------------- progress


def test_progress(janus, codes, capfd):
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5, batch_size=2, progress=True), codes)
    shown = capfd.readouterr()
    assert "drawing" in shown.err and "48/48" in shown.err.splitlines()[-1]  # 3 parts of 16 steps
    assert shown.out == ""


@pytest.mark.parametrize("progress", [False, None])
def test_no_progress(janus, capfd, progress):
    """None asks whether standard error is a terminal, which it is not here."""
    janus.generate_images(SHORT, n=5, progress=progress)
    assert capfd.readouterr() == ("", "")


def test_without_tokenizer(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    janus = load(bare)
    assert janus.processor is None
    for call in (janus.generate_images, janus.generate_codes, janus.chat, janus.stream_chat):
        with raises_one_line(r"bare has no tokenizer\.json"):
            call("A cat.")
    # What needs none of it works.
    assert janus.decode_codes(np.zeros((5, 16), np.int32)).shape == (5, 16, 16, 3)


def test_repr_leaves_out_the_arrays(janus):
    """A notebook shows it: seven billion parameters must not be fetched and printed for that."""
    assert len(repr(janus)) < 4000 and "language=LlamaConfig" in repr(janus)
    assert not any(path in repr(janus) for path in flatten(janus.params))
