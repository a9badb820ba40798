"""Converted folders: what is written is what orbax and we read, on any devices, and what damaged ones get."""

import math
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from orbax import checkpoint as ocp0
from orbax.checkpoint import v1 as ocp

from janus_jax.config import read_config
from janus_jax.weights import checkpoint
from janus_jax.weights.checkpoint import kind_of, load_params
from janus_jax.weights.conversion import from_torch, to_torch
from janus_jax.weights.fuse import fuse
from janus_jax.weights.torch_weights import LazyArray, abstract_params
from tests.weights.golden import GOLDEN, assert_same_trees
from tests.weights.test_convert import write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    return write_source(tmp_path_factory.mktemp("source") / "janus")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted") / "janus"
    from_torch(source, folder)
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """Has tiny arrays written as large ones are: in pieces, and pieces in chunks."""
    monkeypatch.setattr(checkpoint, "_LARGE_BYTES", 80_000)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 50_000)
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 10_000)


def test_pieces_give_what_orbax_and_we_read_whole(source, config, golden, small_pieces, tmp_path):
    from_torch(source, tmp_path / "out", verify=True)
    assert_same_trees(ocp.load(tmp_path / "out" / "params"), golden)
    assert_same_trees(load_params(tmp_path / "out", as_numpy=True), golden)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(leaf):
        fits = leaf.shape and leaf.shape[-1] % 4 == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "fsdp" if fits else None))

    abstract = abstract_params(config)
    shardings = jax.tree.map(sharding, abstract)
    ours = load_params(tmp_path / "out", config, shardings=shardings)
    assert_same_trees(ours, golden)
    wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    theirs = ocp.load(tmp_path / "out" / "params", wanted)
    assert_same_trees(theirs, golden)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, ours, theirs))


def test_chunks_of_zeros_are_written(config, small_pieces, tmp_path):
    """Orbax takes a chunk that is not there for a lost one."""
    from tests.torch_oracle import load_file, save_file, torch

    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(GOLDEN / "model.safetensors").items()}
    (tmp_path / "src").mkdir()
    save_file(state, tmp_path / "src" / "model.safetensors")
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "src" / "config.json")
    from_torch(tmp_path / "src", tmp_path / "out")
    assert not any(leaf.any() for leaf in jax.tree.leaves(ocp.load(tmp_path / "out" / "params")))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    sizes=st.tuples(st.integers(2, 4000), st.integers(2, 4000)),
)
def test_pieces_cover_an_array_in_whole_chunks(shape, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_CHUNK_BYTES", min(sizes))
        patch.setattr(checkpoint, "_PIECE_BYTES", max(sizes))
        leaf = LazyArray(shape, np.dtype(np.float16), None)
        chunk, pieces = checkpoint.chunk_shape(leaf), list(checkpoint.pieces(leaf))
    assert 2 * math.prod(chunk) <= min(sizes)
    count = np.zeros(shape, np.int8)
    for piece in pieces:
        count[piece] += 1
        assert all(part.start % size == 0 for part, size in zip(piece, chunk, strict=True))
    assert (count == 1).all()


def test_save_and_load(golden, config, tmp_path):
    params = jax.tree.map(jax.numpy.asarray, golden)
    checkpoint.save(tmp_path / "trained", config, params)
    assert kind_of(tmp_path / "trained") == "converted"
    assert read_config(tmp_path / "trained") == config
    assert_same_trees(load_params(tmp_path / "trained"), params)
    to_torch(tmp_path / "trained", tmp_path / "torch", "original")
    assert_same_trees(load_params(tmp_path / "torch"), params)


def test_arrays_that_do_not_fit_config(golden, config, tmp_path):
    params = traverse_util.flatten_dict(golden)
    params.pop(("aligner", "layers_2", "bias"))
    params["aligner", "layers_4", "bias"] = np.zeros(3, np.float32)
    params["language_model", "norm", "scale"] = np.zeros(3, np.float32)
    params["gen_embed", "embedding"] = np.zeros((256, 8), np.int32)
    checkpoint.save(tmp_path / "odd", config, traverse_util.unflatten_dict(params))
    with pytest.raises(ValueError, match="the arrays do not match") as caught:
        load_params(tmp_path / "odd")
    assert sorted(str(caught.value).partition("config.json: ")[2].split("; ")) == [
        "misshapen: language_model.norm.scale is [3], expected [96]",
        "missing: aligner.layers_2.bias [96]",
        "unexpected: aligner.layers_4.bias",
        "unsupported: gen_embed.embedding is int32, expected bfloat16, float16, float32",
    ]


@pytest.mark.parametrize(("lost", "kept"), [("d/*", 0), ("manifest.ocdbt", 40)])
def test_damaged_params(converted, tmp_path, lost, kept):
    """Lost bytes are never read as zeros."""
    shutil.copytree(converted, tmp_path / "out")
    for path in (tmp_path / "out" / "params" / "state").glob(lost):
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"params is damaged \(.*\); convert the checkpoint again"):
        load_params(tmp_path / "out")


def test_lost_pieces(source, small_pieces, tmp_path):
    from_torch(source, tmp_path / "out")
    for path in (tmp_path / "out" / "params" / "state" / "d").iterdir():
        if path.stat().st_size > 40_000:
            path.unlink()
    with pytest.raises(ValueError, match="params is damaged"):
        load_params(tmp_path / "out")


