"""What happens inside: against the sampling loops, which have a cache, and against values worked out by hand.

Attention weights are compared with the oracle's in tests/model/test_llama.py.
"""
# ruff: noqa: F811  (fixtures are imported)

import numpy as np
import pytest
from PIL import Image

from janus_jax import inside
from janus_jax.sampling.images import generate_codes, guide
from janus_jax.sampling.sampler import Options
from tests.library.tiny_janus import LONG, QUESTION, SHORT, folder, janus, raises_one_line  # noqa: F401

ANSWER = "It is red."


@pytest.fixture(scope="module")
def drawn(janus):
    """Codes and guided logits of two prompts of different lengths, from the loop."""
    options = Options(cfg_weight=3.0)
    ids, mask, keys = janus._drawing([SHORT, LONG], 1, options)
    given = {"guidance": 3.0, "sampler": options.sampler, "keep_logits": True}
    codes, logits = generate_codes(janus.model, janus.params, ids, mask, keys, **given)
    return np.asarray(codes), np.asarray(logits)


@pytest.mark.slow
def test_code_logits_are_those_of_drawing(janus, drawn):
    codes, logits = drawn
    found = inside.code_logits(janus, [SHORT, LONG], codes)
    assert found.shape == (2, 2, *logits.shape[1:])
    guided = [guide(found[:, :, i], 3.0) for i in range(codes.shape[1])]
    np.testing.assert_allclose(np.stack(guided, 1), logits, atol=2e-4)
    alone = inside.code_logits(janus, SHORT, codes[:1])
    np.testing.assert_allclose(alone[0], found[0], atol=2e-4)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.01  # the prompt makes a difference


def test_entropy():
    assert inside.entropy(np.zeros((2, 3, 256))) == pytest.approx(np.full((2, 3), 8))
    assert inside.entropy(np.array([0, -1e9, -1e9])) == pytest.approx(0)
    assert inside.entropy(np.log([0.5, 0.25, 0.25])) == pytest.approx(1.5)
    # At temperature 0.5 the probabilities are squared: 2/3, 1/6, 1/6.
    assert inside.entropy(np.log([0.5, 0.25, 0.25]), 0.5) == pytest.approx(1.2516292)


@pytest.mark.slow
def test_growing(janus, drawn):
    codes = drawn[0][:1]
    most, size = codes.shape[1], janus.config.gen_vision.image_size
    pictures = inside.growing(janus, codes[0], [0, most // 2, most], background=(200, 10, 10))
    empty = janus.encode_images([Image.new("RGB", (size, size), (200, 10, 10))])
    half = np.concatenate([codes[:, : most // 2], empty[:, most // 2 :]], axis=1)
    assert np.array_equal(pictures, janus.decode_codes(np.concatenate([empty, half, codes])))


def test_attention_of_an_answer(janus):
    picture, other = (Image.new("RGB", (40, 40), color) for color in ("red", "blue"))
    seen = inside.answering_attention(janus, QUESTION, [picture], ANSWER)
    config, tokens = janus.config, janus.processor.tokenizer
    said = tokens.encode(" " + ANSWER, add_bos=False)
    total = len(seen.tokens)
    assert seen.drawn == [tokens.decode([i]) for i in said]
    assert seen.weights.shape == (config.language.layers, config.language.heads, len(said), total)
    np.testing.assert_allclose(seen.weights.sum(-1), 1, atol=1e-5)
    for row in range(len(said)):  # each row sees what came before, and only the last one sees all
        ahead = seen.weights[:, :, row, total - len(said) + row + 1 :]
        assert not ahead.any()
    assert seen.image.sum() == config.vision.num_patches
    assert all(text == "" for text, image in zip(seen.tokens, seen.image, strict=True) if image)
    assert "".join(seen.tokens).endswith(QUESTION + "\n\n<|Assistant|>:" + "".join(seen.drawn[:-1]))
    grid = config.vision.image_size // config.vision.patch_size
    assert seen.maps.shape == (*seen.weights.shape[:3], grid, grid)
    first = np.flatnonzero(seen.image)[0]
    assert np.array_equal(seen.maps[..., 1, 2], seen.weights[..., first + grid + 2])
    assert not np.allclose(seen.weights, inside.answering_attention(janus, QUESTION, [other], ANSWER).weights)


def test_attention_of_a_drawing(janus, drawn):
    codes = drawn[0][0]
    seen = inside.drawing_attention(janus, SHORT, codes)
    prompt = len(janus.processor.text_to_image_prompt(SHORT))
    assert seen.weights.shape[2:] == (len(codes), prompt + len(codes) - 1)
    assert seen.drawn == [str(code) for code in codes]
    assert seen.image.tolist() == [False] * prompt + [True] * (len(codes) - 1)
    np.testing.assert_allclose(seen.weights.sum(-1), 1, atol=1e-5)
    assert not seen.weights[:, :, 0, prompt:].any() and seen.weights[:, :, -1].all()


def test_refusals(janus, drawn):
    codes = drawn[0]
    with raises_one_line("1 prompts came with the codes of 2 images"):
        inside.code_logits(janus, [SHORT], codes)
    with raises_one_line("codes must have shape"):
        inside.code_logits(janus, SHORT, codes[:, :3])
    with raises_one_line("one image at a time"):
        inside.drawing_attention(janus, SHORT, codes)
    with raises_one_line("the answer is empty"):
        inside.answering_attention(janus, QUESTION, [], "  ")
    for counts in ([], [-1], [codes.shape[1] + 1]):
        with raises_one_line("counts from 0 to"):
            inside.growing(janus, codes[0], counts)
