"""Many parquet files: memory and handles stay bounded, and the machine's errors are not the rows' damage."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.handles import open_in
from train.raw import parquet, storage
from train.raw.parquet import Parquet
from train.raw.readers import BadSample

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FILES, ROWS, GROUP, SIZE = 30, 40, 10, 20_000


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(FILES):
        images = [bytes([number]) + rng.bytes(SIZE) for _ in range(ROWS)]
        table = pa.table({"image": pa.array(images, pa.binary()), "caption": [f"{number}/{i}" for i in range(ROWS)]})
        pq.write_table(table, tmp_path / f"{number:02d}.parquet", row_group_size=GROUP, compression=None)
    return sorted(tmp_path.iterdir())


@pytest.fixture
def held(monkeypatch):
    made = parquet._Held()
    monkeypatch.setattr(parquet, "_held", made)
    monkeypatch.setattr(parquet, "_GROUPS_BYTES", 3 * GROUP * SIZE)
    return made


def test_reading_many_files_holds_few(paths, held):
    readers, allocated = [Parquet(path) for path in paths], []
    assert 1 <= open_in(paths[0].parent, ".parquet") <= parquet._FILES
    for number, reader in enumerate(readers):
        for index in range(len(reader)):
            place, row = reader[index]
            assert (row["image"][0], row["caption"]) == (number, f"{number}/{index}")
            assert place == f"{paths[number]} row {index}"
        allocated.append(pa.total_allocated_bytes())
    # Arrow frees a group when its last reader lets go of it, so that one or two more may be there for a moment.
    assert max(allocated[-5:]) <= max(allocated[:5]) + 2 * GROUP * SIZE < FILES * ROWS * SIZE / 4, "flat"
    assert 1 <= open_in(paths[0].parent, ".parquet") <= parquet._FILES


def test_threads_share_readers(paths, held):
    readers, barrier = [Parquet(path) for path in paths], threading.Barrier(6)

    def read(seed: int):
        barrier.wait()
        for number, index in np.random.default_rng(seed).integers((FILES, ROWS), size=(100, 2)):
            assert readers[number][int(index)][1]["caption"] == f"{number}/{index}"

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(), "arrow"])
def test_errors_of_the_machine_are_no_damage(paths, held, monkeypatch, error):
    reader = Parquet(paths[0])

    def failing(path):
        raise pa.ArrowMemoryError("malloc of size 64 failed") if error == "arrow" else error

    monkeypatch.setattr(held, "file", failing)
    monkeypatch.setattr(storage, "WAITS", (0,))
    with pytest.raises((OSError, MemoryError)) as caught:
        reader[0]
    assert not isinstance(caught.value, BadSample)
    with pytest.raises(OSError):
        storage.patiently(lambda: reader[0])


def test_a_damaged_row_group_is(paths, held):
    raw = bytearray(paths[0].read_bytes())
    raw[4:100] = bytes(96)
    paths[0].write_bytes(raw)
    with pytest.raises(BadSample, match="row group 0 is damaged"):
        Parquet(paths[0])[0]
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        paths[1].write_bytes(b"no parquet")
        Parquet(paths[1])
