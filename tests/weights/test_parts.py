"""Parts of Janus in files of their own: round trips, the files of the parts' own homes, and what bad files get."""

import shutil

import numpy as np
import pytest
from flax import traverse_util

from examples.tiny.run import MODEL
from janus_jax.weights.parts import PREFIXES, open_part, write_part
from janus_jax.weights.torch_weights import abstract_params, place
from tests.torch_oracle import load_file, save_file, torch


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(abstract_params(MODEL))
    return traverse_util.unflatten_dict({p: rng.normal(size=a.shape).astype(np.float32) for p, a in flat.items()})


@pytest.fixture(params=PREFIXES)
def part(request) -> str:
    return request.param


def written(folder, params, part):
    """The part's file, as `write_part` leaves it."""
    path = folder / f"{part}.safetensors"
    write_part(path, MODEL, part, params[part])
    return path


def check(leaves, params, part):
    read = traverse_util.flatten_dict(place(leaves, as_numpy=True))
    expected = traverse_util.flatten_dict({part: params[part]})
    assert read.keys() == expected.keys()
    for path, array in expected.items():
        assert read[path].dtype == array.dtype
        np.testing.assert_array_equal(read[path], array, err_msg="/".join(path))


def refusal(path, part, error=ValueError) -> str:
    with pytest.raises(error) as raised:
        open_part(path, MODEL, part)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


def test_round_trip(tmp_path, params, part):
    path = written(tmp_path, params, part)
    assert not any(name.startswith(PREFIXES[part]) for name in load_file(path))
    check(open_part(path, MODEL, part), params, part)


def test_siglip_as_timm_writes_it(tmp_path, params):
    part, v = "vision_model", MODEL.vision
    path = written(tmp_path, params, part)
    state = load_file(path)
    names = {"patch_embed.proj.weight", "pos_embed", "blocks.1.attn.qkv.bias", "blocks.0.mlp.fc2.weight", "norm.bias"}
    assert names <= state.keys()
    assert state["patch_embed.proj.weight"].shape == (v.width, 3, v.patch_size, v.patch_size)
    assert state["pos_embed"].shape == (1, v.num_patches, v.width)
    fused = state["blocks.1.attn.qkv.weight"].numpy().reshape(3, v.heads, v.head_dim, v.width)
    for third, name in zip(fused, "qkv", strict=True):
        np.testing.assert_array_equal(third, params[part]["blocks"]["attn"][name]["kernel"][1])
    assert not any(name.startswith("attn_pool.") for name in state)
    state |= {"attn_pool.latent": torch.ones(1, 1, v.width), "attn_pool.mlp.fc1.weight": torch.ones(2, v.width)}
    save_file(state, path)
    check(open_part(path, MODEL, part), params, part)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
def test_vq_as_llamagen_writes_it(tmp_path, params, suffix):
    part = "gen_vision_model"
    state = load_file(written(tmp_path, params, part))
    assert {"encoder.conv_in.weight", "quantize.embedding.weight", "post_quant_conv.bias"} <= state.keys()
    path = tmp_path / f"vq_ds16.{suffix}"
    torch.save({"model": state | {"quantize.codebook_used": torch.zeros(8)}}, path)
    check(open_part(path, MODEL, part), params, part)
    torch.save(state, path)
    check(open_part(path, MODEL, part), params, part)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_llama_folder(tmp_path, params, file):
    part = "language_model"
    state = load_file(written(tmp_path, params, part))
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"} <= state.keys()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder = tmp_path / "llama"
    folder.mkdir()
    (save_file if file.endswith("safetensors") else torch.save)(state, folder / file)
    check(open_part(folder, MODEL, part), params, part)


def test_half_precision_is_kept_until_it_is_cast(tmp_path, params, part):
    path = written(tmp_path, params, part)
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    leaves = open_part(path, MODEL, part)
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"bfloat16"}
    read = traverse_util.flatten_dict(place(leaves, "float32", as_numpy=True))
    for name, array in traverse_util.flatten_dict({part: params[part]}).items():
        assert read[name].dtype == np.float32
        np.testing.assert_allclose(read[name], array, rtol=2**-8)


# ---------------------------------------------------------------- bad files


def test_missing_misshapen_and_unsupported_tensors_are_named(tmp_path, params, part):
    path = written(tmp_path, params, part)
    state = load_file(path)
    lost, bent, whole = sorted(state)[:3]
    shape, wrong = list(state[lost].shape), [3, *state[bent].shape]
    del state[lost]
    state |= {bent: torch.zeros(wrong), whole: state[whole].to(torch.int32)}
    save_file(state, path)
    message = refusal(path, part)
    assert f"does not contain the {part} of this model" in message
    assert f"missing: {lost} {shape}" in message
    assert f"misshapen: {bent} is {wrong}, expected {wrong[1:]}" in message
    assert f"unsupported: {whole} is int32" in message


def test_a_file_of_another_part_is_refused_in_a_short_line(tmp_path, params, part):
    other = next(name for name in PREFIXES if name != part)
    message = refusal(written(tmp_path, params, other), part)
    assert message.count("missing: ") >= 4 and "unexpected: " in message and len(message) < 2000


def test_a_part_of_other_sizes_is_refused(tmp_path, params, part):
    path = written(tmp_path, params, part)
    state = load_file(path)
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in state.items()}, path)
    assert refusal(path, part).count("misshapen: ") == 12


def test_absent_files_are_named(tmp_path, part):
    assert "does not exist" in refusal(tmp_path / "none.safetensors", part, FileNotFoundError)
    assert "model.safetensors" in refusal(tmp_path, part, FileNotFoundError)


def test_damaged_files_are_refused(tmp_path, params, part):
    path = written(tmp_path, params, part)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    assert "download it again" in refusal(cut, part)
    shutil.copyfile(path, tmp_path / "renamed.pt")
    assert "truncated" in refusal(tmp_path / "renamed.pt", part)
