"""Both conversions and their command lines, and what they refuse."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from janus_jax.config import read_config
from janus_jax.io.whole.ownership import MARK
from janus_jax.weights import checkpoint, conversion
from janus_jax.weights.checkpoint import load_params
from janus_jax.weights.conversion import from_torch, parse_size, to_torch
from janus_jax.weights.torch_names import carried_shapes
from janus_jax.weights.torch_weights import LazyArray
from tests.torch_oracle import load_file, torch
from tests.weights.golden import GOLDEN, assert_same_trees
from tests.weights.test_torch_weights import assert_same_states

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIDE_FILES = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"}


def write_source(folder: pathlib.Path) -> pathlib.Path:
    """The golden checkpoint with the files that usually lie beside it."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("*.npz", "templates.json"))
    tokenizer = {"added_tokens": [{"id": 511, "content": "<image_placeholder>"}], "model": {"vocab": {}}}
    for name in SIDE_FILES:
        (folder / name).write_text(json.dumps(tokenizer) if name == "tokenizer.json" else "{}")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    return write_source(tmp_path_factory.mktemp("source") / "janus")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted") / "janus"
    from_torch(source, folder, verify=True)
    return folder


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- from torch


def test_converted_folder_holds_everything(source, converted, config, golden):
    assert names(converted) == {"config.json", "params", "carried.safetensors", MARK} | SIDE_FILES
    assert (converted / "config.json").read_bytes() == (source / "config.json").read_bytes()
    state = load_file(source / "model.safetensors")
    unused = {name: state[name] for name in carried_shapes(config)}
    assert_same_states(load_file(converted / "carried.safetensors"), unused)
    assert_same_trees(load_params(converted, as_numpy=True), golden)
    assert_same_trees(load_params(converted, config, scan_layers=False), load_params(source, scan_layers=False))
    assert_same_trees(load_params(converted, dtype="float32"), load_params(source, dtype="float32"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_from_torch_casts(source, golden, dtype, tmp_path):
    from_torch(source, tmp_path / "out", dtype=dtype, verify=True)
    assert_same_trees(load_params(tmp_path / "out", as_numpy=True), jax.tree.map(lambda a: a.astype(dtype), golden))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == raw["language_config"]["torch_dtype"] == dtype
    assert read_config(tmp_path / "out").dtype == dtype
    to_torch(tmp_path / "out", tmp_path / "torch", "original")
    state = load_file(source / "model.safetensors")
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    assert_same_states(load_file(tmp_path / "torch" / "model.safetensors"), expected)


# ---------------------------------------------------------------- to torch


def test_original_comes_back_bit_for_bit(source, converted, tmp_path):
    to_torch(converted, tmp_path / "out", "original")
    assert_same_states(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors"))
    assert names(tmp_path / "out") == {"config.json", "model.safetensors", MARK} | SIDE_FILES
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_transformers_comes_back_bit_for_bit(case, tmp_path):
    from_torch(case.folder, tmp_path / "ours", verify=True)
    to_torch(tmp_path / "ours", tmp_path / "out", "transformers")
    assert_same_states(load_file(tmp_path / "out" / "model.safetensors"), case.torch_model.state_dict())


def test_transformers_loads_what_was_written(case, tmp_path):
    from transformers import JanusForConditionalGeneration

    if case.config.vision.norm_eps == 1e-6:
        to_torch(case.folder, tmp_path / "original", "original", note=lambda text: None)
        assert read_config(tmp_path / "original") == dataclasses.replace(case.config, dtype="float32")
        to_torch(tmp_path / "original", tmp_path / "out", "transformers", 10**6, note=lambda text: None)
        assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:  # the original dialect has no word for it
        with pytest.raises(ValueError, match="the original dialect cannot express"):
            to_torch(case.folder, tmp_path / "original", "original", note=lambda text: None)
        assert not (tmp_path / "original").exists()
        to_torch(case.folder, tmp_path / "out", "transformers")
    model, info = JanusForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_states(model.state_dict(), case.torch_model.state_dict())


def test_golden_to_transformers(source, converted, config, tmp_path):
    from transformers import JanusForConditionalGeneration

    notes = []
    to_torch(converted, tmp_path / "out", "transformers", note=notes.append)
    assert len(notes) == 1 and "not written, since there is no usable tokenizer" in notes[0]  # it holds one token
    assert names(tmp_path / "out") == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        MARK,
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_id"] == 511
    assert read_config(tmp_path / "out") == config
    _, info = JanusForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


def test_image_token_id(source, tmp_path):
    folder = tmp_path / "src"
    shutil.copytree(source, folder)
    vocabulary = {"model": {"vocab": {"<image_placeholder>": 7}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    to_torch(folder, tmp_path / "named", "transformers", note=lambda text: None)
    assert json.loads((tmp_path / "named" / "config.json").read_text())["image_token_id"] == 7
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(ValueError, match=r"tokenizer.json has no token <image_placeholder>"):
        to_torch(folder, tmp_path / "other", "transformers")
    (folder / "tokenizer.json").unlink()
    notes = []
    to_torch(folder, tmp_path / "none", "transformers", note=notes.append)
    assert "has no tokenizer.json: image_token_id is set to 100581" in notes[0]
    assert json.loads((tmp_path / "none" / "config.json").read_text())["image_token_id"] == 100581


def test_a_tied_head_is_written_apart(tiny, tmp_path):
    """Our trees have a head of their own, so config.json must not have the reader tie it to the embedding again."""
    from transformers import JanusForConditionalGeneration

    folder = tmp_path / "tied"
    shutil.copytree(tiny.folder, folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["tie_word_embeddings"]  # which means that they are
    (folder / "config.json").write_text(json.dumps(raw))
    to_torch(folder, tmp_path / "out", "transformers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same_states(model.state_dict(), tiny.torch_model.state_dict())


def test_shards_are_no_larger_than_asked(source, config, golden, tmp_path):
    to_torch(source, tmp_path / "out", "original", max_shard_size="300KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    state = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert index["weight_map"].keys() == state.keys()
    for shard in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / shard)
        assert sum(t.nbytes for t in tensors.values()) <= 300_000
    assert_same_trees(load_params(tmp_path / "out", as_numpy=True), golden)


def test_parse_size():
    for text, size in {"5GB": 5 * 10**9, "1.5 MB": 1_500_000, "4GiB": 4 << 30, "2k": 2000, "77": 77, 88: 88}.items():
        assert parse_size(text) == size
    for text in ("", "GB", "-1GB", "0", "5 apples", "0.1B"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


# ---------------------------------------------------------------- what is refused, and what is left behind


def test_a_failed_conversion_leaves_nothing(source, converted, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    existing = tmp_path / "existing"
    shutil.copytree(converted, existing)
    monkeypatch.setattr(conversion, "copy_files", interrupted)
    for out, overwrite in ((tmp_path / "new", False), (existing, True)):
        with pytest.raises(KeyboardInterrupt):
            from_torch(source, out, overwrite=overwrite)
        with pytest.raises(KeyboardInterrupt):
            to_torch(source, out, "original", overwrite=overwrite)
    assert names(tmp_path) == {"existing"}
    assert names(existing) == names(converted)


def test_damaged_weights_leave_nothing(source, tmp_path):
    shutil.copytree(source, tmp_path / "src")
    data = (source / "model.safetensors").read_bytes()
    (tmp_path / "src" / "model.safetensors").write_bytes(data[:-1])
    for convert in (from_torch, lambda src, out: to_torch(src, out, "original")):
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            convert(tmp_path / "src", tmp_path / "out")
    assert names(tmp_path) == {"src"}


def test_verify_sees_one_wrong_bit(source, tmp_path, monkeypatch):
    write_lazy = checkpoint.write_lazy

    def corrupted(folder, leaves, progress):
        path = ("gen_vision_model", "quant_conv", "bias")
        read = leaves[path].read
        leaf = LazyArray(leaves[path].shape, leaves[path].dtype, lambda index: np.nextafter(read(index), np.inf))
        write_lazy(folder, {**leaves, path: leaf}, progress)

    monkeypatch.setattr(conversion, "write_lazy", corrupted)
    with pytest.raises(ValueError, match="gen_vision_model/quant_conv/bias on disk differs from the source"):
        from_torch(source, tmp_path / "out", dtype="float32", verify=True)
    assert names(tmp_path) == set()


def test_existing_folders_are_kept_unless_told_otherwise(source, converted, golden, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    from_torch(source, out)  # an empty folder is free
    (out / "mark").touch()
    with pytest.raises(ValueError, match="out already exists; choose another folder or"):
        from_torch(source, out)
    with pytest.raises(ValueError, match="out already exists"):
        to_torch(source, out, "original")
    assert (out / "mark").exists()
    from_torch(source, out, overwrite=True)
    assert not (out / "mark").exists()
    assert names(tmp_path) == {"out"}
    assert_same_trees(load_params(out, as_numpy=True), golden)


def test_what_is_never_overwritten(source, converted, tmp_path):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="diary is not a checkpoint folder, so it is not overwritten"):
        from_torch(source, tmp_path / "diary", overwrite=True)
    shutil.copytree(source, tmp_path / "outer" / "inner")
    shutil.copyfile(source / "config.json", tmp_path / "outer" / "config.json")
    for out in ("outer/inner", "outer"):
        with pytest.raises(ValueError, match="contains the source"):
            from_torch(tmp_path / "outer" / "inner", tmp_path / out, overwrite=True)
    assert (tmp_path / "outer" / "inner" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="is already converted"):
        from_torch(converted, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown dialect 'jax'"):
        to_torch(converted, tmp_path / "out", "jax")


# ---------------------------------------------------------------- command lines


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "convert" / script, *map(str, arguments)]
    path = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, env=path, check=False)


def test_command_lines(source, converted, golden, tmp_path):
    done = run("from_torch.py", "--src", source, "--out", tmp_path / "ours", "--verify", "--dtype", "float32")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'ours'}: converted and verified\n")
    assert "writing: 100%" in done.stderr and "verifying: 100%" in done.stderr
    assert_same_trees(load_params(tmp_path / "ours", dtype="bfloat16", as_numpy=True), golden)
    done = run("to_torch.py", "--src", converted, "--out", tmp_path / "hf", "--dialect", "transformers")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'hf'}: written in the transformers dialect\n")
    assert "\nnote: special_tokens_map.json, preprocessor_config.json, " in done.stderr.replace("\r", "\n")
    assert_same_trees(load_params(tmp_path / "hf", as_numpy=True), golden)


@pytest.mark.parametrize("script", ["from_torch.py", "to_torch.py"])
def test_command_lines_say_errors_in_a_line(script, source, tmp_path):
    dialect = ("--dialect", "original") if script == "to_torch.py" else ()
    done = run(script, "--src", tmp_path / "nowhere", "--out", tmp_path / "out", *dialect)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'} is neither a folder nor a hub id of the form owner/name\n"
    assert names(tmp_path) == set()
