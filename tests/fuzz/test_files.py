"""JSON of every kind through `janus_jax.io.files`, and the harness itself, which has to find what it looks for."""

import json
import os
import time
import unicodedata

import pytest
from hypothesis import strategies as st

from janus_jax.io.files import read_json, read_json_object
from janus_jax.io.messages import one_line
from tests.fuzz.bounded import Bounded, given, mutated

_SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(_SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
SEEDS = [b'{"a": [1, 2.5, {"b": null}], "c": "\\u00e9"}', b"[" * 60 + b"]" * 60, b'"' + b"x" * 300 + b'"']


def read(data, folder):
    (folder / "a.json").write_bytes(data)
    read_json(folder / "a.json")
    read_json_object(folder / "a.json")


@given(mutated(SEEDS) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_json(bounded, data):
    line = bounded(read, data)
    assert not line or "a.json" in line


@given(st.text() | st.integers() | st.binary(), st.integers(10, 300))
def test_one_line(value, limit):
    line = one_line(value, limit)
    # Spaces of other scripts are no printable characters to Python, and harmless.
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in line) and len(line) <= limit


# ---------------------------------------------------------------- the harness


def misbehave(data, folder):
    kind = data.decode()
    if kind == "error":
        raise KeyError(kind)
    if kind == "lines":
        raise ValueError("one\ntwo")
    if kind == "refuse":
        raise ValueError("one")
    if kind == "memory":
        return len(bytearray(200 << 20))
    if kind == "cpu":
        end = time.process_time() + 1.2
        while time.process_time() < end:
            pass
    if kind == "hang":
        time.sleep(60)
    if kind == "die":
        os._exit(3)
    return None


@pytest.mark.slow
def test_the_harness_finds_what_it_looks_for():
    bounded = Bounded(seconds=1, mebibytes=100)
    assert bounded(misbehave, b"") == "" and bounded(misbehave, b"refuse") == "one"
    for kind, told in [("error", "KeyError"), ("lines", "not one line"), ("memory", "MiB"), ("cpu", "s of CPU")]:
        with pytest.raises(AssertionError, match=told):
            bounded(misbehave, kind.encode())
    for kind, told in [("hang", "hangs"), ("die", "died")]:
        with pytest.raises(AssertionError, match=told):
            bounded(misbehave, kind.encode())
        assert bounded(misbehave, b"refuse") == "one"
    assert bounded.refused == 4 and bounded.inputs >= 6
    bounded.close()
