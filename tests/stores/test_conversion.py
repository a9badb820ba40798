"""Conversions into a store: whole with their last object, and nothing of somebody else is erased."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flax import traverse_util

from janus_jax.io.stores import StorePath
from janus_jax.io.whole.folders import staged
from janus_jax.weights import checkpoint, conversion, store_arrays
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.conversion import from_torch, to_torch
from janus_jax.weights.torch_weights import LazyArray, read_now
from tests.weights.golden import GOLDEN


def values(folder) -> dict[str, np.ndarray]:
    return {"/".join(path): read_now(leaf) for path, leaf in open_checkpoint(folder, quantized=True).leaves.items()}


def same(folder, other):
    ours, theirs = values(folder), values(other)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def names(folder: StorePath) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int4"])
def test_a_conversion_and_back_in_a_store(store, tmp_path, monkeypatch, weights):
    folder, _ = store
    # Several chunks and pieces of an array.
    monkeypatch.setattr(store_arrays, "_CHUNK_BYTES", 32 << 10)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 64 << 10)
    from_torch(GOLDEN, folder / "made", verify=True, weights=weights)
    from_torch(GOLDEN, tmp_path / "made", weights=weights)
    same(folder / "made", tmp_path / "made")
    assert names(folder / "made") == {path.name for path in (tmp_path / "made").iterdir()}
    for path in [path for path in (tmp_path / "made").iterdir() if path.is_file()]:
        assert (folder / "made" / path.name).read_bytes() == path.read_bytes()
    if weights:
        return
    for dialect in ("original", "transformers"):
        to_torch(folder / "made", folder / dialect, dialect, max_shard_size="200KB", note=lambda text: None)
        to_torch(tmp_path / "made", tmp_path / dialect, dialect, max_shard_size="200KB", note=lambda text: None)
        there = {path.name: path for path in (folder / dialect).iterdir()}
        assert len([name for name in there if name.endswith(".safetensors")]) > 1
        assert {name: path.read_bytes() for name, path in there.items()} == {
            path.name: path.read_bytes() for path in (tmp_path / dialect).iterdir()
        }


@pytest.mark.slow
def test_a_killed_conversion_is_never_taken_for_a_whole_one(store, tmp_path, monkeypatch):
    out = store[0] / "made"

    def killed(folder, *_):
        (folder / "0").write_text("some of it")
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        # As if killed: nothing is removed.
        patch.setattr(conversion, "write_lazy", killed)
        patch.setattr(StorePath, "rmtree", lambda self, kept=(): None)
        with pytest.raises(SystemExit):
            from_torch(GOLDEN, out)
    assert "config.json" not in names(out) and "params" in names(out)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_checkpoint(out)
    with pytest.raises(
        ValueError, match=r"is unfinished, by a process that was killed or still writes; .*--overwrite$"
    ):
        from_torch(GOLDEN, out)
    (out / "params" / "left").write_text("by a killed process")
    from_torch(GOLDEN, out, overwrite=True)
    same(out, GOLDEN)
    assert not (out / "params" / "left").exists()
    # Whole, and its last object is there: only now --overwrite is needed for another reason.
    with pytest.raises(ValueError, match="already exists; choose another folder or overwrite it with --overwrite"):
        from_torch(GOLDEN, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not overwritten: it also has notes.txt, not made by janus_jax"):
        from_torch(GOLDEN, out, overwrite=True)
    assert "config.json" in names(out)


def test_large_arrays_are_written_piece_by_piece(store, monkeypatch):
    monkeypatch.setattr(store_arrays, "_CHUNK_BYTES", 2 << 10)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 5 << 10)
    rng = np.random.default_rng(0)
    arrays = {
        ("a", "kernel"): rng.normal(size=(5, 24, 20)).astype(np.float32),
        ("a", "scale"): np.zeros(3, np.float32),
        ("b", "embedding"): rng.normal(size=(96, 60)).astype(np.float16),
    }
    read: list[int] = []

    def lazy(array: np.ndarray) -> LazyArray:
        return LazyArray(array.shape, array.dtype, lambda index: (read.append(array[index].nbytes), array[index])[1])

    checkpoint.write_lazy(store[0] / "params", {path: lazy(array) for path, array in arrays.items()})
    assert sum(read) == sum(array.nbytes for array in arrays.values()) and max(read) <= 5 << 10 and len(read) > 4
    found = checkpoint.array_leaves(store[0] / "params", traverse_util.unflatten_dict(arrays))
    for path, array in arrays.items():
        np.testing.assert_array_equal(read_now(found[path]), array)
        assert found[path].dtype == array.dtype
    # Objects of bounded size, each of which one piece alone has written.
    sizes = [path.stat().st_size for path in (store[0] / "params").walk() if "/c/" in str(path)]
    assert max(sizes) <= (2 << 10) + 4 and len(sizes) > 8


def test_what_fails_is_removed_and_what_another_process_began_is_left(store):
    out = store[0] / "out"
    with pytest.raises(KeyError), staged(out) as folder:
        (folder / "params/0").write_text("some")
        raise KeyError
    assert names(out) == set()
    told = "was begun by another process meanwhile, and is left to it"
    with pytest.raises(ValueError, match=told), staged(out), staged(out, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
    assert names(out) == {"config.json", "janus_jax.json"}
    assert json.loads((out / "janus_jax.json").read_text())["holds"] == ["config.json"]


def test_a_store_that_may_not_be_written_is_one_line_before_any_work(store, monkeypatch):
    folder, proxy = store
    monkeypatch.setattr(conversion, "write_lazy", lambda *_: pytest.fail("it began to work"))
    refused = pytest.raises(PermissionError, match="may not do this")
    with proxy.failing(kinds=("403",), methods=("POST", "PUT")), refused:
        from_torch(GOLDEN, folder / "out")
    with pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket"):
        from_torch(GOLDEN, f"{str(folder)[:5]}no-such-bucket/out")
    with pytest.raises(ValueError, match="contains the source"):
        to_torch(GOLDEN, GOLDEN.parent, "original")
