"""Files that somebody else wrote, and the one line that says what is wrong with them."""

import json
import os
import socket
import sys

import pytest

from janus_jax.io import files
from janus_jax.io.messages import did_you_mean, nearest, one_line, print_error


def test_reads_what_it_should(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1, 2.5, "é"]}).encode())
    assert files.read_json(path) == files.read_json_object(path) == {"a": [1, 2.5, "é"]}
    assert files.read_bytes(path, 100)[:3] == b"\xef\xbb\xbf"
    assert files.read_json_object(tmp_path / "none.json", missing_ok=True) == {}
    with pytest.raises(FileNotFoundError):
        files.read_json_object(tmp_path / "none.json")


def test_special_files_never_wait(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("fifo")
        for name, kind in [("fifo", "a FIFO"), ("link", "a FIFO"), ("socket", "a socket"), (".", "a folder")]:
            with pytest.raises(ValueError, match=f"is {kind}, not a regular file"):
                files.open_regular(tmp_path / name)
    with pytest.raises(ValueError, match="is a device"):
        files.read_bytes("/dev/zero", 10)
    with pytest.raises(ValueError, match="null"):
        files.open_regular("a\0b")


def test_size_is_bounded(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes, more than the limit of 10"):
        files.read_bytes(tmp_path / "sparse", 10)
    with pytest.raises(ValueError, match="more than the limit of 10"):
        files.read_bytes("/proc/self/status", 10)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "not valid JSON: .* at line 1 column 2"),
        (b"\xff", "not UTF-8"),
        (b"[" * 3000 + b"]" * 3000, "nested"),
        (b"[" * 100000 + b"]" * 100000, "nested"),
        (b"[" * 201 + b"]" * 201, "more than 200 deep"),
        (b"[1e999]", "1e999 is too large for float64"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"9" * 5000, "thousands of digits"),
        (b"[]", "holds a list, not a JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_json_within_bounds(tmp_path, text, told):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=told) as error:
        files.read_json_object(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_json_of_allowed_depth():
    assert files.parse_json("[" * 200 + "]" * 200, "here")
    assert files.parse_json(json.dumps({"a": {"b": "[" * 300}}), "here")


def test_one_line():
    assert one_line("a red boat, été 猫") == "a red boat, été 猫"
    assert one_line("a\nb\x1b[31m\u202e\ud800") == "a\\nb\\x1b[31m\\u202e\\ud800"
    cut = one_line("x" * 10_000_000 + "end", 50)
    assert len(cut) == 50 and cut.startswith("xxx") and cut.endswith("xend") and "..." in cut
    assert len(one_line("\x00" * 300)) == 200


def test_print_error(capsys):
    print_error(FileNotFoundError(2, "No such file or directory", "a\nb"))
    assert capsys.readouterr().err == "error: a\\nb: No such file or directory\n"
    print_error(ValueError("x" * 1_000_000))
    assert len(capsys.readouterr().err) == len("error: \n") + 2000
    print_error(KeyError())
    assert capsys.readouterr().err == "error: KeyError\n"


def test_print_error_where_the_terminal_knows_less(monkeypatch, tmp_path):
    with open(tmp_path / "log", "w", encoding="cp1252") as log:
        monkeypatch.setattr(sys, "stderr", log)
        print_error(ValueError("猫 is no file"))
    assert (tmp_path / "log").read_text(encoding="cp1252") == "error: \\u732b is no file\n"


def test_nearest_is_never_the_very_same_name():
    assert nearest("steps", ["steps", "stepz", "seed"]) == ["stepz"]
    assert nearest("steps", ["steps"]) == [] and did_you_mean("steps", ["steps"]) == ""
    assert did_you_mean("stps", ["steps", "seed", "step"], 2) in (
        "; did you mean steps or step?",
        "; did you mean step or steps?",
    )
    assert did_you_mean("a.txt", ["a\n.txt"]) == "; did you mean a\\n.txt?"
    assert len(nearest("x" * 10_000_000, ["x" * 300, "y"])) == 1  # of long names the beginnings are compared
