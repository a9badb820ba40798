"""Safetensors files: what is refused, with the format's own library as the judge."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from janus_jax.weights.formats.safetensors_files import open_safetensors

GOOD = {"a": ("F32", [2], 0, 8), "b": ("I16", [3], 8, 14), "empty": ("F32", [0, 2], 14, 14)}


def text(entries: dict) -> str:
    return json.dumps(
        {name: {"dtype": d, "shape": s, "data_offsets": [begin, end]} for name, (d, s, begin, end) in entries.items()}
    )


def write(folder, header: str | bytes, data: bytes = bytes(range(14)), size: int | None = None):
    header = header.encode() if isinstance(header, str) else header
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)
    return path


def the_library_reads(path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
    except (SafetensorError, TypeError, AttributeError):
        return False
    return True


def test_good_files(tmp_path):
    path = write(tmp_path, text(GOOD) + "   ")
    assert the_library_reads(path)
    found = {name: tensor.view() for name, tensor in open_safetensors(path).items()}
    np.testing.assert_array_equal(found["b"], np.frombuffer(bytes(range(8, 14)), np.int16))
    assert found["empty"].shape == (0, 2) and found["a"].dtype == np.float32
    path.write_bytes(save({"x": np.arange(6.0).reshape(2, 3)}, {"format": "pt"}))
    np.testing.assert_array_equal(open_safetensors(path)["x"].view(), np.arange(6.0).reshape(2, 3))


BAD = {
    "overlapping": (text(GOOD | {"b": ("I16", [3], 6, 12)}), "b begins at byte 6 of the tensors instead of 8"),
    "the same place": (text(GOOD | {"c": ("F32", [2], 0, 8)}), "begins at byte 0"),
    "a hole": (text(GOOD | {"b": ("I8", [5], 9, 14)}), "begins at byte 9"),
    "a hole in front": (text({"b": ("I16", [3], 8, 14)}), "begins at byte 8"),
    "stray bytes": (text({"a": GOOD["a"]}), "bytes, its header describes"),
    "too long": (text(GOOD | {"b": ("I16", [4], 8, 16)}), "begins at byte 14 of the tensors|its header describes"),
    "shape": (text(GOOD | {"a": ("F32", [3], 0, 8)}), "the offsets of a do not match its shape"),
    "dtype size": (text(GOOD | {"a": ("F16", [2], 0, 8)}), "the offsets of a do not match its shape"),
    "dtype": (text(GOOD | {"a": ("F31", [2], 0, 8)}), "unknown dtype F31"),
    "backwards": (text(GOOD | {"a": ("F32", [2], 8, 0)}), "do not match its shape"),
    "negative": (text(GOOD | {"a": ("F32", [-2], 0, -8)}), "not integers of at least 0"),
    "fractions": (text(GOOD | {"a": ("F32", [2.0], 0, 8)}), "not integers of at least 0"),
    "true": (text(GOOD | {"a": ("F32", [2, True], 0, 8)}), "not integers of at least 0"),
    "huge": (text(GOOD | {"a": ("F32", [2**70, 0], 0, 0)}), "not integers of at least 0"),
    "a list": ("[" + text(GOOD) + "]", "does not begin with {"),
    "no object": ('{"a": 3}', "a lacks dtype, shape or data_offsets"),
    "three offsets": (text(GOOD).replace("[0, 8]", "[0, 8, 8]"), "1 axes and 3 offsets"),
    "metadata": ('{"__metadata__": {"a": 1}}', "__metadata__ is not an object of strings"),
    "no JSON": ("{", "not valid JSON"),
    "UTF-16": (text(GOOD).encode("utf-16-le"), "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "codec|UTF-8"),
    "nested": ('{"a":' + "[" * 50_000, "nested|not valid JSON"),
    "twice": (text(GOOD)[:-1] + ", " + text({"a": GOOD["a"]})[1:], "the name a appears twice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_headers(tmp_path, kind):
    header, told = BAD[kind]
    path = write(tmp_path, header)
    with pytest.raises(ValueError, match=rf"a\.safetensors is damaged or not a safe.* file \(.*({told})") as raised:
        open_safetensors(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
    # "Duplicate keys are disallowed. Not all parsers may respect this."
    assert the_library_reads(path) == (kind == "twice")


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = write(tmp_path, "{}", size=4 << 30)
    os.truncate(path, 5 << 30)
    with pytest.raises(ValueError, match="its header would have 4,294,967,296 bytes, the format allows 100,000,000"):
        open_safetensors(path)
    path = write(tmp_path, b"{" + b"[]," * 1_000_000)
    with pytest.raises(ValueError, match="not a list of at most 100,000 tensors"):
        open_safetensors(path)


def test_names_are_escaped(tmp_path):
    path = write(tmp_path, text({"\n\x1b[31m" + "x" * 10_000: ("F32", [3], 0, 8)}))
    with pytest.raises(ValueError) as raised:
        open_safetensors(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
