"""Training data in a store: sources, prepared folders, and batches read from them by range."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zlib

import numpy as np
import pytest

from examples.tiny.run import MODEL, encode, some_image, tiny_config, write_data
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.io import store_access
from janus_jax.io.store_cache import local_copy
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import ImageSettings
from tests import emulated_stores
from tests.stores.conftest import upload
from train.config import DataConfig
from train.data.batches import Assembler, load_batches
from train.data.mixture import Mixture
from train.data.prepared import open_prepared
from train.prepare import prepare
from train.raw.sources import open_source
from train.records.bags import content_of
from train.run.faults import STORAGE, Stopped
from train.run.flow import next_batch

OPTIONS = {"context": 128, "shard_size": 4, "batch_size": 4, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JANUS_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    size = MODEL.vision.image_size
    return Processor.from_folder(
        write_tokenizer(folder, image_size=size, num_image_tokens=MODEL.vision.num_patches), MODEL
    )


def png(seed: int) -> bytes:
    file = io.BytesIO()
    some_image(np.random.default_rng(seed)).save(file, "PNG")
    return file.getvalue()


def write_sources(folder) -> dict[str, str]:
    """Sources of every format, ten pictures each; what to open in each, by name."""
    pictures = [png(i) for i in range(10)]
    for name in ("lines/images", "table", "tars", "beside/deep", "by_name/red_cat", "by_name/dog", "rows"):
        (folder / name).mkdir(parents=True)
    captions = [f"Cat {i}. Tall." for i in range(10)]
    for i, picture in enumerate(pictures):
        (folder / f"lines/images/{i}.png").write_bytes(picture)
        (folder / f"table/{i}.png").write_bytes(picture)
        (folder / f"beside/deep/{i}.png").write_bytes(picture)
        (folder / f"beside/deep/{i}.txt").write_text(captions[i])
        (folder / f"by_name/{'dog' if i % 2 else 'red_cat'}/{i}.png").write_bytes(picture)
    records = [{"image": f"images/{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    records[3]["image"], records[4]["image"] = "../table/3.png", "images/none.png"
    (folder / "lines/a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "table/a.csv").write_text("image,caption\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(captions)))
    for half in range(2):
        with tarfile.open(folder / f"tars/{half}.tar", "w") as tar:
            for i in range(5 * half, 5 * half + 5):
                for name, data in ((f"{i}.png", pictures[i]), (f"{i}.txt", captions[i].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": picture, "path": None}, "caption": c} for picture, c in zip(pictures, captions, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows/a.parquet")
    return {name: name for name in ("lines", "table", "tars", "beside", "by_name", "rows")} | {"pattern": "tars/*.tar"}


def samples(source):
    found = []
    for index in range(len(source)):
        try:
            raw = source[index]
            images = [image if isinstance(image, bytes) else image.read_bytes() for image in raw.images]
            found.append((raw.caption, images))
        except (ValueError, OSError) as error:
            found.append(getattr(error, "reason", type(error).__name__))
    return found


def test_sources_of_every_format(store, tmp_path):
    names = write_sources(tmp_path / "data")
    folder = upload(tmp_path / "data", store[0])
    for name in names.values():
        local, there = open_source(str(tmp_path / "data" / name)), open_source(f"{folder}/{name}")
        assert {**there.description, "path": ""} == {**local.description, "path": ""}
        assert samples(there) == samples(local)
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder$"):
        open_source(f"{folder}/nothing")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_source(f"{folder}/*.jsonl")
    with pytest.raises(ValueError, match="is compressed"):
        (folder / "x.jsonl").write_bytes(b"\x1f\x8b" + bytes(20))
        open_source(f"{folder}/x.jsonl")


def content(folder):
    walk = getattr(folder, "walk", None) if not hasattr(folder, "rglob") else None
    paths = walk() if walk else [path for path in folder.rglob("*") if path.is_file()]
    found = {path.name: path.read_bytes() for path in paths}
    meta = json.loads(found.pop("prepared.json"))
    meta["settings"]["source"].pop("path")
    return found, meta


class Stopping:
    """A source that stops the preparation at sample `stop`, once."""

    def __init__(self, source, stop: int):
        self.source, self.stop, self.description = source, stop, source.description
        self.anywhere = source.anywhere

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == self.stop:
            self.stop = -1
            raise KeyboardInterrupt
        return self.source[index]


def test_prepared_in_a_store_are_the_bytes_of_a_local_disk(store, tmp_path, processor):
    write_sources(tmp_path / "data")
    folder = upload(tmp_path / "data" / "lines", store[0] / "lines")
    given = {"encode": encode, "max_bad_share": 0.5, **OPTIONS}
    prepare(open_source(folder), tmp_path / "out", "generation", processor, **given)
    out = store[0] / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(Stopping(open_source(folder), 9), out, "generation", processor, **given)
    with pytest.raises(ValueError, match="is unfinished; run the same"):
        open_prepared(out)
    report = prepare(open_source(folder), out, "generation", processor, **given)
    assert (report.read, report.kept, sum(report.dropped.values())) == (10, 8, 2)
    assert content(out) == content(tmp_path / "out")
    assert prepare(open_source(folder), out, "generation", processor, **given) == report
    ours, theirs = open_prepared(out), open_prepared(tmp_path / "out")
    again = pickle.loads(pickle.dumps(ours))
    assert len(ours) == len(again) == len(theirs) == 8
    for i in range(8):
        assert ours[i].to_bytes() == again[i].to_bytes() == theirs[i].to_bytes()
    # What is missing or damaged is named.
    path = out / "data-00001.bag"
    data = path.read_bytes()
    path.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
    with pytest.raises(ValueError, match=r"out sample 3 is damaged .the record does not match its checksum"):
        open_prepared(out)[3]
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"data-00001.bag must have .* bytes"):
        open_prepared(out)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00001.bag is missing"):
        open_prepared(out)
    (out / "prepared.json").write_text((out / "prepared.json").read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(ValueError, match="prepared by an earlier version"):
        open_prepared(out)


def test_batches_are_read_by_range_many_at_once(store, tmp_path, monkeypatch):
    made = write_data(tmp_path / "data")
    settings = ImageSettings(image_size=MODEL.vision.image_size)

    def assembler(folders) -> Assembler:
        config = tiny_config(folders, tmp_path / "run")
        return Assembler(Mixture(config.data, 8, seed=0), settings, pad_id=0, placeholder_id=1)

    kinds = ("understanding", "text", "generation")
    there = {kind: str(upload(tmp_path / "data" / kind, store[0] / kind)) for kind in kinds}
    local, remote = assembler(made), assembler(made | there)
    monkeypatch.setattr(store_access, "_last", [-100.0])
    monkeypatch.setattr(store_access, "WAITS", (0.02,) * 9)
    with emulated_stores.slow(store[1], 0.2):
        store[1].most = 0
        found = list(load_batches(remote, range(8), 0, 6, workers=0))
    # Those of a batch, and of several batches.
    assert sum(report["samples"] for _, _, report in found) > 60 and store[1].most >= 20, store[1].most
    with store[1].failing(share=0.3) as faults:
        found += load_batches(remote, range(8), 6, 9, workers=0)
    assert sum(faults.values()) > 5
    for step, batch, report in found:
        ours, told = local(step)
        assert report == told and report["problems"] == []
        for name, array in batch.items():
            np.testing.assert_array_equal(array, ours[name], err_msg=f"{name} of step {step}")


def test_a_store_that_stays_away_ends_the_run_resumably(store, tmp_path, monkeypatch):
    write_data(tmp_path / "data", count=6)
    text = str(upload(tmp_path / "data" / "text", store[0] / "text"))
    data = DataConfig(text=(text,), ratio=(0, 1, 0), context=128, images_per_row=0)
    batches = Assembler(Mixture(data, 2, seed=0), ImageSettings(image_size=32), pad_id=0, placeholder_id=1)
    monkeypatch.setattr(store_access, "WAITS", (0.01,))
    with store[1].failing(), pytest.raises(Stopped, match="the store does not answer") as caught:
        next_batch(load_batches(batches, range(2), 0, 1, workers=0))
    assert caught.value.code == STORAGE


def test_a_folder_that_may_not_be_written(store, tmp_path, processor):
    write_sources(tmp_path / "data")
    source = open_source(tmp_path / "data" / "lines")
    with store[1].failing(kinds=("403",)), pytest.raises(PermissionError, match="may not do this") as caught:
        prepare(source, store[0] / "out", "generation", processor, encode=encode, **OPTIONS)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket"):
        prepare(source, f"{str(store[0])[:5]}no-such-bucket/out", "generation", processor, encode=encode, **OPTIONS)


def test_local_copies_follow_the_object(store, tmp_path):
    path = store[0] / "x.npy"
    path.write_bytes(b"first")
    copy = local_copy(path)
    before = copy.stat()  # not the number of requests: on a busy machine some are made twice
    assert local_copy(path) == copy and copy.read_bytes() == b"first"
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.write_bytes(b"other")
    assert local_copy(path).read_bytes() == b"other" and not copy.exists()


@pytest.mark.parametrize("store", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_second_epoch_costs_no_requests_with_a_cache(store, tmp_path):
    folder, proxy = store
    write_data(tmp_path / "data", count=12)
    text = upload(tmp_path / "data" / "text", folder / "text")
    data = DataConfig(text=(str(text),), ratio=(0, 1, 0), context=128, images_per_row=0, cache=str(tmp_path / "kept"))

    def epoch() -> tuple[int, list[bytes]]:
        mixture = Mixture(data, 2, seed=0)
        (prepared,) = mixture.folders
        again = pickle.loads(pickle.dumps(prepared))  # as a worker process has it
        before = proxy.about(text)
        records = again.stored(range(len(again)))
        return proxy.about(text) - before, [content_of(record) for record in records]

    (first, records), (second, same) = epoch(), epoch()
    assert first >= len(records) == 12 and second == 0 and same == records
    # Another object of the same size under the same name.
    (shard,) = text.glob("data-*.bag")
    content = bytearray(shard.read_bytes())
    end = int(open_prepared(text).records.ends[0])
    content[end - 1] ^= 1
    content[:4] = zlib.crc32(content[4:end]).to_bytes(4, "little")
    shard.write_bytes(bytes(content))
    third, changed = epoch()
    assert third >= 12 and changed != records and changed[1:] == records[1:]
    assert epoch() == (0, changed) and len(list((tmp_path / "kept").iterdir())) == 1
