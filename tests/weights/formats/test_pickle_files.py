"""torch.save's files: training checkpoints, and files that are made or damaged to do harm."""

import argparse
import io
import pathlib
import pickle
import re
import struct
import sys
import time
import zipfile

import numpy as np
import pytest

from janus_jax.weights.formats.pickle_files import open_pickle
from tests.torch_oracle import torch

INT = struct.Struct("<i").pack


def values(path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.view()) for name, tensor in open_pickle(path).items()}


def archive(path: pathlib.Path, pickled: bytes, **records: bytes) -> pathlib.Path:
    """A file as torch.save writes it, with this data.pkl."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, data in records.items():
            file.writestr(f"x/{name}", data)
    return path


def refusal(path: pathlib.Path) -> str:
    start = time.process_time()
    with pytest.raises(ValueError) as raised:
        open_pickle(path)
    assert time.process_time() - start < 3
    message = str(raised.value)
    assert str(path) in message and message.isprintable() and len(message) < 1000
    return message


# ---------------------------------------------------------------- training checkpoints


def trained(ema: bool = True) -> dict:
    """What LlamaGen's trainer saves."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": 7}
    saved["discriminator"] = torch.nn.Linear(2, 2).state_dict()
    saved["args"] = argparse.Namespace(lr=1e-4, data_path="/data", sizes=[256, 384], ema=True, vq_ckpt=None)
    if ema:
        saved["ema"] = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    return saved


