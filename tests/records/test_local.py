"""Reading many shards with few handles, and what the machine's errors are taken for."""

import errno
import gc
import io
import json
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from examples.tiny.run import MODEL
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import ImageSettings, open_image
from tests.handles import open_in
from train.config import DataConfig
from train.data.batches import Assembler, load_batches
from train.data.mixture import Mixture
from train.data.prepared import FORMAT_VERSION, open_prepared
from train.data.samples import Sample
from train.prepare import prepare
from train.raw import storage
from train.raw.sources import RawSample
from train.records import local as records
from train.records.bags import ENDING, BagReader, BagWriter
from train.records.local import ArrayRecordReader, Records
from train.run.faults import STORAGE, Stopped
from train.run.flow import next_batch

PER_SHARD = 2


OLD = ".array_record"  # of folders prepared before version 3


def data_file(shard: int, ending: str = ENDING) -> str:
    return f"data-{shard:05d}{ending}"


def write_shards(folder: pathlib.Path, shards: int, ending: str = ENDING) -> pathlib.Path:
    """A prepared folder of `shards` shards of two texts each: one file by many names."""
    folder.mkdir()
    path = folder / data_file(0, ending)
    writer = BagWriter(path) if ending == ENDING else ArrayRecordWriter(str(path), "group_size:1")
    for i in range(PER_SHARD):
        writer.write(Sample("text", np.arange(1, 9 + i, dtype=np.int32), np.ones(8 + i, bool)).to_bytes())
    writer.close()
    size = path.stat().st_size
    for shard in range(1, shards):
        os.link(path, folder / data_file(shard, ending))
    lengths = np.tile(np.arange(7, 7 + PER_SHARD, dtype=np.int32), shards)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "images.npy", np.zeros_like(lengths))
    files = [{"file": data_file(i, ending), "samples": PER_SHARD, "bytes": size, "sha256": ""} for i in range(shards)]
    meta = {
        "version": FORMAT_VERSION if ending == ENDING else 2,
        "kind": "text",
        "finished": True,
        "shards": files,
        "settings": {},
    }
    (folder / "prepared.json").write_text(json.dumps(meta))
    return folder


def assembler(folder: pathlib.Path, rows: int) -> Assembler:
    data = DataConfig(text=(str(folder),), ratio=(0, 1, 0), context=64, images_per_row=0)
    return Assembler(Mixture(data, rows, seed=0), ImageSettings(image_size=32), pad_id=0, placeholder_id=-1)


def epoch(folder: str, rows: int) -> None:
    """Assembles batches until every sample was in one; prints what it met."""
    made = assembler(pathlib.Path(folder), rows)
    total, seen, problems, most, step = len(made.mixture.folders[0]), set(), [], 0, 0
    while len(seen) < total:
        _, report = made(step)
        problems += report["problems"]
        seen |= {item.index for row in made.mixture.plan(step).rows for item in row}
        most = max(most, len(os.listdir("/proc/self/fd")))
        step += 1
    print(json.dumps({"samples": len(seen), "problems": problems[:3], "steps": step, "handles": most}))


def run_epoch(folder: pathlib.Path, handles: int, rows: int) -> dict:
    code = "import sys; from tests.records.test_local import epoch; epoch(sys.argv[1], int(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(rows)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles)),
        capture_output=True, text=True, timeout=500, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("shards", "handles", "rows"), [(400, 128, 16), pytest.param(12_000, 1024, 256, marks=pytest.mark.slow)]
)
def test_an_epoch_over_more_shards_than_handles(tmp_path, shards, handles, rows):
    found = run_epoch(write_shards(tmp_path / "data", shards), handles, rows)
    assert found["problems"] == [] and found["samples"] == PER_SHARD * shards
    assert found["handles"] <= handles


@pytest.fixture(params=[ENDING, OLD])
def ending(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path, ending) -> pathlib.Path:
    return write_shards(tmp_path / "data", 12, ending)


@pytest.fixture
def few(monkeypatch) -> records.OpenFiles:
    """At most three readers, and no waiting between tries."""
    opened = records.OpenFiles(3, records._reader)
    monkeypatch.setattr(records, "_open", opened)
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    return opened


