"""Tar shards: their members as tarfile would tell them, what makes a sample, and headers that lie."""

import contextlib
import io
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.raw.test_sources import bad, png
from train.raw.sources import open_source
from train.raw.tar.headers import Scan
from train.raw.tar.shard import TarShard

END = bytes(1024)


def member(name: str | bytes, content: bytes = b"", kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """A header with a good checksum, whatever it says, and the content in whole blocks."""
    header = bytearray(512)
    name = name.encode() if isinstance(name, str) else name
    header[: len(name)] = name
    header[100:108], header[156:157], header[257:265] = b"0000644\0", kind, b"ustar\x0000"
    header[124:136] = b"%011o\0" % len(content) if size is None else size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**fields: str) -> bytes:
    records = b""
    for key, value in fields.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 20) if n == len(rest) + len(str(n)))
        records += str(length).encode() + rest
    return member("pax", records, b"x")


def shard(tmp_path, *parts: bytes):
    (tmp_path / "0.tar").write_bytes(b"".join(parts) + END)
    return open_source(tmp_path / "0.tar", "webdataset")


def told(source) -> list[str]:
    """Captions, or why there is none."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].caption)
        except ValueError as error:
            found.append(error.reason)
    return found


# ---------------------------------------------------------------- headers

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12)
PATHS = st.lists(NAMES | st.sampled_from(["x" * 90, "ü" * 60]), min_size=1, max_size=4).map("/".join)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(PATHS, min_size=1, max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    kinds=st.lists(st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE]), min_size=6, max_size=6),
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 3000]), min_size=6, max_size=6),
)
def test_the_scan_finds_what_tarfile_finds(tmp_path_factory, names, form, kinds, sizes):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, kind, size in zip(names, kinds, sizes, strict=False):
            info = tarfile.TarInfo(name)
            if len(name.encode()) > 100:
                kind = tarfile.REGTYPE  # tarfile takes an old type whose cut name ends with a slash for a folder
            info.type, info.size = kind, 0 if kind == tarfile.DIRTYPE else size
            with contextlib.suppress(ValueError):  # a name longer than ustar can say
                tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    scan = Scan(path)
    assert [(m.name, m.begin, m.size) for m in scan] == expected and scan.fault == ""


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (member("b.jpg", size=b"\xff" * 11 + b"\x00"), "without a usable size"),  # -256, which went on for ever
        (member("b.jpg", size=b"-0000000100\0"), "without a usable size"),
        (member("b.jpg", size=b"9999999999 \0"), "without a usable size"),
        (member("b.jpg", size=b"\x80" + b"\xff" * 11), "truncated within b.jpg"),
        (member("b.jpg", size=b"77777777777\0"), "truncated within b.jpg"),
        (member("x", size=b"77777777777\0", kind=b"x"), "an extended header of 8,589,934,591 bytes"),
        (member("x", size=b"77777777777\0", kind=b"L"), "an extended header of 8,589,934,591 bytes"),
        (member("x", b"garbage", kind=b"x"), "an extended header that cannot be read"),
        (member("x", b"99999999999999999999 path=a\n", kind=b"x"), "an extended header that cannot be read"),
        (member("x", b"0 path=a\n", kind=b"x"), "an extended header that cannot be read"),
        (pax(size="-512") + member("b.jpg"), "an extended header without a usable size"),
        (pax(size="9" * 5000) + member("b.jpg"), "an extended header without a usable size"),
        (pax(size="1_0") + member("b.jpg"), "an extended header without a usable size"),
        (member("x", b"14 path=a.txt\n", kind=b"g"), "a global header that names or measures members"),
        (bytes([7]) * 512, "no member header where one is expected"),
    ],
)
def test_headers_that_lie_end_the_tar_with_one_bad_sample(tmp_path, header, told):
    source = shard(tmp_path, member("a.jpg", png()), member("a.txt", b"A"), header)
    assert len(source) == 2 and source[0].caption == "A"
    error = bad(source, 1)
    assert error.reason == "truncated_tar" and told in error.detail


def test_sparse_and_linked_members_are_bad_samples_of_their_own(tmp_path):
    good = member("d.jpg", png()) + member("d.txt", b"D")
    old = bytearray(member("a.jpg", b"x" * 600, b"S"))
    old[482] = 1
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old[:512])
    sparse = bytes(old[:512]) + bytes(512) + bytes(old[512:])
    source = shard(
        tmp_path,
        sparse + member("a.txt", b"A"),
        pax(GNU__sparse__major="1", GNU__sparse__name="b.jpg") + member("x/b", b"y" * 600) + member("b.txt", b"B"),
        member("c.jpg", png()) + member("c.txt", kind=b"2"),
        good,
    )
    assert told(source) == ["bad_member", "bad_member", "bad_member", "D"]
    assert "sparse" in bad(source, 0).detail and "sparse" in bad(source, 1).detail and "a link" in bad(source, 2).detail


def test_deep_json_and_long_numbers_are_one_bad_sample(tmp_path):
    deep, number = b'{"caption": ' + b"[" * 100_000, b'{"caption": ' + b"9" * 5000 + b"}"
    parts = [member(f"{i}.jpg", png()) + member(f"{i}.json", text) for i, text in enumerate([deep, number])]
    source = shard(tmp_path, *parts, member("2.jpg", png()), member("2.json", b'{"caption": "C", "x": NaN}'))
    assert told(source) == ["bad_json", "bad_json", "C"]


def test_a_long_name_costs_its_own_bytes_alone(tmp_path):
    """One name of 200 KB among 30,000 members asked 22 GiB: each name took as much as the longest."""
    long = member("long", b"n" * 200_000 + b".jpg\0", b"L") + member("short.jpg", png())
    many = b"".join(member(f"{i}.jpg") for i in range(3000))
    before = time.process_time()
    source = shard(tmp_path, long, many)
    assert time.process_time() - before < 5
    reader = source._readers[0]
    assert len(source) == 3001 and reader._index._rows.nbytes == 16 * 3001
    assert bad(source, 0).detail == ".jpg: its name has 200,004 bytes" and len(bad(source, 0).place) <= 500


def test_tars_joined_end_to_end_are_read_to_the_end(tmp_path):
    one = member("0.jpg", png()) + member("0.txt", b"A") + END
    two = member("0.jpg", png()) + member("0.txt", b"B") + END + bytes(8192)
    source = shard(tmp_path, one, two)
    assert [sample.caption for sample in source] == ["A", "B"]
    assert [sample.place.rpartition("/")[2] for sample in source] == ["0", "0 (2)"]
    source = shard(tmp_path, one, b"something else")
    assert told(source) == ["A", "truncated_tar"] and "not a tar follows" in bad(source, 1).detail


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Fields of webdataset's samples, whose key ends at the first dot.
        (["0.jpg", "0.seg.png", "0.meta.json", "0.txt", "0.cls", "0.emb.npy"], ["0.txt"]),
        (["0.seg.png", "0.jpg", "0.txt"], ["0.txt"]),
        # Names with dots, as tar gives the files of a folder.
        (["v1.5.jpg", "v1.5.txt", "v1.6.jpg", "v1.6.txt"], ["v1.5.txt", "v1.6.txt"]),
        (["a.jpg", "a.txt", "a.b.jpg", "a.b.txt"], ["a.txt", "ambiguous_sample"]),
        # One key in two folders; all pictures before all texts; a key that comes again.
        (["x/0.jpg", "x/0.txt", "y/0.jpg", "y/0.txt"], ["x/0.txt", "y/0.txt"]),
        (["0.jpg", "1.jpg", "0.txt", "1.txt"], ["0.txt", "1.txt"]),
        (["0.jpg", "0.txt", "1.jpg", "1.txt", "0.txt"], ["0.txt", "1.txt", "missing_image"]),
        (["0.jpg", "0.jpg", "0.txt"], ["missing_field", "0.txt"]),
        (["0.jpg", "0.png", "0.txt"], ["ambiguous_sample"]),
        # Not samples.
        (["._0.jpg", "0.jpg", "._0.txt", ".DS_Store", "__MACOSX/._0.jpg", "__MACOSX/0.jpg", "0.txt"], ["0.txt"]),
        (["README", "notes.md", "0.jpg", "0.txt"], ["0.txt"]),
        # Pictures that nothing reads, and what is no picture.
        (["0.mp4", "0.txt", "1.jpg", "1.wav", "1.txt"], ["unsupported_media", "unsupported_media"]),
        (["0.npy", "0.txt"], ["missing_image"]),
        (["0.heic", "0.txt", "1.TIF", "1.caption"], ["0.txt", "1.caption"]),
    ],
)
def test_what_makes_a_sample(tmp_path, names, expected):
    contents = {name: png() if name.endswith(("g", "F")) else b"{}" for name in names}
    parts = [member(name, name.encode() if name.endswith(("txt", "caption")) else contents[name]) for name in names]
    source = shard(tmp_path, *parts)
    assert told(source) == expected


def test_members_of_no_sample_are_told(tmp_path):
    source = shard(tmp_path, member("0.jpg", png()), member("0.txt", b"A"), member("x.npy"), member("._y.jpg"))
    assert "1 samples; ignored: 1 files that belong to no sample, such as x.npy" in str(source)


def test_escape_sequences_in_names_stay_names(tmp_path):
    source = shard(tmp_path, member(b"\x1b[31m\n0.jpg"))
    assert "\\x1b[31m\\n0" in str(bad(source, 0)) and "\x1b" not in str(bad(source, 0))


def test_texts_in_other_encodings(tmp_path):
    texts = ["\ufeffA".encode(), "Ä".encode("utf-16"), "Ä and Ö".encode("utf-16-be"), "é".encode("latin-1")]
    source = shard(tmp_path, *(member(f"{i}.jpg", png()) + member(f"{i}.txt", t) for i, t in enumerate(texts)))
    assert told(source) == ["A", "Ä", "Ä and Ö", "bad_unicode"]
    assert "byte 0xe9 at 0" in bad(source, 3).detail and "Windows-1252" in bad(source, 3).detail


def test_compressed_tars_are_refused_for_what_they_are(tmp_path):
    for name in ("a.tar.gz", "b.tgz", "c.tar"):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("0.jpg"))
        with pytest.raises(ValueError, match=rf"{name} is compressed.*gunzip"):
            open_source(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.tar.gz").rename(tmp_path / "folder" / "a.tar.gz")
    for format in (None, "webdataset"):
        with pytest.raises(ValueError, match=r"a.tar.gz is compressed"):
            open_source(tmp_path / "folder", format)


def test_a_tar_that_shrinks_meanwhile(tmp_path):
    source = shard(tmp_path, member("0.jpg", png()), member("0.txt", b"A"))
    (tmp_path / "0.tar").write_bytes(b"")
    assert bad(source, 0).reason == "truncated_tar"
    assert len(TarShard(tmp_path / "0.tar")) == 1