def test_averaged_parameters_are_taken_before_the_model(tmp_path):
    saved, told = trained(), []
    torch.save(saved, tmp_path / "0050000.pt")
    found = open_pickle(tmp_path / "0050000.pt", told.append)
    assert found.keys() == saved["ema"].keys()
    for name, tensor in saved["ema"].items():
        np.testing.assert_array_equal(found[name].view(), tensor.numpy())
    assert told == [f"{tmp_path / '0050000.pt'}: it has ema and model; ema is read"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_trainers_file_without_an_average(tmp_path, protocol):
    saved, told = trained(ema=False), []
    torch.save(saved, tmp_path / "a.pt", pickle_protocol=protocol)
    found = open_pickle(tmp_path / "a.pt", told.append)
    np.testing.assert_array_equal(found["weight"].view(), saved["model"]["weight"].numpy())
    assert told == []


def test_state_dict_beside_args(tmp_path):
    torch.save({"args": argparse.Namespace(a=1), "state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    np.testing.assert_array_equal(values(tmp_path / "a.pt")["w"], np.ones(2))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"ema": [1], "model": {"w": torch.ones(2)}}, "its 'ema' is not a dict of tensors"),
        ({"ema": {"decay": 0.9}, "model": {"w": torch.ones(2)}}, "its 'ema' contains more than tensors: decay"),
        ({"w": torch.ones(2), "step": 3}, "it contains more than tensors: step"),
        ({3: torch.ones(2)}, "it contains more than tensors: 3"),
        ({("a", 1): torch.ones(2)}, "keys that are neither strings nor integers: tuple"),
        ([torch.ones(2)], "it is not a dict of tensors"),
        ({"w": torch.nn.Linear(2, 2)}, "it asks for torch.nn.modules.linear.Linear"),
    ],
)
def test_what_cannot_be_chosen_is_told(tmp_path, content, told):
    torch.save(content, tmp_path / "a.pt")
    assert told in refusal(tmp_path / "a.pt")


def test_flags_that_change_the_numbers_are_refused(tmp_path):
    """A negated view is stored as it was, with a flag."""
    negated = torch.complex(torch.ones(2), torch.ones(2)).conj().imag
    assert negated.is_neg() and negated[0] == -1
    torch.save({"w": negated}, tmp_path / "a.pt")
    assert "hooks or flags" in refusal(tmp_path / "a.pt")


# ---------------------------------------------------------------- made to do harm


def nested_keys() -> bytes:
    """Tuples of tuples of the same, as a key: each level doubles what hashing has to visit."""
    return b"\x80\x02}(" + b")" + b"".join(b"q\x01h\x01\x86" for _ in range(100)) + b"K\x01u."


@pytest.mark.parametrize(
    ("pickled", "told"),
    [
        (nested_keys(), "keys that are neither strings nor integers"),
        (b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u.", "more than 500,000 operations"),
        (b"\x80\x02}(" + b")" + b"\x85" * 400_000 + b"K\x01u.", "keys that are neither"),
        (b"\x80\x02" + b"]" * 400_000 + b"a" * 99_000 + b".", "damaged"),
        (b"\x80\x02}r\xff\xff\xff\x7f0.", "the operation POP"),
        (b"\x80\x02}r\xff\xff\xff\x7fX\x01\0\0\0ar\xfe\xff\xff\x7fK\x01s.", "it contains more than tensors: a"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fa.", "pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged|expected"),
        (b"\x80\x02}X\x01\0\0\0a\x8a\xff" + b"\x7f" * 255 + b"s.", "an integer of more than 62 bits"),
        (b"\x80\x02I" + b"9" * 100_000 + b"\n.", "the operation INT|Exceeds|integer"),
        (b"}X\x01\0\0\0aK\x01sX\x01\0\0\0aK\x02s.", "has the key a twice"),
        (b"(((((.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"}.}.", "damaged"),
        (b"", "pickle"),
        (b"\xff" * 100, "unknown"),
    ],
)
def test_small_pickles_that_ask_for_much(tmp_path, pickled, told):
    assert re.search(told, refusal(archive(tmp_path / "a.bin", pickled)))


def test_a_large_pickle_is_not_read(tmp_path):
    assert "more than the limit of 16,777,216" in refusal(archive(tmp_path / "a.bin", b"N" * (17 << 20)))


@pytest.mark.parametrize("name", ["data.pkl", "byteorder"])
def test_what_is_compressed_is_not_unpacked(tmp_path, name):
    """300 MB of zeros are 300 KB when they are deflated."""
    archive = zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open(f"x/{name}", "w") as record:
        for _ in range(300):
            record.write(bytes(1 << 20))
    assert "is compressed" in refusal(tmp_path / "a.bin")


def test_a_huge_byteorder_is_not_read(tmp_path):
    assert "more than the limit of 16" in refusal(archive(tmp_path / "a.bin", b"}.", byteorder=bytes(1 << 20)))


class Touch:
    def __init__(self, victim: pathlib.Path):
        self.victim = victim

    def __reduce__(self):
        return pathlib.Path.touch, (self.victim,)


def calls(victim: pathlib.Path) -> dict[str, bytes]:
    """Programs that make `victim` by each way that a pickle can call a function."""
    text = str(victim).encode()
    code = b"X" + INT(len(text) + 13) + b"open('" + text + b"', 'w')"
    class_and_module = b"X\x08\0\0\0builtinsX\x04\0\0\0eval"
    return {
        "reduce": b"\x80\x02cbuiltins\neval\n" + code + b"\x85R.",
        "inst": b"(" + code + b"ibuiltins\neval\n.",
        "obj": b"(cbuiltins\neval\n" + code + b"o.",
        "stack_global": b"\x80\x04" + class_and_module + b"\x93" + code + b"\x85R.",
        "posix": b"cos\nsystem\nX" + INT(len(text) + 6) + b"touch " + text + b"\x85R.",
        "protocol 2": pickle.dumps(Touch(victim), 2),
        "protocol 5": pickle.dumps(Touch(victim), 5),
    }


@pytest.mark.parametrize("way", calls(pathlib.Path("x")))
def test_nothing_is_called(tmp_path, way):
    victim = tmp_path / "victim"
    pickled = calls(victim)[way]
    with zipfile.ZipFile(archive(tmp_path / "a.bin", pickled)) as file:
        assert file.read("x/data.pkl") == pickled
    refusal(tmp_path / "a.bin")
    assert not victim.exists()
    pickle.loads(pickled)
    assert victim.exists()  # so it would have been called


def test_classes_that_are_let_pass_are_not_built(tmp_path):
    """The one that a trainer's file asks for is never looked up, so what it would do does not matter."""
    torch.save({"args": argparse.Namespace(a=1), "model": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    looked_up = []
    sys.addaudithook(lambda event, arguments: event == "pickle.find_class" and looked_up.append(arguments))
    open_pickle(tmp_path / "a.pt")
    assert not looked_up
    pickle.loads(pickle.dumps(argparse.Namespace()))
    assert looked_up  # so the hook would have seen it


# ---------------------------------------------------------------- damaged


@pytest.fixture(scope="module")
def saved() -> tuple[bytes, dict[str, np.ndarray]]:
    state = {"w": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(3, dtype=torch.bfloat16)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue(), {name: tensor.float().numpy() for name, tensor in state.items()}


def same(path, expected) -> bool:
    found = {name: array.astype(np.float32) for name, array in values(path).items()}
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


def test_no_changed_byte_gives_other_numbers(tmp_path, saved):
    data, expected = saved
    (tmp_path / "a.bin").write_bytes(data)
    assert same(tmp_path / "a.bin", expected)
    read = 0
    for position in range(len(data)):
        bit = 1 << position % 8
        path = tmp_path / "b.bin"
        path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        try:
            assert same(path, expected), position
            read += 1
        except ValueError as error:
            assert str(path) in str(error)
    assert read < len(data) / 3  # dates mean nothing, nor does padding


def test_records_elsewhere_than_the_directory_says(tmp_path, saved):
    """Bytes cut out or repeated, anywhere."""
    data, expected = saved
    rng = np.random.default_rng(0)
    for _ in range(400):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
        middle = data[at : at + length] * int(rng.integers(0, 3))
        path = tmp_path / "b.bin"
        path.write_bytes(data[:at] + middle + data[at + length :])
        if path.read_bytes() != data:
            with pytest.raises(ValueError):
                same(path, expected)


def test_checksums_that_torch_was_told_not_to_compute(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "a.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(values(tmp_path / "a.bin")["w"], np.arange(4.0))


def test_a_file_that_changed_is_checked_anew(tmp_path):
    torch.save({"w": torch.arange(4096.0)}, tmp_path / "a.bin")
    tensor = open_pickle(tmp_path / "a.bin")["w"]
    tensor.view()
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[tensor.offset + 5] ^= 1
    (tmp_path / "a.bin").write_bytes(data[: tensor.offset + 4096 * 4])
    with pytest.raises(ValueError, match=r"a\.bin is damaged: the 16,384 bytes from byte .* download it again"):
        tensor.view()
    tensor.view(verify=False)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has become shorter"):
        tensor.view(verify=False)
