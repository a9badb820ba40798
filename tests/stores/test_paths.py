"""Paths, files and errors of stores."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from janus_jax.io import store_access
from janus_jax.io.files import open_regular, read_json_object
from janus_jax.io.stores import StorePath, as_path, copy_file, size_of
from janus_jax.io.whole.files import create_file
from janus_jax.weights.formats.safetensors_files import TensorToWrite, write_safetensors
from janus_jax.weights.formats.torch_files import open_tensors


def test_a_store_path_reads_like_a_path(store):
    folder, _ = store
    assert not folder.exists() and not folder.is_dir() and folder.walk() == []
    for name in ("a.json", "sub/b.tar", "sub/deep/c.txt"):
        assert (folder / name).write_bytes(name.encode() * 3) == 3 * len(name)
    assert folder.is_dir() and not folder.is_file() and (folder / "a.json").is_file()
    assert sorted(folder.iterdir()) == [folder / "a.json", folder / "sub"]
    assert [path.relative_to(folder).as_posix() for path in folder.walk()] == [
        "a.json",
        "sub/b.tar",
        "sub/deep/c.txt",
    ]
    assert (folder / "a.json").stat().st_size == 18 and (folder / "a.json").stat().st_mtime > 1e9
    assert [path.name for path in folder.glob("*/*.tar")] == ["b.tar"]
    path = folder / "sub" / "b.tar"
    assert (path.name, path.suffix, path.stem, path.parent) == ("b.tar", ".tar", "b", folder / "sub")
    assert (
        as_path(str(path)) == path and folder / str(path) == path and str(folder / "sub/../a.json").endswith("/a.json")
    )
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="no such object"):
        path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no such object"):
        list((folder / "none").iterdir())
    with pytest.raises(ValueError, match="is a folder, not a regular file"):
        open_regular(folder)
    folder.rmtree()
    assert not folder.exists()


def test_a_file_in_a_store_is_read_at_any_position(store, monkeypatch):
    folder, proxy = store
    path = folder / "x.bin"
    data = bytes(range(256)) * 100
    path.write_bytes(data)
    monkeypatch.setattr(store_access, "_PIECE", 1000)
    with open_regular(path) as file:
        assert size_of(file) == len(data)
        assert file.read(3) == data[:3] and file.seek(-5, 2) == len(data) - 5 and file.read() == data[-5:]
        file.seek(100)
        assert file.read(7000) == data[100:7100]
    before = proxy.about(folder)
    spans = [(5, 10), (0, 0), (2000, 9000)]
    assert store_access.read_spans(str(path), spans) == [data[begin:end] for begin, end in spans]
    assert proxy.about(folder) - before == 1 + 7
    with pytest.raises(ValueError, match="has become shorter"):
        store_access.read_spans(str(path), [(len(data) - 2, len(data) + 2)])


def test_tensors_in_a_file_of_a_store(store, tmp_path):
    folder, _ = store
    arrays = {f"t{i}": np.arange(i * 7, dtype=np.float32).reshape(-1, 7) for i in range(4)}
    written = [TensorToWrite(name, array.shape, array.dtype, array.view) for name, array in arrays.items()]
    write_safetensors(tmp_path / "model.safetensors", written)
    copy_file(tmp_path / "model.safetensors", folder / "model.safetensors")
    tensors = open_tensors(str(folder))
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.view(), arrays[name])
    (folder / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="its header describes"):
        open_tensors(str(folder))


def test_missing_buckets_and_unknown_stores_are_one_line(store):
    folder, _ = store
    scheme = str(folder).partition(":")[0]
    with pytest.raises(OSError, match=f"{scheme}://no-such-bucket") as error:
        StorePath(f"{scheme}://no-such-bucket/a").write_bytes(b"x")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_json_object(StorePath(f"{scheme}://no-such-bucket/a.json"))
    with pytest.raises(ValueError, match="az:// is not supported; use a local path, or one of gs://, s3://"):
        as_path("az://bucket/x")
    with pytest.raises(ValueError, match="names no bucket"):
        as_path(f"{scheme}://")


def test_a_busy_store_is_tried_again_and_reported(store, monkeypatch, capsys):
    folder, proxy = store
    path = folder / "x.bin"
    path.write_bytes(b"content")
    monkeypatch.setattr(store_access, "WAITS", (0.01,) * 8)
    monkeypatch.setattr(store_access, "_last", [-100.0])
    with proxy.failing(most=12) as faults:
        assert store_access.read_spans(str(path), [(0, 7)]) == [b"content"]
        path.write_bytes(b"other")
    assert sum(faults.values()) == 12
    assert "the store does not answer" in capsys.readouterr().err
    assert path.read_bytes() == b"other"
    monkeypatch.setattr(store_access, "WAITS", (0.01,))
    with proxy.failing(), pytest.raises(store_access.StoreUnavailable, match="the store does not answer"):
        store_access.read_spans(str(path), [(0, 5)])


_ASK = """
import sys
from janus_jax.io import store_access
store_access._STALLED = 1
from janus_jax.io.stores import StorePath
path = StorePath(sys.argv[1])
assert path.read_bytes() == b"content"
path.write_bytes(b"other")
"""


@pytest.mark.slow
def test_an_answer_that_never_comes_is_asked_for_again(store):
    """In a process of its own, since tensorstore looks at its settings once."""
    folder, proxy = store
    env = os.environ | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    (folder / "x").write_bytes(b"content")
    with proxy.failing(most=2, kinds=("stall",)) as faults:
        command = [sys.executable, "-c", _ASK, str(folder / "x")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert faults["stall"] == 2 and (folder / "x").read_bytes() == b"other"


def test_no_rights_are_one_line_at_once(store):
    folder, proxy = store
    path = folder / "x.bin"
    path.write_bytes(b"content")
    scheme = str(folder)[:2]
    for function in (path.read_bytes, path.exists, lambda: path.write_bytes(b""), lambda: list(folder.iterdir())):
        with proxy.failing(kinds=("403",)) as faults, pytest.raises(PermissionError, match="may not do this") as error:
            function()
        assert "\n" not in str(error.value) and f"{scheme}://" in str(error.value) and faults["403"] < 10


def test_without_credentials_the_cure_is_named(monkeypatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(store_access, "files", lambda scheme: s3fs_without_cache())
    with pytest.raises(PermissionError, match="no credentials for s3://bucket: set AWS_ACCESS_KEY_ID"):
        StorePath("s3://bucket/x").exists()


def s3fs_without_cache():
    import fsspec

    return fsspec.filesystem("s3", skip_instance_cache=True)


def test_what_is_written_to_local_folders_only_says_so(tmp_path, capsys):
    """Before anything is read, and without a folder called `gs:` here."""
    from train.main import main as train_main
    from train.vq import main as vq_main

    assert vq_main(["--images", "s3://bucket/in", "--out", str(tmp_path)]) == 2
    assert "s3://bucket/in is in a store, and this is read from local folders only" in capsys.readouterr().err
    assert train_main(["--config", "digits", "workdir=gs://bucket/run"]) == 2
    assert "gs://bucket/run is in a store, and this is written to local folders only" in capsys.readouterr().err
    assert train_main(["--config", "debug", "workdir=az://bucket/run"]) == 2
    assert "workdir: az://bucket/run: az:// is not supported; use a local path, or one of" in capsys.readouterr().err
    assert not pathlib.Path("gs:").exists()


def test_without_the_extra_the_package_is_named(monkeypatch):
    def missing(name, **_):
        raise ImportError(name)

    monkeypatch.setattr("fsspec.filesystem", missing)
    store_access.files.cache_clear()
    with pytest.raises(OSError, match=r"gs:// needs the package gcsfs; pip install 'janus_jax\[gcs\]'"):
        StorePath("gs://bucket/x").exists()


def test_a_file_is_created_by_one_of_several(store):
    path = store[0] / "settings.json"
    create_file(path, "first")
    create_file(path, "second")
    assert path.read_text() == "first"