def test_readers_are_let_go_and_shared_by_threads(folder, few, ending):
    data = open_prepared(folder)
    expected = [data[i % PER_SHARD].ids.tolist() for i in range(len(data))]
    barrier, most = threading.Barrier(8), []

    def read(thread: int):
        order = np.random.default_rng(thread).permutation(np.repeat(np.arange(len(data)), 6))
        barrier.wait()
        for index in order:
            assert data[int(index)].ids.tolist() == expected[index]
            most.append(open_in(folder, ending))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert len(few) == 3
    assert 3 <= max(most) <= 3 + 2 * 8, "held, or being opened and let go by each thread"
    gc.collect()
    assert 1 <= open_in(folder, ending) <= 3


class Failing:
    """A reader whose first `times` reads fail as the library tells what the system said."""

    times, said = 0, ""

    def __init__(self, path, **options):
        self._reader = (BagReader if path.endswith(ENDING) else ArrayRecordReader)(path, **options)

    def read(self, positions):
        if Failing.times:
            Failing.times -= 1
            raise RuntimeError(Failing.said)
        return self._reader.read(positions)

    def __getattr__(self, name):
        return getattr(self._reader, name)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM])
def test_errors_of_the_machine_are_tried_again_and_never_damage(folder, few, monkeypatch, number):
    made = assembler(folder, 2)
    whole = made(0)
    few.clear()
    monkeypatch.setattr(records, "BagReader", Failing)
    monkeypatch.setattr(records, "ArrayRecordReader", Failing)
    Failing.said = f"pread() failed: {os.strerror(number)}; reading {folder}/data-00000.array_record"
    Failing.times = 2
    batch, report = made(0)
    assert report["problems"] == [] and not batch["damaged"].any() and Failing.times == 0
    np.testing.assert_array_equal(batch["ids"], whole[0]["ids"])

    Failing.times = 10**6
    for workers in (made, lambda step: next(load_batches(made, range(2), step, step + 1, workers=0))):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            workers(0)
        assert caught.value.errno == number and "data-00" in caught.value.filename
    Failing.times = 0
    assert made(0)[1]["problems"] == []


def test_a_shard_that_is_gone_is_no_damaged_sample(folder, few, ending):
    data = open_prepared(folder)
    (folder / data_file(5, ending)).unlink()
    with pytest.raises(FileNotFoundError, match="data-00005"):
        data[5 * PER_SHARD]
    assert data[0].kind == "text"


def test_want_of_memory_is_not_damage(folder, few, monkeypatch):
    made, tries = assembler(folder, 2), []

    def decode(self, sample):
        tries.append(1)
        if len(tries) < 3:
            raise MemoryError
        return []

    monkeypatch.setattr(Assembler, "_pixels", decode)
    assert made(0)[1]["problems"] == [] and len(tries) > 3
    monkeypatch.setattr(Assembler, "_pixels", lambda self, sample: bytearray(1 << 62))
    with pytest.raises(OSError) as caught:
        made(0)
    assert caught.value.errno == errno.ENOMEM


def test_want_of_memory_while_decoding_is_not_damage(monkeypatch):
    """Nor is it a bad picture, in preparing or in training."""

    def failing(*_):
        raise MemoryError

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    monkeypatch.setattr("janus_jax.processing.image_files._to_rgb", failing)
    with pytest.raises(OSError, match="not enough memory to decode") as caught:
        open_image(file.getvalue())
    assert storage.machine_error(caught.value)


class Unreliable(list):
    """A source whose reads fail `times` times."""

    times, error = 0, OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.png")

    def __getitem__(self, index: int) -> RawSample:
        if self.times:
            self.times -= 1
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, ""), MemoryError()])
def test_a_preparation_ends_resumably_and_drops_nothing_that_is_good(tmp_path, monkeypatch, error):
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    folder = write_tokenizer(tmp_path / "tokenizer", image_size=32, num_image_tokens=16)
    processor = Processor.from_folder(folder, MODEL)
    source = Unreliable(RawSample(f"{i}", text=f"The quick brown fox {i}.") for i in range(6))
    source.error, source.times = error, 10**6
    options = {"context": 64, "progress": False, "workers": 1, "shard_size": 2}
    with pytest.raises(OSError) as caught:
        prepare(source, tmp_path / "out", "text", processor, **options)
    assert caught.value.errno in (errno.EMFILE, errno.EIO, errno.ENOMEM)
    source.times = 2
    report = prepare(source, tmp_path / "out", "text", processor, **options)
    assert (report.kept, report.dropped, source.times) == (6, {}, 0)


