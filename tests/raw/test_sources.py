"""Every format of training data, good and bad."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from train.raw.sources import NAMES, BadSample, missing_path, open_source

LLAVA = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}],
}
CHAT = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}


def png(color=(200, 10, 10), size=(20, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def bad(source, index) -> BadSample:
    with pytest.raises(BadSample) as caught:
        source[index]
    assert "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("as_list", [True, False])
def test_llava(tmp_path, as_list):
    path = tmp_path / "data.json"
    records = [LLAVA, {"conversations": CHAT["messages"]}, LLAVA | {"image": ["a.png", "/abs/b.png"]}]
    records[1] = {"conversations": [{"from": "system", "value": "Be kind."}, *LLAVA["conversations"]]}
    if as_list:
        path.write_text(json.dumps(records))
    else:
        lines(path, *records)
    source = open_source(path, allow_outside=True)
    assert len(source) == 3 and source.description["schema"] == "llava"
    assert source[0].messages[0] == {"role": "user", "content": "<image>\nWhat is it?"}
    assert source[0].messages[1] == {"role": "assistant", "content": "A circle."}
    assert source[0].images == (tmp_path / "a.png",)
    assert source[1].messages[0]["role"] == "system" and source[1].images == ()
    assert [str(image) for image in source[2].images] == [str(tmp_path / "a.png"), "/abs/b.png"]
    assert source[2].place == (f"{path}[2]" if as_list else f"{path}:3")


def test_image_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    source = open_source(lines(tmp_path / "data.jsonl", LLAVA), images=tmp_path / "pictures")
    assert source[0].images == (tmp_path / "pictures" / "a.png",)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*pictures"):
        open_source(tmp_path / "data.jsonl", images=tmp_path / "picture")


def test_chat_takes_images_beside_and_within_messages(tmp_path):
    within = {"messages": [CHAT["messages"][0] | {"images": ["b.png"]}, CHAT["messages"][1]]}
    source = open_source(lines(tmp_path / "x.jsonl", CHAT, CHAT | {"images": ["a.png"]}, within))
    assert source.description["schema"] == "chat"
    assert [sample.images for sample in source] == [(), (tmp_path / "a.png",), (tmp_path / "b.png",)]
    assert "<image_placeholder>" in source[0].image_tags


def test_captions_and_text(tmp_path):
    captions = lines(tmp_path / "c.jsonl", {"image": "a.png", "caption": "A cat"}, {"image": "b.png", "text": "Two"})
    assert [sample.caption for sample in open_source(captions)] == ["A cat", "Two"]
    assert [sample.text for sample in open_source(lines(tmp_path / "t.jsonl", {"text": "One"}, "", {"text": "2"}))] == [
        "One",
        "2",
    ]
    (tmp_path / "book.txt").write_text("First.\n\nSecond.", encoding="utf-8")
    assert [sample.text for sample in open_source(tmp_path / "book.txt")] == ["First.\n\nSecond."]


def test_places_count_blank_lines_and_a_byte_order_mark_is_no_damage(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "One"}\r\n\r\n{"text": "Two"}')
    source = open_source(path)
    assert [sample.text for sample in source] == ["One", "Two"]
    assert source[1].place == f"{path}:3"


def test_a_folder_or_glob_of_files_is_one_source(tmp_path):
    for name in "ba":
        lines(tmp_path / f"{name}.jsonl", {"text": name}, {"text": name * 2})
    (tmp_path / ".hidden.jsonl").write_text("{}")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert [sample.text for sample in open_source(path)] == ["a", "aa", "b", "bb"]


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("llava", '{"image": ', "bad_json"),
        ("llava", "[1]", "bad_json"),
        ("llava", '{"a": "\xff"}', "missing_field"),
        ("llava", "[" * 100_000, "bad_json"),
        ("llava", {"image": "a.png"}, "missing_field"),
        ("llava", {"conversations": "hello"}, "missing_field"),
        ("llava", {"conversations": [{"from": "robot", "value": "x"}]}, "bad_turns"),
        ("llava", {"conversations": [{"from": "human", "value": None}]}, "bad_turns"),
        ("llava", {"conversations": ["hello"]}, "bad_turns"),
        ("llava", LLAVA | {"image": 5}, "missing_image"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "bad_turns"),
        ("captions", {"image": "a.png"}, "missing_field"),
        ("captions", {"image": "a.png", "caption": ["a", "b"]}, "missing_field"),
        ("captions", {"caption": "A cat"}, "missing_image"),
        ("captions", {"image": ["a.png", "b.png"], "caption": "A cat"}, "missing_image"),
        ("text", {"txt": "x"}, "missing_field"),
    ],
)
def test_bad_records_say_where_and_why(tmp_path, format, record, reason):
    path = lines(tmp_path / "data.jsonl", {"text": "x"}, record)
    error = bad(open_source(path, format), 1)
    assert error.reason == reason and error.place == f"{path}:2" and error.detail


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n{"text": "good"}\n')
    source = open_source(tmp_path / "x.jsonl")
    assert bad(source, 0).reason == "bad_json" and source[1].text == "good"
    (tmp_path / "x.txt").write_bytes(b"\xff\xfea")
    assert bad(open_source(tmp_path / "x.txt"), 0).reason == "bad_unicode"


def test_index_beyond_the_end(tmp_path):
    source = open_source(lines(tmp_path / "t.jsonl", {"text": "One"}))
    for index in (1, -1):
        with pytest.raises(IndexError):
            source[index]


# ---------------------------------------------------------------- tar


def write_tar(path, members) -> list[int]:
    """Writes name: bytes, and returns where each member's header begins."""
    begins = []
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            begins.append(tar.offset)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return begins


