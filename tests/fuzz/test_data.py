"""Training data of every format as anybody may have written them, through sources to token ids.

A source may be refused as a whole, with one line; of one that opens every sample is one, or a BadSample of one line.
"""

import functools
import io
import json
import os
import pathlib
import tarfile
import tempfile

from hypothesis import strategies as st

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import get_preset
from janus_jax.processing.chat import Processor
from tests.fuzz.bounded import given, mutated
from tests.raw.test_sources import png
from tests.raw.test_tars import member, pax
from train.config import PREPARED
from train.data.tokenize import SampleTokenizer
from train.raw.folders import read_names
from train.raw.sources import BadSample, open_source

PICTURE = png(size=(6, 4))
MOST = 40  # samples read of a source
CONFIG = get_preset("janus_tiny")


@functools.cache
def sample_tokenizers() -> list[SampleTokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder), image_size=CONFIG.vision.image_size)
        processor = Processor.from_folder(pathlib.Path(folder), CONFIG)
    return [SampleTokenizer(processor, kind, 400) for kind in PREPARED]


def read(path: pathlib.Path, *formats: str | None):
    """Everything that `prepare` does with a source but for writing it."""
    refused, opened = None, 0
    for format in formats:
        try:
            source = open_source(path, format)
        except (ValueError, OSError) as error:
            refused = error
            continue
        opened += 1
        said = str(source)
        assert "\n" not in said, said
        for index in range(min(len(source), MOST)):
            try:
                sample = source[index]
            except BadSample as error:
                _check(error)
                continue
            assert "\n" not in sample.place and len(sample.place) <= 600
            for tokenize in sample_tokenizers():
                try:
                    tokenize(sample)
                except BadSample as error:
                    _check(error)
    if not opened:
        raise refused


def _check(error: BadSample):
    assert str(error).isprintable() and len(str(error)) < 1200, repr(error)
    assert error.reason.isidentifier() and error.place and error.detail


# ---------------------------------------------------------------- JSON

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
RECORDS = [
    {"image": "a.png", "conversations": TURNS, "system": "Be kind."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "loss": False}]},
    {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}]},
                                       {"role": "assistant", "content": "Ho", "weight": 1}]},
    {"image": "a.png", "caption": "A cat. It sits."},
    {"file_name": "a.png", "text": "A cat"},
    {"text": "A text with `<video>` and <b>."},
    {"image": {"bytes": None, "path": "../x"}, "caption": "A", "video": None},
    {"prompt": "A cat", "chosen": "a.png", "rejected": {"bytes": None, "path": "b.png"}},
    {"caption": "A cat", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.0, "label_1": 1.0},
]  # fmt: skip
KEYS = st.sampled_from([
    "image", "images", "caption", "text", "messages", "conversations", "from", "value", "role", "content", "system",
    "loss", "weight", "type", "image_url", "url", "video", "file_name", "jpg", "tools", "index", "bytes", "path",
    "prompt", "chosen", "rejected", "jpg_1", "label_1",
])  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["a.png", "user", "gpt", "human", "assistant", "image", "<image>", "<video>", "/etc/passwd",
                       "\ud800", "../../../etc/passwd", "data:image/png;base64,AAAA", "\0", "http://x/y",
                       "/dev/zero", "fifo"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=5)
)


@st.composite
def altered(draw):
    """A record with one of its values, however deep, replaced by another."""
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    place = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys) | KEYS if isinstance(place, dict) else st.sampled_from(keys))
        inner = place.get(key) if isinstance(place, dict) else place[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            place[key] = draw(VALUES)
            return record
        place = inner


def _texts(records: list) -> list[bytes]:
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    whole = json.dumps(records, ensure_ascii=False)
    return [
        text.encode(codec, "surrogatepass") for text in (lines, whole) for codec in ("utf-8", "utf-16", "utf-32-be")
    ]


def read_json(data: bytes, folder: pathlib.Path):
    (folder / "a.png").write_bytes(PICTURE)
    os.mkfifo(folder / "fifo")
    (folder / "x.jsonl").write_bytes(data)
    read(folder / "x.jsonl", None, "llava", "chat", "text", "captions", "pairs")


@given(mutated(_texts(RECORDS) + [text for record in RECORDS for text in _texts([record])]))
def test_json_bytes(bounded, data):
    bounded(read_json, data)


@given(st.lists(altered() | VALUES, min_size=1, max_size=5).flatmap(lambda records: st.sampled_from(_texts(records))))
def test_records(bounded, data):
    bounded(read_json, data)


def read_csv(data: bytes, folder: pathlib.Path):
    (folder / "a.png").write_bytes(PICTURE)
    (folder / "x.csv").write_bytes(data)
    read(folder / "x.csv", None, "captions")


TABLE = 'image,caption,images\r\na.png,"A ""cat"", one\ntwo","[""a.png""]"\r\n\r\nb.png,Bär,\r\n'


@given(mutated([TABLE.encode(codec) for codec in ("utf-8", "utf-16", "utf-32-le", "cp1252")]) | st.binary(max_size=200))
def test_tables(bounded, data):
    bounded(read_csv, data)


# ---------------------------------------------------------------- texts and names


def read_text(data: bytes, folder: pathlib.Path):
    (folder / "x.txt").write_bytes(data)
    read(folder / "x.txt", None)


def read_folder_names(data: bytes, folder: pathlib.Path):
    for name in ("names.txt", "names.json"):
        (folder / name).write_bytes(data)
        try:
            read_names(folder / name)
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)


