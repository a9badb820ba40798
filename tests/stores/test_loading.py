"""Checkpoints, tokenizers and sources of parameters in a store are those that lie on a disk."""

from __future__ import annotations

import numpy as np
import pytest

from examples.tiny.run import tiny_config, write_checkpoint
from janus_jax import load
from janus_jax.sharding import flatten
from janus_jax.weights import conversion
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.torch_weights import read_now
from tests.library import tiny_janus
from tests.stores.conftest import upload
from train.step.init import open_sources


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    parent = tmp_path_factory.mktemp("layouts")
    folder = tiny_janus.write_checkpoint(parent / "original")
    conversion.from_torch(folder, parent / "converted")
    conversion.from_torch(folder, parent / "int8", weights="int8")
    conversion.to_torch(folder, parent / "shards", "transformers", max_shard_size="100KB", note=lambda text: None)
    return parent


def same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[path]), err_msg=path)


@pytest.mark.parametrize(
    "store, kind",
    [
        ("gs", "converted"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [("s3", "shards"), ("s3", "converted"), ("gs", "shards"), ("gs", "int8"), ("s3", "int8")]
        ),
    ],
    indirect=["store"],
)
def test_a_checkpoint_loads_from_a_store(layouts, store, kind):
    folder = upload(layouts / kind, store[0] / kind)
    local, there = load(layouts / kind), load(str(folder))
    same_arrays(flatten(there.params), flatten(local.params))
    assert there.source == str(folder) and there.processor.roles == local.processor.roles
    assert there.processor.tokenizer.encode("A red circle") == local.processor.tokenizer.encode("A red circle")


@pytest.mark.slow
def test_a_checkpoint_in_a_store_is_converted(layouts, store, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(t.view().astype(np.float32)) for name, t in _tensors(layouts / "original").items()}
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((layouts / "original" / "config.json").read_bytes())
    conversion.from_torch(str(upload(tmp_path / "bin", store[0] / "bin")), tmp_path / "a", verify=True)
    conversion.to_torch(str(upload(layouts / "converted", store[0] / "c")), tmp_path / "b", "original")
    for made in ("a", "b"):
        leaves = open_checkpoint(tmp_path / made).leaves
        same_arrays(_read(leaves), _read(open_checkpoint(layouts / "original").leaves))
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (layouts / "original" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("store", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_a_run_starts_from_a_store(store, tmp_path):
    local = write_checkpoint(tmp_path / "start")
    config = tiny_config(dict.fromkeys(("understanding", "text", "generation", "tokenizer"), "x"), tmp_path / "run")
    config = config.__class__(**{**vars(config), "init_from": str(upload(local, store[0] / "start"))})
    parts = open_sources(config)
    local = open_checkpoint(local).leaves
    assert {path for part in parts.values() for path in part} == local.keys()
    for path in list(local)[:: len(local) // 5]:
        np.testing.assert_array_equal(read_now(parts[path[0]][path]), read_now(local[path]))


def test_what_is_missing_in_a_store_is_one_line(store):
    folder, _ = store
    with pytest.raises(FileNotFoundError, match=r"no such file or folder$"):
        load(str(folder))
    with pytest.raises(FileNotFoundError, match=r"there is no bucket no-such-bucket$"):
        load(f"{str(folder)[:5]}no-such-bucket/janus")
    (folder / "config.json").write_text('{"model_type": "janus"}')
    with pytest.raises(FileNotFoundError, match="no weights"):
        load(str(folder))


def _tensors(folder):
    from janus_jax.weights.formats.torch_files import open_tensors

    return open_tensors(folder)


def _read(leaves):
    return {"/".join(path): read_now(leaf) for path, leaf in leaves.items()}
