"""Files that are whole or not there."""

import errno
import os

import pytest

from janus_jax.io.whole.files import write_file


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "a.png", b"old")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device.*a.png"):
            write_file(tmp_path / "a.png", b"new")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    write_file(tmp_path / "a.png", b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