@pytest.fixture
def shard(tmp_path):
    members = {}
    for key in ("000", "001", "sub/a.b", "003"):
        members |= {f"{key}.png": png(), f"{key}.json": b'{"caption": "json"}', f"{key}.txt": f"text {key}".encode()}
    del members["003.txt"]
    path = tmp_path / "00000.tar"
    write_tar(path, members)
    return path, members


def test_webdataset(shard):
    path, members = shard
    source = open_source(path)
    assert source.description["format"] == "webdataset"
    assert [sample.caption for sample in source] == ["text 000", "text 001", "text sub/a.b", "json"]
    assert source[0].images == (members["000.png"],)
    assert [sample.place for sample in source][1:3] == [f"{path}/001", f"{path}/sub/a.b"]


def test_webdataset_falls_back_to_the_caption_in_json(tmp_path):
    long = "x" * 150  # a name that takes more than one header
    members = {"0.JPG": b"i", "0.json": b'{"caption": "A"}', f"{long}.webp": b"j", f"{long}.txt": "Ü".encode()}
    write_tar(tmp_path / "0.tar", members)
    assert [(s.caption, s.images) for s in open_source(tmp_path / "0.tar")] == [("A", (b"i",)), ("Ü", (b"j",))]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.txt": b"A"}, "missing_image"),
        ({"0.jpg": b"i"}, "missing_field"),
        ({"0.jpg": b"i", "0.json": b"{}"}, "missing_field"),
        ({"0.jpg": b"i", "0.json": b'{"caption": null}'}, "missing_field"),
        ({"0.jpg": b"i", "0.json": b"{"}, "bad_json"),
        ({"0.jpg": b"i", "0.json": b"[]"}, "bad_json"),
        ({"0.jpg": b"i", "0.txt": b"\xff"}, "bad_unicode"),
    ],
)
def test_bad_tar_samples(tmp_path, members, reason):
    write_tar(tmp_path / "0.tar", members)
    assert bad(open_source(tmp_path / "0.tar"), 0).reason == reason


def test_a_tar_cut_anywhere_gives_its_whole_samples_and_one_bad_one(tmp_path):
    members = {}
    for key in range(3):
        members |= {f"{key}.png": png(), f"{key}.txt": b"caption"}
    path = tmp_path / "0.tar"
    write_tar(path, members)
    content = path.read_bytes()
    for cut in range(0, content.rindex(b"caption") + 7, 211):
        path.write_bytes(content[:cut])
        source = open_source(path)
        # What follows the last byte of a caption is padding.
        whole = sum(content[:cut].count(b"caption") >= n for n in (1, 2, 3))
        assert len(source) == whole + 1, cut
        assert [source[i].place for i in range(whole)] == [f"{path}/{i}" for i in range(whole)]
        error = bad(source, whole)
        assert error.reason == "truncated_tar" and error.place == str(path)


def test_a_damaged_tar_header_is_reported(tmp_path):
    path = tmp_path / "0.tar"
    begins = write_tar(path, {"0.png": png(), "0.txt": b"A", "1.png": png(), "1.txt": b"B"})
    content = bytearray(path.read_bytes())
    content[begins[2] : begins[2] + 300] = b"\x17" * 300
    path.write_bytes(content)
    source = open_source(path)
    assert len(source) == 2 and source[0].caption == "A"
    assert "0.txt" in bad(source, 1).detail


def test_shards_of_a_folder_lie_beside_other_files(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"{shard}.jpg": b"i", f"{shard}.txt": b"A"})
    (tmp_path / "0.parquet").write_bytes(b"")
    (tmp_path / "0_stats.json").write_text("{}")
    assert [sample.place for sample in open_source(tmp_path)] == [f"{tmp_path}/{i}.tar/{i}" for i in range(2)]


