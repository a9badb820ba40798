"""load(): every layout, dtype and mesh, and the hub without a network."""

import pathlib
import re
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny.tokenizer import edit_json
from janus_jax import JanusPipeline, load, make_mesh
from janus_jax.sampling.footprint import gib, params_bytes
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sharding import flatten
from janus_jax.weights import conversion
from janus_jax.weights.adapters.peft_files import read_adapter
from janus_jax.weights.quantize import array_bytes
from tests.library.tiny_janus import SHORT, codes, folder, janus, raises_one_line  # noqa: F401
from tests.weights.adapters.random_adapters import written

# ruff: noqa: F811


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same checkpoint in every layout."""
    parent = tmp_path_factory.mktemp("layouts")
    conversion.from_torch(folder, parent / "converted")
    conversion.to_torch(folder, parent / "transformers", "transformers", note=lambda text: None)
    return {"original": folder, "converted": parent / "converted", "transformers": parent / "transformers"}


@pytest.mark.parametrize("kind", ["converted", "transformers"])
def test_layouts_are_one_model(folders, janus, codes, kind):
    other = load(str(folders[kind]))
    ours, theirs = flatten(janus.params), flatten(other.params)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype == np.float32
        np.testing.assert_array_equal(theirs[path], array, err_msg=path)
    np.testing.assert_array_equal(other.generate_codes(SHORT, n=2), codes[:2])


def test_defaults(folder, janus):
    assert isinstance(janus, JanusPipeline) and janus.mesh is None and janus.source == str(folder)
    assert janus.model.dtype == janus.model.param_dtype == np.float32  # on CPU, whatever the checkpoint's
    assert not janus.model.scan_layers and "layers_0" in janus.params["language_model"]
    assert janus.model.config == janus.config and janus.processor.roles == "pro"


def test_stacked_layers(folder, codes):
    stacked = load(folder, scan_layers=True)
    assert "layers" in stacked.params["language_model"]
    np.testing.assert_array_equal(stacked.generate_codes(SHORT, n=2), codes[:2])


def test_bfloat16(folder, janus):
    half = load(folder, dtype="bfloat16")
    assert {array.dtype for array in flatten(half.params).values()} == {jnp.dtype("bfloat16")}
    assert half.model.dtype == half.model.param_dtype == jnp.bfloat16
    drawn = half.generate_codes(SHORT, n=2, cfg_weight=3)
    assert drawn.shape == (2, 16) and drawn.min() >= 0 and drawn.max() < 256
    # The first code is drawn before small differences add up.
    np.testing.assert_array_equal(drawn[:, 0], janus.generate_codes(SHORT, n=2, cfg_weight=3)[:, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.dtype("float32")], ids=str)
def test_dtype_objects(folder, dtype):
    assert {array.dtype for array in flatten(load(folder, dtype).params).values()} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["float8", "int32", np.int8])
def test_unknown_dtype(folder, dtype):
    with raises_one_line("dtype .* not supported; known: bfloat16, float16, float32"):
        load(folder, dtype)


def test_roles(folder, tmp_path):
    assert load(folder, roles="old").processor.roles == "old"
    with raises_one_line("unknown roles 'robot'; known: pro, old"):
        load(folder, roles="robot")
    assert load(folder, roles="old").processor.roles_from == "chosen by the caller"
    # What a folder is called is the user's affair, and says nothing of what lies in it.
    named = tmp_path / "not-janus-1.3b" / "Janus-1.3B"
    shutil.copytree(folder, named)
    loaded = load(named).processor
    assert (loaded.roles, loaded.roles_from) == ("pro", "<|User|> is a token")


def test_progress(folder, capfd):
    load(folder, progress=True)
    shown = capfd.readouterr()
    assert "loading: 100%" in shown.err and shown.out == ""
    load(folder, progress=False)
    load(folder)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- meshes


def test_mesh(folder):
    spread = load(folder, mesh={"tensor": 4, "fsdp": -1})
    assert dict(spread.mesh.shape) == {"slices": 1, "data": 1, "fsdp": 2, "tensor": 4}
    kernel = spread.params["language_model"]["layers_0"]["mlp"]["gate_proj"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 8}
    assert load(folder, mesh=make_mesh({"data": 2}, jax.devices()[:2])).mesh.size == 2


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensor": 8}, r"does not divide the model: vision_model/blocks/attn/q/.*heads 4 over tensor=8"),
        ({"fsdp": 3}, "a mesh of slices=1 x data=1 x fsdp=3 x tensor=1 does not match the 8 devices"),
        ({"fsdp": 0}, "fsdp=0"),
        ({"rows": 8}, "mesh axis 'rows' is unknown; known: slices, data, fsdp, tensor"),
        (jax.sharding.Mesh(np.array(jax.devices()), ("rows",)), "the mesh must have the axes .*rows"),
    ],
    ids=["heads", "devices", "zero", "axis", "foreign"],
)
def test_bad_meshes(folder, mesh, message):
    with raises_one_line(message):
        load(folder, mesh=mesh)


# ---------------------------------------------------------------- folders that are none


@pytest.mark.parametrize("name", ["absent", "./absent/model", "../absent", "/absent/model", "a/b/c", "config.json", ""])
def test_no_folder(folder, name, monkeypatch):
    """No network is asked for what can only be a path."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    if name:
        with raises_one_line("neither a folder nor a hub id of the form owner/name", FileNotFoundError):
            load(name)
    else:
        assert load(name).processor is not None  # the working directory


