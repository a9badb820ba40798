"""Numbers that are not finite end a call with one line that says where, in which dtype, and what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import __main__
from janus_jax.sampling.batches import first
from janus_jax.sampling.finite import NotFinite
from janus_jax.sampling.sampler import Options, check_guidance, make_sampler
from janus_jax.sharding import flatten, unflatten
from tests.library.tiny_janus import OTHER, QUESTION, SETTINGS, SHORT, codes, folder, janus  # noqa: F401

GREEDY = {"cfg_weight": 3, "temperature": 0}


def changed(janus, path: str, change, dtype=None):  # noqa: F811
    """`janus` with one parameter changed, and in `dtype`."""
    flat = flatten(janus.params)
    flat[path] = change(flat[path])
    params, model = unflatten(flat), janus.model
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        model = model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    return dataclasses.replace(janus, params=params, model=model)


def nan_everywhere(x):
    return jnp.full_like(x, jnp.nan)


def nan_in_row(row: int):
    return lambda x: x.at[row].set(jnp.nan)


def refused(call) -> NotFinite:
    with pytest.raises(ValueError) as caught:
        call()
    assert isinstance(caught.value, NotFinite) and len(str(caught.value).splitlines()) == 1
    return caught.value


def test_damaged_parameters_are_named(janus):  # noqa: F811
    broken = changed(janus, "language_model/norm/scale", nan_everywhere)
    error = refused(lambda: broken.generate_images(SHORT, n=2, **GREEDY))
    assert error.rows == [0, 1]
    assert str(error) == (
        "image 0 and 1 more: the logits are not finite after the prompt (computed in float32): "
        "language_model/norm/scale has values that are not finite; the checkpoint is damaged, get or convert it again"
    )
    assert "language_model/norm/scale" in str(refused(lambda: broken.chat(QUESTION, **SETTINGS)))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_image_and_the_step_are_named(janus, batch_size):  # noqa: F811
    """The embedding of a code is damaged that one of the images draws."""
    drawn = janus.generate_codes([SHORT, OTHER], **GREEDY)
    step, code = next((i, c) for i, c in enumerate(drawn[1][:-1]) if c not in drawn[0] and c not in drawn[1][:i])
    broken = changed(janus, "gen_embed/embedding", nan_in_row(code))
    error = refused(lambda: broken.generate_codes([SHORT, OTHER], **GREEDY, batch_size=batch_size))
    assert error.rows == [1]
    assert str(error).startswith(
        f"image 1: the logits are not finite after code {step} (computed in float32): gen_embed/"
    )
    # The image that was fine is the same alone.
    np.testing.assert_array_equal(broken.generate_codes(SHORT, **GREEDY), drawn[:1])


@pytest.mark.slow
def test_overflow_of_float16_names_the_cure(janus):  # noqa: F811
    """Products of finite numbers that are beyond float16 only."""
    broken = changed(janus, "gen_aligner/layers_0/kernel", lambda x: x * 6e4 / jnp.abs(x).max(), "float16")
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(broken.params))
    error = refused(lambda: broken.generate_codes(SHORT, **GREEDY, progress=True))
    assert str(error) == (
        "image 0: the logits are not finite after code 0 (computed in float16): load with dtype=float32 or bfloat16"
    )


def test_guidance_that_overflows(janus):  # noqa: F811
    error = refused(lambda: janus.generate_codes(SHORT, cfg_weight=3.4e38))
    assert str(error).endswith("lower cfg_weight 3.4e+38")
    for wrong in (1e39, 10**400, float("nan"), -1, "5", None, True):
        with pytest.raises(ValueError, match=r"cfg_weight must be .*, got"):
            check_guidance(wrong)
        with pytest.raises(ValueError, match=r"cfg_weight must be .*, got"):
            janus.generate_codes(SHORT, cfg_weight=wrong)


@pytest.mark.parametrize("wrong", [1e39, 10**400, float("inf"), "1", None, True])
def test_temperatures_beyond_float32(wrong):
    with pytest.raises(ValueError, match=r"temperature must be .*, got"):
        make_sampler(wrong)


def test_top_p_below_float32_keeps_the_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0]])
    assert make_sampler(1.0, top_p=1e-320)(jax.random.split(jax.random.key(0), 1), logits).tolist() == [1]


def test_no_garbage_is_streamed(janus):  # noqa: F811
    """Every piece in front of the damaged token comes, and nothing behind."""
    seen, whole = [], list(janus.stream_chat(QUESTION, **SETTINGS))
    question = janus._asking(
        [QUESTION], [()], SETTINGS["max_new_tokens"], Options(temperature=0), SETTINGS["system_prompt"]
    )
    tokens = [int(piece[0, 0]) for piece in janus._stream(question, first(1, 1), piece=1)]
    asked = set(janus.processor.understanding_prompt([("user", QUESTION), ("assistant", "")], 0))
    step = next(i for i, t in enumerate(tokens[:-1]) if i and t not in tokens[:i] and t not in asked)
    broken = changed(janus, "language_model/embed_tokens/embedding", nan_in_row(tokens[step]))
    pieces = broken.stream_chat(QUESTION, **SETTINGS)
    with pytest.raises(NotFinite, match=rf"conversation 0: the logits are not finite after token {step} "):
        for piece in pieces:
            seen.append(piece)
    assert "".join(whole).startswith("".join(seen)) and len(seen) < len(whole)


def test_conversations_that_were_fine_are_not_named(janus):  # noqa: F811
    word = next(
        i for i in janus.processor.understanding_prompt([("user", OTHER), ("assistant", "")], 0)
        if i not in janus.processor.understanding_prompt([("user", QUESTION), ("assistant", "")], 0)
    )  # fmt: skip
    broken = changed(janus, "language_model/embed_tokens/embedding", nan_in_row(word))
    error = refused(lambda: broken.chat_batch([QUESTION, OTHER], max_new_tokens=2))
    assert error.rows == [1] and "after the prompt" in str(error)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_black_pictures(janus, codes, dtype):  # noqa: F811
    """The VQ decoder of a model in float16 computes in float32, and is said to."""
    broken = changed(janus, "gen_vision_model/decoder/conv_out/bias", nan_everywhere, dtype)
    error = refused(lambda: broken.decode_codes(codes, batch_size=2))
    assert error.rows == [0, 1] and str(error).startswith(
        "image 0 and 1 more: the VQ decoder's pixels are not finite (computed in float32): "
        "gen_vision_model/decoder/conv_out/bias has values that are not finite"
    )


def test_codes_of_nothing(janus):  # noqa: F811
    pixels = np.zeros((16, 16, 3), np.uint8)
    for path in ("gen_vision_model/quant_conv/bias", "gen_vision_model/quantize/embedding"):
        broken = changed(janus, path, nan_everywhere)
        error = refused(lambda broken=broken: broken.encode_images([pixels]))
        assert "the VQ encoder's values are not finite" in str(error) and path in str(error)


def test_command_lines_end_with_one_line(janus, tmp_path, capfd, monkeypatch):  # noqa: F811
    broken = changed(janus, "gen_vision_model/decoder/conv_out/bias", nan_everywhere)
    monkeypatch.setattr(__main__, "load", lambda *args, **kwargs: broken)
    assert __main__.main(["generate", "--model", "m", "--prompt", SHORT, "--out", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: image 0: the VQ decoder's") and out == ""
    assert not list(tmp_path.iterdir())
    broken = changed(janus, "language_model/norm/scale", nan_everywhere)
    assert __main__.main(["chat", "--model", "m", QUESTION, "--max-new-tokens", "4"]) == 2
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: conversation 0: the logits") and out == ""
