"""Weights of others: pickles and their archives, safetensors, indices, converted folders, configs of parts."""

import argparse
import functools
import io
import json
import os
import pathlib
import shutil
import struct
import sys
import tempfile
import zipfile

import numpy as np
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from examples.tiny.run import MODEL
from janus_jax.weights import checkpoint
from janus_jax.weights.formats.pickle_files import open_pickle
from janus_jax.weights.formats.safetensors_files import open_safetensors
from janus_jax.weights.formats.torch_files import open_tensors
from janus_jax.weights.part_configs import check_config
from tests.fuzz.bounded import given, mutated
from tests.torch_oracle import torch

# ---------------------------------------------------------------- nothing is run


class Ran(BaseException):
    """Not an Exception, lest the library take it for bad input."""


_FORBIDDEN = ("pickle.find_class", "exec", "compile", "os.system", "os.exec", "os.fork", "subprocess.Popen", "import")


@functools.cache
def watch() -> list[bool]:
    """A switch: while it holds True, code that is run, compiled or imported ends the input as a finding."""
    switch = [False]

    def hook(event, arguments):
        if switch[0] and event in _FORBIDDEN:
            switch[0] = False
            raise Ran(f"{event} {arguments}")

    sys.addaudithook(hook)
    return switch


def saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


STATE = {"a.0.w": torch.arange(6.0).reshape(2, 3).T, "a.1.w": torch.ones(2, dtype=torch.bfloat16)}
TRAINED = {"model": STATE, "ema": STATE, "steps": 7, "args": argparse.Namespace(lr=1e-4, sizes=[1, 2])}
ARCHIVES = [saved(STATE), saved(TRAINED), saved({})]
PICKLES = [zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl") for data in ARCHIVES]
_PIECES = [
    b"}",
    b")",
    b"]",
    b"(",
    b"t",
    b"u",
    b"s",
    b"a",
    b"e",
    b"\x85",
    b"\x86",
    b"\x87",
    b"q\x01",
    b"h\x01",
    b"R",
    b"b",
]
_PIECES += [b"X\x01\0\0\0w", b"K\x05", b"N", b"\x88", b"Q", b"\x93", b"\x94", b"0", b"2", b"i", b"o", b"\x81", b"\x92"]
_PIECES += [
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
]
_PIECES += [b"ctorch\nFloatStorage\n", b"r\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\0\0\0\0", b"\x8a\x09" + b"\xff" * 9]
PROGRAMS = st.lists(st.sampled_from(_PIECES) | st.binary(max_size=3), max_size=60)
LONG = st.tuples(st.sampled_from(_PIECES), st.integers(0, 600_000)).map(lambda pair: pair[0] * pair[1])


def read_archive(data: bytes, folder: pathlib.Path):
    path = folder / "a.bin"
    path.write_bytes(data)
    switch = watch()
    switch[0] = True
    try:
        found = {name: np.array(tensor.view()) for name, tensor in open_pickle(path).items() if _small(tensor)}
    finally:
        switch[0] = False
    # Whatever was changed, these names never get other numbers.
    for name, tensor in STATE.items():
        if name in found and found[name].shape == tuple(tensor.shape):
            np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())


def read_pickle(data: bytes, folder: pathlib.Path):
    path = folder / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for number, size in enumerate((24, 4)):
            archive.writestr(f"archive/data/{number}", bytes(size))
    switch = watch()
    switch[0] = True
    try:
        open_pickle(path)
    finally:
        switch[0] = False


def _small(tensor) -> bool:
    """Nobody views a tensor whose shape is not the wanted one."""
    return np.prod(tensor.shape, dtype=float) < 1000


@given(mutated(ARCHIVES))
def test_archives(bounded, data):
    line = bounded(read_archive, data)
    assert not line or "a.bin" in line


@given(mutated(PICKLES) | PROGRAMS.map(b"".join) | st.tuples(LONG, LONG).map(lambda two: b"".join(two) + b"."))
def test_pickles(bounded, data):
    line = bounded(read_pickle, data)
    assert not line or "a.bin" in line


# ---------------------------------------------------------------- safetensors

TENSORS = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.zeros((0, 2), np.int8)}
FILES = [save(TENSORS, {"format": "pt"}), save({"a": np.zeros(1)}), save({})]
_NUMBERS = st.integers(-2, 30) | st.sampled_from([8, 2**31, 2**63, 2**64, 1e3, True, None, "8"])
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "BF16", "U64", "F4", "f32", 3]),
        "shape": st.lists(_NUMBERS, max_size=3) | st.none(),
        "data_offsets": st.tuples(_NUMBERS, _NUMBERS) | st.lists(_NUMBERS, max_size=3),
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\n"]), _ENTRIES | _NUMBERS, max_size=4)