def test_incomplete_folders(folder, tmp_path):
    with raises_one_line(r"config\.json does not exist", FileNotFoundError):
        load(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with raises_one_line("config.json but no weights", FileNotFoundError):
        load(tmp_path)


def test_damaged_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    with raises_one_line(r"tokenizer\.json is not a readable tokenizer"):
        load(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{")
    with raises_one_line(r"config\.json is not valid JSON"):
        load(tmp_path / "copy")


def test_processor_of_another_checkpoint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "processor_config.json", num_image_tokens=576)
    with raises_one_line("num_image_tokens must be the model's 16"):
        load(tmp_path / "copy")


# ---------------------------------------------------------------- the hub


def test_what_cannot_fit_is_refused_before_reading(folder, janus, monkeypatch):
    """Sizes, and the first option that would fit."""
    monkeypatch.setattr("janus_jax.loading.place", lambda *args, **kwargs: pytest.fail("weights were read"))
    sizes = {
        (dtype, weights): params_bytes(janus.config, dtype, weights)
        for dtype in ("float32", jnp.bfloat16) for weights in (None, "int8", "int4")
    }  # fmt: skip
    full, half = sizes["float32", None], sizes[jnp.bfloat16, None]
    assert full == sum(x.nbytes for x in jax.tree.leaves(janus.params)) == 2 * half
    assert half < sizes["float32", "int8"] < full and sizes[jnp.bfloat16, "int8"] < half
    for free, cure in (
        (full - 1, "load with dtype='bfloat16'"),
        (half, "load with dtype='bfloat16'"),
        (sizes[jnp.bfloat16, "int8"], "load with dtype='bfloat16', weights='int8'"),
        (sizes[jnp.bfloat16, "int8"] - 1, "load with dtype='bfloat16', weights='int4'"),
        (1000, "so free memory"),
    ):
        monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device, free=free: free)
        message = f"the parameters take {gib(full)} in float32, but the cpu has .* free; .*{cure}"
        with raises_one_line(message, OutOfMemory):
            load(folder)
        with raises_one_line("each cpu device has", OutOfMemory):
            load(folder, mesh={"data": 8})


def test_an_adapter_takes_memory_too(folder, janus, tmp_path, monkeypatch):
    adapter = written(tmp_path / "adapter", janus.config)
    need = params_bytes(janus.config, "float32") + 4 * read_adapter(adapter, janus.config).num_parameters
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: need - 1)
    told = (
        f"the parameters and the adapter take {gib(need)} in float32, but the cpu has {gib(need - 1)} free; load with"
    )
    with raises_one_line(re.escape(told), OutOfMemory):
        load(folder, adapter=adapter)
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: need)
    assert len(flatten(load(folder, adapter=adapter).params)) > len(flatten(janus.params))


def test_what_fits_is_loaded(folder, janus, monkeypatch):
    """To the byte; where nobody tells, always; int8 needs no room for what it is made of."""
    for free in (params_bytes(janus.config, "float32"), None):
        monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device, free=free: free)
        assert load(folder).config == janus.config
    for weights in ("int8", "int4"):
        small = params_bytes(janus.config, "float32", weights)
        monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device, small=small: small)
        loaded = load(folder, weights=weights)
        assert sum(array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(loaded.params)) == small
