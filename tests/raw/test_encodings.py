"""Text in UTF-8, UTF-16 and UTF-32, with and without a byte order mark; and what is none of them."""

import codecs
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.raw.test_sources import bad, png
from train.raw import json_files
from train.raw.encodings import decode_text, encoding_of
from train.raw.sources import open_source

WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE,
         "utf-32-be": codecs.BOM_UTF32_BE, "utf-8": codecs.BOM_UTF8}  # fmt: skip
# U+0A0A and U+0D0A hold the bytes of a newline, U+4E00 and U+0100 the zero of an ASCII character.
CAPTIONS = ["a cat", "рыжая кошка", "一只猫Ā 一", "ਊਊ ഊ \U0001f408", "x\\ny"]


@pytest.mark.parametrize("codec", ["utf-8", *WIDE])
@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n \r\n\n"])
def test_json_in_every_encoding(tmp_path, codec, mark, as_list, newline):
    records = [{"image": "0.jpg", "caption": caption} for caption in CAPTIONS * 3]
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    text = f"[{','.join(texts)}]" if as_list else newline.join(texts)
    data = text.encode(codec)
    (tmp_path / "c.json").write_bytes((MARKS[codec] if mark else b"") + data)
    source = open_source(tmp_path / "c.json")
    assert [sample.caption for sample in source] == CAPTIONS * 3
    if not as_list:
        gap = newline.count("\n")
        assert [s.place.rpartition(":")[2] for s in source] == [str(1 + gap * i) for i in range(15)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1, max_size=5),
    st.sampled_from(["utf-8", *WIDE]),
)
def test_json_is_told_without_a_mark(records, codec):
    text = "\n".join(json.dumps(record, ensure_ascii=True) for record in records)
    assert decode_text(text.encode(codec)) == text
    assert encoding_of(MARKS[codec] + text.encode(codec)) == (codec, len(MARKS[codec]))


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff")))
def test_utf8_is_never_taken_for_another(text):
    assert decode_text(text.encode()) == text


def test_lines_longer_than_a_piece(tmp_path, monkeypatch):
    for size in (8, 64, 4096):
        monkeypatch.setattr(json_files, "_AT_ONCE", size)
        for codec in ("utf-8", "utf-16-be", "utf-32-le"):
            text = "\n".join(json.dumps({"text": "x" * n}) for n in (0, 1, 30, 5000, 7))
            (tmp_path / "c.jsonl").write_bytes(text.encode(codec))
            assert [len(sample.text) for sample in open_source(tmp_path / "c.jsonl")] == [0, 1, 30, 5000, 7]


def test_a_line_beyond_the_limit_is_one_bad_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE", 1000)
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": "x" * n}) for n in (1, 2000, 2)))
    source = open_source(tmp_path / "c.jsonl")
    assert [source[0].text, source[2].text] == ["x", "xx"] and bad(source, 1).reason == "too_large"


@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
def test_older_encodings_are_named(tmp_path, codec):
    good, other = json.dumps({"text": "A"}), json.dumps({"text": "é"}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_bytes(f"{good}\n{other}\n".encode(codec))
    source = open_source(tmp_path / "c.jsonl")
    assert source[0].text == "A"
    for told in (f"{tmp_path}/c.jsonl:2: bad_json", "byte 0xe9", "Windows-1252", "iconv -f windows-1252 -t utf-8"):
        assert told in str(bad(source, 1))
    (tmp_path / "c.json").write_bytes(f"[{good},{other}]".encode(codec))
    with pytest.raises(ValueError, match=r"c.json is not UTF-8 text: byte 0xe9 at .*Windows-1252"):
        open_source(tmp_path / "c.json")
    (tmp_path / "c.txt").write_bytes("é".encode(codec))
    assert "Windows-1252" in str(bad(open_source(tmp_path / "c.txt"), 0))


def test_a_wide_text_that_is_cut(tmp_path):
    (tmp_path / "c.jsonl").write_bytes('\ufeff{"text": "A"}\n{"text": "B"}'.encode("utf-16-le")[:-1])
    source = open_source(tmp_path / "c.jsonl")
    assert source[0].text == "A" and "not UTF-16-LE text" in bad(source, 1).detail


def test_plain_texts_and_names_with_marks(tmp_path):
    for codec in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("Ein Bär.".encode(codec))
        assert open_source(tmp_path / "a.txt")[0].text == "Ein Bär."
        (tmp_path / "train" / "n01").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "n01" / "a.png").write_bytes(png())
        for name, text in (("n.txt", "n01 Bär, Ursus"), ("n.json", '{"n01": "Bär"}')):
            (tmp_path / name).write_bytes(text.encode(codec))
            assert open_source(tmp_path / "train", names=tmp_path / name)[0].caption == "Bär"
    (tmp_path / "n.txt").write_bytes("n01 Bär".encode("latin-1"))
    with pytest.raises(ValueError, match=r"n.txt is not UTF-8 text: byte 0xe4 at 5"):
        open_source(tmp_path / "train", names=tmp_path / "n.txt")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is a FIFO"):
        open_source(tmp_path / "train", names=tmp_path / "fifo")


def test_marks_of_files_that_were_joined(tmp_path):
    part = '\ufeff{"text": "A"}\n'.encode()
    (tmp_path / "c.jsonl").write_bytes(part * 3)
    assert [sample.text for sample in open_source(tmp_path / "c.jsonl")] == ["A"] * 3


def test_one_record_does_not_end_a_list(tmp_path):
    (tmp_path / "a.json").write_text(f'[{{"text": "A", "id": {"9" * 5000}}}, {{"text": "B", "x": NaN}}, 3]')
    source = open_source(tmp_path / "a.json")
    assert [source[0].text, source[1].text] == ["A", "B"] and bad(source, 2).reason == "bad_json"
    # As deep as the second Python 3.13 still parses, and 3.11 does not.
    for deep in ("[" * 100_000, f'[{{"a": {"[" * 3000}{"]" * 3000}}}]'):
        (tmp_path / "a.json").write_text(deep)
        with pytest.raises(ValueError, match=r"a.json is not (usable|valid) JSON|a.json\[0\]: bad_json: .* too deep"):
            open_source(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(f'[{{"text": "A"}}, {{"a": {"[" * 300}{"]" * 300}}}]')
    source = open_source(tmp_path / "a.json")
    assert source[0].text == "A" and bad(source, 1).reason == "bad_json"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "A"}}\n{{"text": {"9" * 5000}}}\n{{"a": {"[" * 3000}{"]" * 3000}}}\n')
    source = open_source(tmp_path / "a.jsonl")
    assert source[0].text == "A" and [bad(source, i).reason for i in (1, 2)] == ["bad_json"] * 2


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\0", b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"])
def test_compressed_files_are_refused_for_what_they_are(tmp_path, start):
    for name in ("a.jsonl", "a.json", "a.txt", "a.tar", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(start + b"x" * 20)
        with pytest.raises(ValueError, match=f"{name} is compressed"):
            open_source(tmp_path / name)
