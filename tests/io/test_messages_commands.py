"""Every command prints text of users, and none may end in the middle of a line for want of a character."""

import io
import os
import pathlib
import signal

import pytest

from janus_jax.io import commands
from janus_jax.io.messages import print_any_text

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    path.relative_to(ROOT)
    for place in ("janus_jax", "train", "convert", "benchmarks")
    for path in (ROOT / place).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_every_command_prints_any_text(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert "    print_any_text()\n" in source or "from janus_jax.io.commands import" in source


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "shift_jis", "utf-8"])
def test_both_streams(encoding, monkeypatch):
    files = [io.BytesIO(), io.BytesIO()]
    for name, file in zip(("sys.stdout", "sys.stderr"), files, strict=True):
        monkeypatch.setattr(name, io.TextIOWrapper(file, encoding, errors="strict", write_through=True))
    print_any_text()
    import sys

    for stream in (sys.stdout, sys.stderr):
        stream.write("\u732b \U0001f642 \udcff")
    expected = "\u732b \U0001f642 \udcff".encode(encoding, "backslashreplace")
    assert [file.getvalue() for file in files] == [expected] * 2


def test_streams_of_notebooks_are_left_alone(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    print_any_text()


def test_signals_are_a_command_s_while_it_runs_alone(monkeypatch, capsys):
    """In a notebook, whose kernel goes on, they do afterwards what they did before."""
    monkeypatch.setattr(commands, "_quiet", lambda: None)
    before = {number: signal.getsignal(number) for number in commands._SIGNALS}
    assert commands.run(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "ended by SIGTERM\n"
    assert commands.run(lambda: None) == 0
    assert {number: signal.getsignal(number) for number in commands._SIGNALS} == before