PLAIN = "Ein Bär. \n<image> {}"


@given(
    mutated([PLAIN.encode(codec) for codec in ("utf-8", "utf-16", "utf-32-le", "cp1252")] + [("熊" * 40).encode("gbk")])
    | st.binary(max_size=200)
)
def test_texts(bounded, data):
    bounded(read_text, data)


@given(mutated([b"n01 tench, Tinca tinca\nn02 goldfish\n", '{"n01": "Bär", "n02": "b"}'.encode("utf-16"), b"[" * 5000]))
def test_names(bounded, data):
    assert bounded(read_folder_names, data) == ""


# ---------------------------------------------------------------- tars


def _tar(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in (
            ("0.png", PICTURE),
            ("0.txt", b"A cat"),
            ("ü/" + "x" * 60 + "/" + "y" * 60 + ".json", b'{"caption": "B"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()[:4096]


def read_tar(data: bytes, folder: pathlib.Path):
    (folder / "0.tar").write_bytes(data)
    read(folder / "0.tar", "webdataset")


NAMES = st.sampled_from(
    ["0.png", "0.txt", "0.json", "0.a.png", "a/0.png", "._0.png", "0.mp4", "0", "", "/", "x\x1b.png"]
)
SIZES = st.none() | st.binary(min_size=12, max_size=12) | st.sampled_from(
    [b"\xff" * 12, b"\x80" + bytes(11), b"\x80" + b"\xff" * 11, b"-0000000001\0", b"77777777777\0", b"00000000000\0"]
)  # fmt: skip
MEMBERS = st.builds(
    member,
    NAMES,
    st.binary(max_size=40) | st.sampled_from([PICTURE, b'{"caption": "A"}', b"[" * 3000, b"0 path=\n", b"9 path=a\n"]),
    st.sampled_from([bytes([kind]) for kind in b"0001234567xgLKSDXMV\0"]),
    SIZES,
)
EXTRA = st.builds(
    pax,
    path=st.text(max_size=300) | NAMES,
    size=st.sampled_from(["0", "5", "-1", "99999999999999999999", "1e3", "\u0661"]),
)


@given(mutated([_tar(tarfile.USTAR_FORMAT), _tar(tarfile.GNU_FORMAT), _tar(tarfile.PAX_FORMAT)]))
def test_tar_bytes(bounded, data):
    bounded(read_tar, data)


@given(st.lists(MEMBERS | EXTRA | st.just(bytes(512)) | st.binary(max_size=600), max_size=8).map(b"".join))
def test_tar_members(bounded, data):
    bounded(read_tar, data + bytes(1024))


# ---------------------------------------------------------------- folders


def read_folder(data: bytes, folder: pathlib.Path):
    root = folder / "data"
    root.mkdir()
    for name, content in json.loads(data):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        if content == "fifo":
            os.mkfifo(path)
        elif content == "link":
            path.symlink_to("/etc/passwd")
        elif content == "folder":
            path.mkdir()
        else:
            path.write_bytes(PICTURE if content == "picture" else content.encode("utf-8", "surrogatepass"))
    read(root, None, "folders", "sidecar", "text", "captions", "webdataset")


FILES = st.builds(
    lambda folder, stem, suffix: folder + stem + suffix,
    st.sampled_from(["", "cat/", "00000/", "__MACOSX/", ".git/"]),
    st.sampled_from(["a", "b", "0", "._a", "a.b", "metadata", "\x1b[1m", "x" * 200]),
    st.sampled_from(
        [".png", ".jpg", ".txt", ".json", ".jsonl", ".tif", ".heic", ".svg", ".tar", ".tar.gz", ".csv", ".mp4"]
    ),
)
CONTENTS = st.sampled_from(
    ["picture", "fifo", "link", "folder", "A cat", "", '{"caption": "A"}', "[]", "\ud800", "<img>"]
)


@given(st.dictionaries(FILES, CONTENTS, max_size=8).map(lambda files: json.dumps(list(files.items())).encode()))
def test_folders(bounded, data):
    bounded(read_folder, data)


# ---------------------------------------------------------------- parquet


def _parquet(columns: dict) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file.getvalue()


SEEDS = [
    _parquet({"text": ["A cat", "B"] * 3}),
    _parquet({"jpg": [PICTURE, None], "caption": ["A", None], "video": [None, "a.mp4"]}),
    _parquet({"messages": [RECORDS[1]["messages"]] * 2, "system": ["A", None]}),
    _parquet({"image": [{"bytes": PICTURE, "path": "a.png"}], "caption": ["A"]}),
]


def read_parquet(data: bytes, folder: pathlib.Path):
    (folder / "0.parquet").write_bytes(data)
    read(folder / "0.parquet", None, "captions", "pairs")


@given(mutated(SEEDS, edits=3))
def test_parquet(bounded, data):
    bounded(read_parquet, data)
