"""Prepared folders, read: shared, damaged, misspelt."""

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.data.test_prepare import run
from train.data.prepared import open_prepared


@pytest.fixture
def folder(captions, processor, tmp_path):
    run(captions, tmp_path / "out", processor, "understanding")
    return tmp_path / "out"


def test_prepared_folders_may_be_pickled_and_shared(folder):
    data = open_prepared(folder)
    again = pickle.loads(pickle.dumps(data))
    assert again[17].to_bytes() == data[17].to_bytes() and again.fingerprint == data.fingerprint
    assert (data.images == 1).all()
    barrier = threading.Barrier(8)

    def read(_):
        barrier.wait()
        return [data[i].to_bytes() for i in range(18)]

    with ThreadPoolExecutor(8) as pool:
        assert all(found == [again[i].to_bytes() for i in range(18)] for found in pool.map(read, range(8)))
    for index in (18, -1):
        with pytest.raises(IndexError):
            data[index]


def test_the_fingerprint_tells_contents_apart(captions, processor, folder, tmp_path):
    text = captions.read_text()
    captions.write_text(text.replace("Cat 7", "Cat 8"))
    run(captions, tmp_path / "other", processor, "understanding")
    assert open_prepared(tmp_path / "other").fingerprint != open_prepared(folder).fingerprint


def spoil(path, edit):
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda d: (d / "prepared.json").unlink(), FileNotFoundError, "out is not a prepared folder .*train.prepare"),
        (lambda d: (d / "lengths.npy").unlink(), FileNotFoundError, "lengths.npy is missing"),
        (lambda d: spoil(d / "images.npy", lambda b: b[:40]), ValueError, "images.npy is damaged"),
        (lambda d: np.save(d / "lengths.npy", np.ones(7, np.int32)), ValueError, "for 7 samples, prepared.json for 18"),
        (lambda d: (d / "data-00001.bag").unlink(), FileNotFoundError, "data-00001.bag is missing"),
        (lambda d: spoil(d / "data-00001.bag", lambda b: b[:-9]), ValueError, "65536 bytes, got 65527"),
        (lambda d: spoil(d / "data-00001.bag", lambda b: bytes(len(b))), ValueError, "has a damaged shard"),
        (lambda d: spoil(d / "prepared.json", lambda b: b[:-9]), ValueError, "prepared.json is damaged"),
        (lambda d: spoil(d / "prepared.json", lambda b: b"[]"), ValueError, "prepared.json is damaged"),
        (lambda d: spoil(d / "prepared.json", lambda b: b.replace(b'"version": 3', b'"version": 7')), ValueError,
         "must have the format version 1 or 2 or 3, got 7"),
    ],
)  # fmt: skip
def test_damaged_folders(folder, damage, error, match):
    if "65527" in match:
        size = (folder / "data-00001.bag").stat().st_size
        match = match.replace("65527", str(size - 9)).replace("65536", str(size))
    damage(folder)
    with pytest.raises(error, match=match) as caught:
        open_prepared(folder)
    assert "\n" not in str(caught.value)


def test_shards_that_do_not_match_the_index(folder):
    meta = json.loads((folder / "prepared.json").read_text())
    meta["shards"][0]["samples"] -= 1
    (folder / "prepared.json").write_text(json.dumps(meta))
    for name in ("lengths.npy", "images.npy"):
        np.save(folder / name, np.ones(17, np.int32))
    with pytest.raises(ValueError, match=r"have 18 samples, but prepared.json says 17"):
        open_prepared(folder)


def test_a_damaged_record_is_named(folder):
    data = open_prepared(folder)
    path = folder / "data-00001.bag"
    spoil(path, lambda b: b[:70] + bytes(byte ^ 255 for byte in b[70:200]) + b[200:])
    with pytest.raises(ValueError, match="out sample 5 is damaged") as caught:
        data[5]
    assert "\n" not in str(caught.value)
    assert data[0].kind == "understanding"


def test_a_misspelt_folder(folder):
    with pytest.raises(FileNotFoundError, match=r"did you mean .*out\?; make it with `python -m train.prepare"):
        open_prepared(folder.with_name("outt"))
