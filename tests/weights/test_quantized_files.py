"""Converted folders of quantized kernels: they load as what `load` would have made, and say what they are."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import write_checkpoint
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights import orbax_layouts
from janus_jax.weights.checkpoint import load_params, open_checkpoint
from janus_jax.weights.conversion import from_torch, to_torch
from janus_jax.weights.quantize import FORMS
from janus_jax.weights.quantized_files import _packed, _unpacked
from janus_jax.weights.torch_weights import LazyArray

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A torch checkpoint."""
    parent = tmp_path_factory.mktemp("source")
    to_torch(write_checkpoint(parent / "converted"), parent / "torch", "original", note=lambda text: None)
    return parent / "torch"


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory):
    """The folder in each form, verified as it was written."""
    parent = tmp_path_factory.mktemp("stored")
    for form in FORMS:
        from_torch(source, parent / form, weights=form, verify=True)
    return {form: parent / form for form in FORMS}


def assert_same(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert x.dtype == theirs[path].dtype, path
        wide = np.int8 if x.dtype == jnp.int4 else x.dtype
        np.testing.assert_array_equal(np.asarray(x).astype(wide), np.asarray(theirs[path]).astype(wide), err_msg=path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_it_loads_as_what_load_makes(source, stored, form, scan_layers, monkeypatch):
    made = janus_jax.load(source, weights=form, scan_layers=scan_layers, progress=False)
    monkeypatch.setattr("janus_jax.loading.quantize_leaf", lambda *args: pytest.fail("there was work left"))
    for weights in (None, form):
        read = janus_jax.load(stored[form], weights=weights, scan_layers=scan_layers, progress=False)
        assert_same(read.params, made.params)
    half = janus_jax.load(stored[form], dtype="bfloat16", fused=False, progress=False).params["gen_head"]["vision_head"]
    assert half["kernel"].dtype == form and half["bias"].dtype == jnp.bfloat16
    assert half["kernel_scale"].dtype == (jnp.bfloat16 if form == "int4" else jnp.float32)


@pytest.mark.parametrize("form", FORMS)
def test_on_a_mesh(stored, form):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    alone = janus_jax.load(stored[form], progress=False).params
    assert_same(janus_jax.load(stored[form], mesh=mesh, progress=False).params, alone)


def test_kernels_take_a_byte_or_half_of_one(source, stored):
    plain = open_checkpoint(source).leaves
    for form, part in (("int8", 1), ("int4", 2)):
        config = json.loads((stored[form] / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "janus_jax"
        assert config["quantization_config"]["bits"] == 8 // part
        store = orbax_layouts.open_store(orbax_layouts.find(stored[form] / "params"))
        arrays = store.open_all([".".join(path) for path in plain])
        for path, leaf in plain.items():
            name = ".".join(path)
            found = arrays[name]
            kernel = f"{name}_scale" in store.drivers
            assert found.shape == ((*leaf.shape[:-1], leaf.shape[-1] // part) if kernel else leaf.shape)
            assert found.dtype.numpy_dtype == ({1: np.int8, 2: np.uint8}[part] if kernel else np.float32)
        assert sum(name.endswith("_scale") for name in store.drivers) == 10


def test_what_contradicts_the_folder_is_one_line(stored, tmp_path):
    with pytest.raises(ValueError, match=r"has int4 weights already; for weights='int8' give the checkpoint that"):
        janus_jax.load(stored["int4"], weights="int8")
    read_by_load = r"int8 weights, which only janus_jax.load reads; give the checkpoint that it was converted from$"
    for use in (load_params, lambda folder: to_torch(folder, tmp_path / "out", "original"), open_checkpoint):
        with pytest.raises(ValueError, match=read_by_load):
            use(stored["int8"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantization_config \(bitsandbytes\) is not one"),
        ({"quant_method": "janus_jax", "bits": 4, "group_size": 32}, r"quantization_config \(janus_jax\) is not one"),
        ("int4", r"quantization_config \(int4\) is not one"),
        ({"quant_method": "janus_jax", "bits": 8}, "the arrays do not match config.json"),
        (None, "kernels that were fused or quantized for sampling"),
    ],
)
def test_another_mark_is_one_line(stored, tmp_path, mark, told):
    for path in stored["int4"].iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    raw = json.loads((stored["int4"] / "config.json").read_text()) | {"quantization_config": mark}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=told) as caught:
        janus_jax.load(tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_a_quantized_torch_folder_is_refused(source, tmp_path):
    for path in source.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    raw = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"quantization_config \(gptq\) is not one .* give an unquantized checkpoint"):
        open_checkpoint(tmp_path)


def test_pieces_of_packed_kernels(rng):
    """Any region of a row of bytes, from odd columns on too."""
    values = rng.integers(-8, 8, (3, 5, 12)).astype(np.int8)
    int4 = values.astype(ml_dtypes.int4)
    bytes_ = _packed(LazyArray(int4.shape, int4.dtype, lambda index: int4[index]))
    assert bytes_.shape == (3, 5, 6) and bytes_.dtype == np.uint8
    back = _unpacked(bytes_)
    assert back.shape == int4.shape and back.dtype == int4.dtype
    for begin, end in ((0, 12), (1, 12), (3, 8), (4, 5), (0, 11)):
        index = (slice(1, 3), slice(0, 5), slice(begin, end))
        np.testing.assert_array_equal(back.read(index).astype(np.int8), values[index])


def test_the_command(source, tmp_path):
    def run(*args):
        command = [sys.executable, str(ROOT / "convert" / "from_torch.py"), "--src", str(source), *args]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    made = run("--out", str(tmp_path / "out"), "--weights", "int4", "--verify")
    assert made.returncode == 0 and "converted and verified" in made.stdout, made.stderr
    assert open_checkpoint(tmp_path / "out", quantized=True).weights == "int4"


def test_unknown_weights_are_one_line(source, tmp_path):
    with pytest.raises(ValueError, match=r"weights must be 'int8' or 'int4', got 'int2'$"):
        from_torch(source, tmp_path / "out", weights="int2")
    assert not (tmp_path / "out").exists()
