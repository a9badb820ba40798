"""Torch checkpoint files: what is read from which file, and what damaged or malicious ones get."""

import json
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from janus_jax.weights.formats.safetensors_files import TensorToWrite, write_safetensors
from janus_jax.weights.formats.torch_files import open_tensors
from janus_jax.weights.torch_names import carried_shapes
from janus_jax.weights.torch_weights import read_params
from tests.torch_oracle import load_file, save_file, torch
from tests.weights.golden import GOLDEN, assert_same_trees

# ---------------------------------------------------------------- files


def save_shards(folder, state, save, suffix: str, count: int = 3):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(state)
    weight_map = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}"
        save({name: state[name] for name in names[i::count]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::count], shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_bin(config, folder, state, golden):
    torch.save(state, folder / "pytorch_model.bin")
    params, carried = read_params(folder, config, as_numpy=True)
    assert_same_trees(params, golden)
    assert carried.keys() == carried_shapes(config).keys()


def test_bin_in_shards(config, folder, state, golden):
    save_shards(folder, state, torch.save, "bin")
    assert_same_trees(read_params(folder, config, as_numpy=True)[0], golden)


def test_safetensors_in_shards(config, folder, state, golden):
    save_shards(folder, state, save_file, "safetensors")
    assert_same_trees(read_params(folder, config, as_numpy=True)[0], golden)


def test_bin_of_a_module_with_views_and_parameters(folder):
    """What torch.save keeps as it is: parameters, views into shared storages, strides, every dtype."""
    module = torch.nn.Linear(3, 5)
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = module.state_dict(keep_vars=True)
    state |= {"transposed": base.permute(2, 0, 1), "view": base[1:, ::2, 3], "scalar": torch.tensor(2.5)}
    state |= {"empty": torch.zeros(0, 4)}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool):
        state[str(dtype)] = torch.tensor([1, 0, 3]).to(dtype)
    torch.save(state, folder / "pytorch_model.bin")
    tensors = open_tensors(folder)
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        found = torch.tensor(tensors[name].view().astype(np.float64))
        assert torch.equal(found, tensor.detach().to(torch.float64)), name


def test_safetensors_are_taken_before_bin(config, folder, state, golden):
    save_file(state, folder / "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    assert_same_trees(read_params(folder, config, as_numpy=True)[0], golden)


def test_which_parameters_were_taken_is_told(config, folder, state, golden, capsys):
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": other, "ema": state, "steps": 3}, folder / "pytorch_model.bin")
    assert_same_trees(read_params(folder, config, as_numpy=True)[0], golden)
    assert capsys.readouterr().err == f"{folder / 'pytorch_model.bin'}: it has ema and model; ema is read\n"


def test_no_weights(config, folder):
    with pytest.raises(FileNotFoundError, match="has no weights; expected one of"):
        read_params(folder, config)


def test_no_config(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_params(tmp_path, config)


# ---------------------------------------------------------------- damaged files


def test_one_name_in_two_shards(config, folder, state):
    save_shards(folder, state, save_file, "safetensors")
    first = folder / "model-00001-of-00003.safetensors"
    save_file(load_file(first) | {"gen_embed.weight": state["gen_embed.weight"]}, first)
    with pytest.raises(ValueError, match=r"two shards: gen_embed.weight \(model-00001-of-00003.*, model-0000"):
        read_params(folder, config)


def test_absent_shard(config, folder, state):
    save_shards(folder, state, save_file, "safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names shards that are missing: model-00002-of-00003"):
        read_params(folder, config)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(config, folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (is not an index of shards|is not valid JSON|holds a list)"):
        read_params(folder, config)


def test_an_index_cannot_lead_out_of_the_folder(config, folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="names a shard outside its own folder"):
        read_params(folder, config)


@pytest.mark.parametrize("kept", [0, 5, 1000, 4_000_000])
def test_truncated_safetensors(config, folder, kept):
    data = (GOLDEN / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"is damaged or not a safetensors file \(.*download it again"):
        read_params(folder, config)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2]},
        7,
    ],
)
def test_lying_safetensors_header(folder, entry):
    header = json.dumps({"x": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"is damaged or not a safetensors file"):
        open_tensors(folder)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_not_executed(folder, protocol):
    victim = folder / "victim"
    torch.save({"x": Malicious(victim)}, folder / "pytorch_model.bin", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"not a plain torch state dict \(it asks for .*nothing in it was run"):
        open_tensors(folder)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim)))
    assert victim.exists()  # so the pickle would have done it


@pytest.mark.parametrize(
    "content",
    [{"weights": {"x": torch.zeros(2)}}, {"x": torch.zeros(2), "step": 3}, [torch.zeros(2)], torch.nn.Linear(2, 2)],
    ids=["nested", "number", "list", "module"],
)
def test_a_bin_that_is_no_state_dict(folder, content):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a plain torch state dict"):
        open_tensors(folder)


def test_truncated_or_old_bin(folder, state):
    path = folder / "pytorch_model.bin"
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is truncated, or in the format from before torch"):
        open_tensors(folder)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="is truncated"):
        open_tensors(folder)


def test_a_bin_whose_tensors_end_after_their_storage(folder):
    torch.save({"x": torch.arange(5.0)}, folder / "whole.bin")
    with zipfile.ZipFile(folder / "whole.bin") as whole, zipfile.ZipFile(folder / "pytorch_model.bin", "w") as cut:
        for info in whole.infolist():
            data = whole.read(info)
            cut.writestr(info.filename, data[:8] if info.filename.endswith("data/0") else data)
    with pytest.raises(ValueError, match="the storage of x has 8 bytes, not its 5 elements"):
        open_tensors(folder)
    with (
        zipfile.ZipFile(folder / "whole.bin") as whole,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", 8) as packed,
    ):
        for info in whole.infolist():
            packed.writestr(info.filename, whole.read(info))
    with pytest.raises(ValueError, match=r"its record whole/data\.pkl is compressed"):
        open_tensors(folder)


def test_a_writer_that_breaks_its_word_is_caught(tmp_path):
    tensor = TensorToWrite("x", (2,), np.dtype(np.float16), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"x must be float16 \[2\], got float32 \[3\]"):
        write_safetensors(tmp_path / "x", [tensor])


# ---------------------------------------------------------------- special files


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "link to nowhere"])
def test_what_is_no_regular_file_is_named(folder, name, kind):
    path = folder / name
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere/at/all")
    told = rf"{name}.*" if kind == "link to nowhere" else f"{name} is a {kind}, not a regular file"
    with pytest.raises(FileNotFoundError if kind == "link to nowhere" else ValueError, match=told):
        open_tensors(folder)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "", "..", "a\0b"])
def test_shards_lie_in_the_folder(folder, name):
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a shard outside its own folder"):
        open_tensors(folder)


def test_many_absent_shards_are_told_in_short(folder):
    index = {"weight_map": {f"a{i}": f"s{i}\n.safetensors" for i in range(500)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError) as raised:
        open_tensors(folder)
    assert "and 496 more" in str(raised.value) and str(raised.value).isprintable() and len(str(raised.value)) < 600