def test_the_loop_ends_resumably_when_the_data_cannot_be_read(folder, few, monkeypatch):
    made = assembler(folder, 2)
    monkeypatch.setattr(records, "BagReader", Failing)
    monkeypatch.setattr(records, "ArrayRecordReader", Failing)
    Failing.said, Failing.times = os.strerror(errno.EIO), 10**6
    with pytest.raises(Stopped, match="could not be read, though they do not seem damaged") as caught:
        next_batch(load_batches(made, range(2), 0, 1, workers=0))
    Failing.times = 0
    assert caught.value.code == STORAGE and "run the same command to resume" in str(caught.value)
    assert "delete" not in str(caught.value)


def test_bags_are_bagz_files(tmp_path):
    """Records one after the other, then the end of each as 64 bits; ours begin with the CRC-32 of their content."""
    contents = [b"", b"a", bytes(range(256)) * 300]
    writer = BagWriter(tmp_path / "x.bag")
    for content in contents:
        writer.write(content)
    writer.close()
    data = (tmp_path / "x.bag").read_bytes()
    *ends, table = struct.unpack("<4Q", data[-24:] + data[-8:])
    assert table == ends[-1] == len(data) - 24 == sum(map(len, contents)) + 12
    begins = [0, *ends[:-1]]
    assert [data[b + 4 : e] for b, e in zip(begins, ends, strict=True)] == contents
    assert [data[b : b + 4] for b in begins] == [struct.pack("<I", zlib.crc32(content)) for content in contents]
    assert BagReader(tmp_path / "x.bag").read([2, 0, 1]) == [contents[2], contents[0], contents[1]]


@pytest.mark.parametrize(
    "edit",
    [
        lambda b: b[:-8], lambda b: b[:-3], lambda b: b"", lambda b: bytes(len(b)), lambda b: b[:-8] + b"\xff" * 8,
        lambda b: b[:-16] + b"\xff" * 8 + b[-8:], lambda b: b[:5] + b"\0" + b[6:],
    ],
)  # fmt: skip
def test_damaged_bags_are_told(tmp_path, edit):
    writer = BagWriter(tmp_path / "x.bag")
    writer.write(b"first record")
    writer.write(b"second record")
    writer.close()
    (tmp_path / "x.bag").write_bytes(edit((tmp_path / "x.bag").read_bytes()))
    with pytest.raises((ValueError, IndexError)) as caught:
        BagReader(tmp_path / "x.bag").read([0, 1])
    assert "\n" not in str(caught.value)


def test_index_lists_are_mapped_and_not_pickled(tmp_path):
    folder = write_shards(tmp_path / "data", 2)
    meta = json.loads((folder / "prepared.json").read_text())
    small = len(pickle.dumps(open_prepared(folder)))
    many = write_shards(tmp_path / "many", 2000)
    data = open_prepared(many)
    assert len(pickle.dumps(data)) < small + 100
    again = pickle.loads(pickle.dumps(data))
    assert isinstance(again.lengths, np.memmap) and again.lengths.dtype == np.int32 and again.fingerprint
    assert (again.fingerprint, len(again), again[3999].ids.tolist()) == (data.fingerprint, 4000, data[1].ids.tolist())
    kept = pickle.dumps(open_prepared(folder))
    (folder / "prepared.json").write_text(json.dumps(meta | {"read": 5}))
    with pytest.raises(ValueError, match="has changed since the run opened it"):
        pickle.loads(kept)


def test_records_by_place(folder, ending):
    found = Records(folder, [data_file(0, ending), data_file(1, ending)], [PER_SHARD] * 2)
    assert len(found) == found.counted() == 4
    assert found[0] == found[2] != found[1] == found[3]
    for index in (-1, 4):
        with pytest.raises(IndexError):
            found[index]
