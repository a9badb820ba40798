"""Indices of sources: the same records as without, made once, whole, and 16 bytes a record."""

import os
import threading

import numpy as np
import pytest

from tests.handles import open_in
from tests.raw.test_sources import lines, png
from tests.raw.test_tars import END, member
from train.raw import indices, json_files
from train.raw.readers import BadSample
from train.raw.sources import open_source
from train.raw.tar.shard import TarShard


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(indices, "KEPT_FROM", 0)


def told(source):
    found = []
    for index in range(len(source)):
        try:
            raw = source[index]
            found.append((raw.place, raw.text or raw.caption))
        except ValueError as error:
            found.append((error.reason, error.place))
    return found


TEXT = "\n\n{'text': 'A'}\r\n   \n{'text': '\u4e2d'}\nnothing\n\u3000\n   {'text': 'B'}\n\n\n[1]\n{'text': 'last'}"


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("at_once", [4, 16, 1 << 22])
def test_lines_of_any_encoding(tmp_path, monkeypatch, codec, at_once):
    """However the file is cut, lines are where Python sees them."""
    path = tmp_path / "a.jsonl"
    text = TEXT.replace("'", '"')
    path.write_bytes(text.encode(codec))
    monkeypatch.setattr(json_files, "_AT_ONCE", at_once)
    expected = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            good = line.strip().startswith("{")
            place = f"{path}:{number}"
            expected.append((place, line.split('"')[3]) if good else ("bad_json", place))
    for index in (None, tmp_path / "index", tmp_path / "index"):
        assert told(open_source(path, "text", index=index)) == expected
    (made,) = (tmp_path / "index").iterdir()
    assert made.stat().st_size == 16 * len(expected) + len("{}") + 8


def test_the_fast_index_is_that_of_a_plain_loop(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    made = [rng.choice([b"{}", b"", b"  ", b'{"text": "x"}', b"\xe2\x80\x83", b"\xc3\xa4", b"\r"]) for _ in range(3000)]
    path.write_bytes(b"\n".join(bytes(line) for line in made))
    expected, begin = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        end = begin + len(line) + 1
        if line.decode().strip():
            expected.append((begin, min(end, path.stat().st_size) - begin, number))
        begin = end
    for at_once in (1, 7, 64, 1 << 22):
        monkeypatch.setattr(json_files, "_AT_ONCE", at_once)
        index = json_files.JsonLines(path)._index
        assert [index[i] for i in range(len(index))] == expected


def test_tables_with_rows_of_several_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text;other\n\n"one\ntwo";1\n\nthree;\n')
    expected = told(open_source(path, schema="text"))
    assert [text for _, text in expected] == ["one\ntwo", "three"] and expected[1][0].endswith(":6"), expected
    for _ in range(2):
        assert told(open_source(path, schema="text", index=tmp_path / "index")) == expected


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path, folder = lines(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(50))), tmp_path / "index"
    reads, real = [], json_files._lines
    monkeypatch.setattr(json_files, "_lines", lambda *given: reads.append(1) or real(*given))
    for _ in range(3):
        source = open_source(path, index=folder)
        assert len(source) == 50 and source[49].text == "49"
    assert len(reads) == 1
    lines(path, *({"text": str(i)} for i in range(60)))
    assert len(open_source(path, index=folder)) == 60 and len(reads) == 2
    # A damaged one is made again.
    for made in folder.iterdir():
        made.write_bytes(made.read_bytes()[:-9])
    assert len(open_source(path, index=folder)) == 60 and len(reads) == 3
    assert not list(folder.glob("*.partial"))


def test_several_processes_at_once(tmp_path):
    """Here threads: each begins with other files, and none sees an index that is not whole."""
    (tmp_path / "data").mkdir()
    for number in range(8):
        lines(tmp_path / f"data/{number}.jsonl", *({"text": f"{number} {i}"} for i in range(200)))
    expected = told(open_source(tmp_path / "data"))
    found = [None] * 4

    def one(part):
        found[part] = told(open_source(tmp_path / "data", index=tmp_path / "index", begin=part / 4))

    threads = [threading.Thread(target=one, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert len(list((tmp_path / "index").iterdir())) == 8


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(indices, "_MAPPED", 4)
    (tmp_path / "data").mkdir()
    for number in range(20):
        lines(tmp_path / f"data/{number:02d}.jsonl", {"text": str(number)})
    source = open_source(tmp_path / "data", index=tmp_path / "index")
    assert [source[i].text for i in range(20)] == [str(i) for i in range(20)]
    assert open_in(tmp_path / "index", ".rows") <= 4


def test_the_command_keeps_indices_beside_its_output(tmp_path):
    from train.fleet.job import Job

    (tmp_path / "a.png").write_bytes(png())
    path = lines(tmp_path / "a.jsonl", {"image": "a.png", "caption": "A"})
    assert len(Job(str(path), f"{tmp_path}/out/", "understanding", "m").open_source()) == 1
    assert os.listdir(tmp_path / "out.index")


def samples_of(shard):
    found = []
    for index in range(len(shard)):
        try:
            found.append(shard[index])
        except BadSample as error:
            found.append((error.reason, error.place, error.detail))
    return found, shard.passed_over


NAMES = ["0", "1", "2", "0.seg", "1.b", "x/0"]
SUFFIXES = [".jpg", ".png", ".txt", ".json", ".npy", ".mp4", ".cls"]


def test_samples_that_stand_together_are_those_of_the_whole_tar(tmp_path, monkeypatch):
    """Random members, mostly in the order of their names: what one place tells is what the whole tar does."""
    rng, together = np.random.default_rng(0), []
    for turn in range(200):
        chosen = [name + suffix for name in NAMES for suffix in SUFFIXES if rng.random() < 0.4]
        for _ in range(rng.integers(0, 2)):
            a, b = rng.integers(0, len(chosen) + 1, 2)
            chosen.insert(a, chosen[b % len(chosen)] if rng.random() < 0.3 else chosen.pop(b % len(chosen)))
        contents = {".json": b'{"caption": "C"}', ".txt": b"T"}
        parts = [member(name, contents.get(name[name.rindex(".") :], name.encode())) for name in chosen]
        if rng.random() < 0.1:
            parts.insert(1, member("long", b"n" * 200 + b".jpg\0", b"L"))
        path = tmp_path / f"{turn}.tar"
        path.write_bytes(b"".join(parts) + (END if rng.random() < 0.95 else b""))
        shard = TarShard(path)
        found = samples_of(shard)
        together.append(shard._index is not None)
        with monkeypatch.context() as patch:
            patch.setattr("train.raw.tar.shard._stand_together", lambda *_: False)
            whole = TarShard(path)
        assert whole._index is None and samples_of(whole) == found, chosen
        for _ in range(2):
            kept = TarShard(path, tmp_path / "index")
            assert samples_of(kept) == found and (kept._index is None) == (shard._index is None)
    assert 50 < sum(together) < 150
    assert len(list((tmp_path / "index").iterdir())) == sum(together)


def test_small_files_are_indexed_in_memory(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert len(open_source(lines(tmp_path / "a.jsonl", {"text": "A"}), index=tmp_path / "index")) == 1
    assert not (tmp_path / "index").exists()