def test_kind_of(source, converted, tiny, tmp_path):
    assert (kind_of(source), kind_of(converted), kind_of(tiny.folder)) == ("original", "converted", "transformers")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        kind_of(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    with pytest.raises(FileNotFoundError, match=r"no weights; expected params/ \(converted\), model.safetensors or"):
        kind_of(tmp_path)


# ---------------------------------------------------------------- checksums


def test_no_changed_byte_of_a_converted_folder_gives_other_parameters(converted, golden, tmp_path):
    """Every file of it, at places spread over it; what is left over from earlier commits means nothing."""
    rng = np.random.default_rng(0)
    files = [path for path in (converted / "params" / "state").rglob("*") if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    refused = 0
    for _ in range(15):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        data = bytearray(path.read_bytes())
        place = int(rng.integers(len(data)))
        data[place] ^= 1 << int(rng.integers(8))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(converted, tmp_path / "out")
        (tmp_path / "out" / path.relative_to(converted)).write_bytes(data)
        try:
            assert_same_trees(load_params(tmp_path / "out", as_numpy=True), golden)
        except ValueError as error:
            assert "params is damaged" in str(error) and str(error).isprintable()
            refused += 1
    assert refused > 10


def test_saved_parameters_carry_checksums_too(golden, config, tmp_path):
    checkpoint.save(tmp_path / "trained", config, jax.tree.map(jax.numpy.asarray, golden))
    assert_same_trees(ocp.load(tmp_path / "trained" / "params"), golden)
    found = golden["vision_model"]["patch_embed"]["kernel"].tobytes()
    state = tmp_path / "trained" / "params" / "state"
    holding = [path for path in state.rglob("*") if path.is_file() and found in path.read_bytes()]
    assert holding
    for path in holding:
        path.write_bytes(path.read_bytes().replace(found, bytes([found[0] ^ 1]) + found[1:]))
    with pytest.raises(ValueError, match="params is damaged"):
        load_params(tmp_path / "trained")


# ---------------------------------------------------------------- orbax's own savers


def _pytree(folder, params):
    ocp0.PyTreeCheckpointer().save(folder, params)


def _handler(**options):
    return lambda folder, params: ocp0.Checkpointer(ocp0.PyTreeCheckpointHandler(**options)).save(folder, params)


def _standard(folder, params):
    with ocp0.StandardCheckpointer() as saver:
        saver.save(folder, params)


def _asynchronous(folder, params):
    with ocp0.AsyncCheckpointer(ocp0.PyTreeCheckpointHandler()) as saver:
        saver.save(folder, params)


def _manager(name):
    def save(folder, params):
        with ocp0.CheckpointManager(folder.parent / "manager") as manager:
            item = ocp0.args.StandardSave(params)
            manager.save(7, args=item if name == "default" else ocp0.args.Composite(**{name: item}))
        (folder.parent / "manager" / "7").rename(folder)

    return save


SAVERS = {
    "PyTreeCheckpointer": _pytree,
    "zarr3": _handler(use_zarr3=True),
    "without OCDBT": _handler(use_ocdbt=False),
    "zarr3 without OCDBT": _handler(use_ocdbt=False, use_zarr3=True),
    "StandardCheckpointer": _standard,
    "AsyncCheckpointer": _asynchronous,
    "CheckpointManager": _manager("default"),
    "CheckpointManager's params": _manager("params"),
    "v1": ocp.save,
}


@pytest.mark.parametrize("name", SAVERS)
def test_what_orbaxs_savers_write_is_read(golden, tmp_path, name):
    (tmp_path / "out").mkdir()
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "out" / "config.json")
    SAVERS[name](tmp_path / "out" / "params", golden)
    assert kind_of(tmp_path / "out") == "converted"
    assert_same_trees(load_params(tmp_path / "out", as_numpy=True), golden)


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_apart_and_a_tree_under_params(golden, config, tmp_path, wrapped):
    """`janus.params`, as `load` gives them, saved as they are, or as flax's variables."""
    apart = load_params(GOLDEN, scan_layers=False, as_numpy=True)
    (tmp_path / "out").mkdir()
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "out" / "config.json")
    _standard(tmp_path / "out" / "params", {"params": apart} if wrapped else apart)
    assert_same_trees(load_params(tmp_path / "out", as_numpy=True), golden)
    assert_same_trees(load_params(tmp_path / "out", scan_layers=False, as_numpy=True), apart)
    del apart["language_model"]["layers_1"]
    shutil.rmtree(tmp_path / "out" / "params")
    _pytree(tmp_path / "out" / "params", apart)
    told = r"missing: language_model\.layers_1\.input_layernorm\.scale \[96\]; "
    with pytest.raises(ValueError, match=told):
        load_params(tmp_path / "out")


def test_parameters_for_sampling_are_told_from_others(golden, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "out" / "config.json")
    _standard(tmp_path / "out" / "params", fuse(jax.tree.map(jax.numpy.asarray, golden)))
    with pytest.raises(ValueError, match=r"fused or quantized for sampling, such as .*_proj.*; save the parameters"):
        load_params(tmp_path / "out")


def test_another_tree_is_told_in_one_line(config, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "out" / "config.json")
    _pytree(tmp_path / "out" / "params", {"step": np.zeros(()), "opt": {str(i): np.zeros(2) for i in range(100)}})
    with pytest.raises(ValueError) as caught:
        load_params(tmp_path / "out")
    message = str(caught.value)
    assert re.search(r"missing: [a-z_]+\.[\w.{}]+ \[[\d, ]+\]; ", message)
    assert message.isprintable() and len(message) < 2000 and message.endswith(" more")


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/d/x"])
def test_special_files_are_refused(converted, tmp_path, name):
    shutil.copytree(converted, tmp_path / "out")
    path = tmp_path / "out" / "params" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"is not a regular file|has a config.json but no"):
        load_params(tmp_path / "out")