def file_of(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


def read_safetensors(data: bytes, folder: pathlib.Path):
    path = folder / "a.safetensors"
    path.write_bytes(data)
    found = {name: np.array(tensor.view()).tobytes() for name, tensor in open_safetensors(path).items()}
    # What is accepted here, the format's own library accepts, and reads alike.
    try:
        theirs = {name: bytes(entry["data"]) for name, entry in deserialize(data)}
    except SafetensorError as error:
        raise AssertionError(f"accepted against {error}") from error
    assert found == theirs


@given(mutated(FILES) | HEADERS.map(file_of))
def test_safetensors(bounded, data):
    line = bounded(read_safetensors, data)
    assert not line or "a.safetensors" in line


# ---------------------------------------------------------------- indices

INDICES = [json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.bin"}}).encode(), b'{"weight_map": {}}']
NAMES = st.text(max_size=20) | st.sampled_from(["x.safetensors", "../x", "/dev/zero", "fifo", "folder", "."])
MAPS = st.dictionaries(st.text(max_size=5), NAMES).map(lambda names: json.dumps({"weight_map": names}).encode())


def read_index(data: bytes, folder: pathlib.Path):
    (folder / "x.safetensors").write_bytes(FILES[0])
    (folder / "y.bin").write_bytes(ARCHIVES[0])
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "model.safetensors.index.json").write_bytes(data)
    open_tensors(folder)


@given(mutated(INDICES) | MAPS)
def test_indices(bounded, data):
    bounded(read_index, data)


# ---------------------------------------------------------------- converted folders

ARRAYS = {"a": {"b": np.arange(600, dtype=np.float32).reshape(2, 300), "c": np.ones(3, np.float16)}}


@functools.cache
def converted() -> tuple[pathlib.Path, list[str]]:
    """A folder of parameters, and its files that are not empty."""
    folder = pathlib.Path(tempfile.mkdtemp()) / "params"
    checkpoint.save_params(folder, ARRAYS)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return folder, [name for name in files if (folder / name).stat().st_size]


def read_converted(data: bytes, folder: pathlib.Path):
    """`data` says what happens to which file: its number, a place, and what stands there then."""
    source, files = converted()
    shutil.copytree(source, folder / "params")
    while len(data) >= 4:
        number, high, low, length = data[:4]
        patch, data = data[4 : 4 + length % 16], data[4 + length % 16 :]
        path = folder / "params" / files[number % len(files)]
        old = path.read_bytes()
        at = (256 * high + low) % (len(old) + 1)
        path.write_bytes(old[:at] + patch + old[at + (len(patch) if length < 200 else 0) :] if patch else old[:at])
    leaves = checkpoint.array_leaves(folder / "params", ARRAYS)
    for path, leaf in leaves.items():
        found = leaf.read(tuple(slice(0, size) for size in leaf.shape))
        np.testing.assert_array_equal(found, ARRAYS["a"][path[-1]])


@given(st.binary(max_size=60))
def test_converted_folders(bounded, data):
    line = bounded(read_converted, data)
    assert not line or "params" in line


# ---------------------------------------------------------------- configs of parts

CONFIGS = [
    {"model_type": "llama", "hidden_size": 48, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    {"model_type": "mistral", "sliding_window": 4096, "layer_types": ["full_attention"], "hidden_act": "silu"},
    {"architecture": "vit_large_patch16_siglip_384", "model_args": {"num_heads": 2}, "pretrained_cfg": {"mean": [0.5]}},
    {"codebook_size": 64, "codebook_embed_dim": 8, "encoder_ch_mult": [1, 1], "codebook_l2_norm": True},
]
_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=4)
)
KEYS = sorted({key for config in CONFIGS for key in config} | {"rope_scaling", "attention_bias", "head_dim", "config"})
CHANGED = st.builds(
    lambda config, changes: json.dumps(config | changes).encode(),
    st.sampled_from(CONFIGS),
    st.dictionaries(st.sampled_from(KEYS), _VALUES | st.dictionaries(st.sampled_from(KEYS), _VALUES)),
)


def read_config(data: bytes, folder: pathlib.Path):
    (folder / "config.json").write_bytes(data)
    lines = []
    for part in ("language_model", "vision_model", "gen_vision_model"):
        try:
            check_config(folder, MODEL, part)
        except ValueError as error:
            assert "config.json" in str(error)
            lines.append(str(error))
    raise ValueError(" | ".join(lines))


@given(mutated([json.dumps(config).encode() for config in CONFIGS]) | CHANGED)
def test_configs(bounded, data):
    bounded(read_config, data)