# ---------------------------------------------------------------- parquet


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": png(), "path": None}, "caption": f"c{i}", "extra": i} for i in range(7)]
    rows[5]["image"] = {"bytes": None, "path": "a.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    source = open_source(tmp_path / "a.parquet")
    assert [source[i].caption for i in (6, 0, 3, 2, 5, 1, 4)] == ["c6", "c0", "c3", "c2", "c5", "c1", "c4"]
    assert source[0].images == (png(),) and source[5].images == (tmp_path / "a.png",)
    assert source[3].place == f"{tmp_path / 'a.parquet'} row 3"

    for name, row in {"llava": LLAVA, "chat": CHAT, "text": {"text": "One"}, "captions": rows[0]}.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
        for format in (None, name, "parquet"):
            sample = open_source(path, format)[0]
            assert (sample.messages is not None) == (name in ("llava", "chat"))
            assert (sample.text == "One") == (name == "text")

    pq.write_table(
        pa.table({"image": pa.array([b"x", None], pa.binary()), "caption": ["a", "b"]}), tmp_path / "n.parquet"
    )
    assert bad(open_source(tmp_path / "n.parquet"), 1).reason == "missing_image"
    pq.write_table(pa.table({"bild": [b"x"], "wort": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has the columns bild, wort; expected some of image"):
        open_source(tmp_path / "other.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"bad.parquet is not a readable parquet file"):
        open_source(tmp_path / "bad.parquet")


def test_damaged_row_groups_are_bad_samples(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": ["a" * 5000, "b" * 5000]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=1, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    source = open_source(path)
    assert bad(source, 0).reason == "bad_parquet" and source[1].text == "b" * 5000


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        open_source(tmp_path / "a.parquet")


# ---------------------------------------------------------------- folders


@pytest.fixture
def tree(tmp_path):
    for folder in ("n01", "polar_bear"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for name in ("b.JPEG", "a.png", "notes.txt", ".a.png"):
            (tmp_path / "train" / folder / name).write_bytes(png())
    return tmp_path / "train"


def test_folders(tree):
    source = open_source(tree)
    assert [sample.caption for sample in source] == ["n01", "n01", "polar bear", "polar bear"]
    assert [sample.images[0].name for sample in source] == ["a.png", "b.JPEG"] * 2
    assert source[0].images == (tree / "n01" / "a.png",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.json", '{"n01": "tench", "polar_bear": "ice bear, Ursus"}'),
        ("LOC_synset_mapping.txt", "n01 tench, Tinca tinca\npolar_bear ice bear, polar bear\n"),
    ],
)
def test_folder_names(tree, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert {sample.caption for sample in open_source(tree, names=tmp_path / name)} == {"tench", "ice bear"}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("n.json", '{"n01": "tench"}', "lack 1 of the folders in .*'polar_bear'"),
        ("n.json", "[1]", "must be an object"),
        ("n.json", "{", "not valid JSON"),
        ("n.txt", "\n", "has no names of folders"),
    ],
)
def test_bad_folder_names(tree, tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        open_source(tree, names=tmp_path / name)


# ---------------------------------------------------------------- paths and formats


def test_misspelt_paths_name_the_nearest(tmp_path):
    lines(tmp_path / "captions.jsonl", {"text": "x"})
    with pytest.raises(FileNotFoundError, match=r"caption.jsonl: .*did you mean .*captions.jsonl\?"):
        open_source(tmp_path / "caption.jsonl")
    with pytest.raises(FileNotFoundError, match=rf"did you mean {tmp_path}\?"):
        open_source(tmp_path.with_name(tmp_path.name + "x") / "captions.jsonl", "text")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_source(tmp_path / "*.tar")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "absent", "folders")
    assert "did you mean" not in str(missing_path(tmp_path / "something else"))


@pytest.mark.parametrize("format", NAMES)
def test_empty_folders_are_refused(tmp_path, format):
    for given in (None, format):
        with pytest.raises(ValueError, match="is empty"):
            open_source(tmp_path, given)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.jsonl", "")])
def test_empty_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="is empty: it has no samples"):
        open_source(tmp_path / name)


def test_formats_that_cannot_be_told(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot tell the format from its name; choose one with --format: json, csv"):
        open_source(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"has the fields foo\); choose one"):
        open_source(lines(tmp_path / "a.jsonl", {"foo": 1}))
    with pytest.raises(ValueError, match=r"a.jsonl:1: bad_json: .*choose one with --schema"):
        open_source(lines(tmp_path / "a.jsonl", "hello"))
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"a.json is not valid JSON"):
        open_source(tmp_path / "a.json")
    with pytest.raises(ValueError, match="did you mean llava"):
        open_source(tmp_path / "a.jsonl", "lava")
    with pytest.raises(ValueError, match="names are for the format folders"):
        open_source(lines(tmp_path / "a.jsonl", {"text": "x"}), names=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is not a folder of folders"):
        open_source(tmp_path / "a.jsonl", "folders")


def test_the_first_records_may_be_damaged(tmp_path):
    assert len(open_source(lines(tmp_path / "a.jsonl", "{", {"text": "x"}))) == 2


def test_random_access_by_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    source = open_source(lines(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(200))))
    order = np.random.default_rng(0).permutation(200)
    with ThreadPoolExecutor(8) as pool:
        assert [sample.text for sample in pool.map(source.__getitem__, order)] == [str(i) for i in order]
