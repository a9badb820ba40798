"""The cache of records from stores: nothing torn is served, the bound holds, and without a disk it is not there."""

import errno
import os
import pathlib
import re
import subprocess
import sys
import zlib

import pytest

from train.records import cache as module
from train.records.cache import CacheSettings, SampleCache, name_of

SHARD = name_of("gs://bucket/data/data-00000.bag", "1 4096")


def record(number: int, size: int = 3000) -> bytes:
    content = bytes([number % 251 + 1]) * size
    return zlib.crc32(content).to_bytes(4, "little") + content


def opened(folder, num_bytes: int = 1 << 30) -> SampleCache:
    cache = SampleCache(CacheSettings(str(folder), num_bytes))
    cache.use([SHARD])
    return cache


def kept_in(folder: pathlib.Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def age(folder: pathlib.Path, seconds: float):
    for path in folder.iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_what_was_kept_is_found_by_every_process(tmp_path):
    cache, one = opened(tmp_path), record(1)
    assert cache.find(SHARD, 5000, 5000 + len(one)) is None
    cache.keep(SHARD, 5000, one)
    assert cache.find(SHARD, 5000, 5000 + len(one)) == one == opened(tmp_path).find(SHARD, 5000, 5000 + len(one))
    # Neither what lies before it, a hole, nor what lies beyond the end.
    assert cache.find(SHARD, 0, 3004) is None and cache.find(SHARD, 9000, 12004) is None
    other = name_of("gs://bucket/data/data-00000.bag", "2 4096")
    assert cache.find(other, 5000, 5000 + len(one)) is None


def test_a_torn_record_is_not_served(tmp_path):
    cache, one = opened(tmp_path), record(1)
    for cut in (1, 4, 5, 1500, len(one) - 1):
        (tmp_path / SHARD).write_bytes(one[:cut])
        assert cache.find(SHARD, 0, len(one)) is None
        (tmp_path / SHARD).write_bytes(one[:cut] + bytes(len(one) - cut))
        assert cache.find(SHARD, 0, len(one)) is None
    cache.keep(SHARD, 0, one)
    assert cache.find(SHARD, 0, len(one)) == one


_WRITER = """
import sys
from tests.records.test_cache import SHARD, opened, record
cache = opened(sys.argv[1], int(sys.argv[2]))
for i in range(int(sys.argv[3]), 600):
    cache.keep(SHARD, i * 5000, record(i))
    print(i, flush=True)
"""


@pytest.mark.slow
def test_killed_and_several_processes_stay_within_the_bound(tmp_path):
    bound = 1 << 20
    command = [sys.executable, "-c", _WRITER, str(tmp_path), str(bound)]
    first = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if int(line) == 40:
            break
    first.kill()
    first.wait()
    with first.stdout:
        others = [subprocess.Popen([*command, "20"], stdout=subprocess.DEVNULL) for _ in range(2)]
        assert [other.wait() for other in others] == [0, 0]
    assert bound * 0.9 <= kept_in(tmp_path) <= bound + 2 * 8192
    cache = opened(tmp_path, bound)
    found = [cache.find(SHARD, i * 5000, i * 5000 + 3004) for i in range(600)]
    assert found[:40] == [record(i) for i in range(40)]
    assert all(each in (None, record(i)) for i, each in enumerate(found)) and found.count(None) > 300


def test_two_at_once_stay_within_the_bound(tmp_path):
    one, two = opened(tmp_path, 1 << 20), opened(tmp_path, 1 << 20)
    for i in range(300):
        one.keep(SHARD, 2 * i * 4096, record(2 * i))
        two.keep(SHARD, (2 * i + 1) * 4096, record(2 * i + 1))
    assert 0.95 * (1 << 20) <= kept_in(tmp_path) <= 1 << 20
    found = [one.find(SHARD, i * 4096, i * 4096 + 3004) for i in range(600)]
    assert found == [record(i) for i in range(found.index(None))] + [None] * found.count(None)


def test_room_is_made_from_what_nobody_uses_the_oldest_first(tmp_path):
    bound = 1 << 19
    old, older = (name_of(f"gs://bucket/other/data-0000{i}.bag", "1 1") for i in range(2))
    for name, seconds in ((older, 4000), (old, 4000), (SHARD, 4000)):
        cache = SampleCache(CacheSettings(str(tmp_path), bound))
        for i in range(40):
            cache.keep(name, i * 8192, record(i))
        age(tmp_path, seconds)
    here, begun = opened(tmp_path, bound), kept_in(tmp_path)
    for i in range(40, 60):
        here.keep(SHARD, i * 8192, record(i))
    assert kept_in(tmp_path) <= bound and begun > bound * 0.9
    assert not (tmp_path / older).exists() and (tmp_path / old).exists()
    assert all(here.find(SHARD, i * 8192, i * 8192 + 3004) == record(i) for i in range(60))
    # Its own stays although there is no room for more.
    for i in range(60, 400):
        here.keep(SHARD, i * 8192, record(i))
    assert not (tmp_path / old).exists() and kept_in(tmp_path) <= bound
    assert all(here.find(SHARD, i * 8192, i * 8192 + 3004) == record(i) for i in range(60))


def test_another_version_takes_the_place_of_the_one_before(tmp_path):
    before = opened(tmp_path)
    before.keep(SHARD, 0, record(1))
    changed = name_of("gs://bucket/data/data-00000.bag", "2 4096")
    after = SampleCache(CacheSettings(str(tmp_path), 1 << 30))
    after.use([changed])
    assert not (tmp_path / SHARD).exists() and after.find(changed, 0, 3004) is None
    # The process that still reads the former one loses what was kept, and nothing else.
    assert before.find(SHARD, 0, 3004) is None
    before.keep(SHARD, 0, record(1))
    assert before.find(SHARD, 0, 3004) == record(1)


def test_a_shard_that_another_process_removes_just_then_is_only_missed(tmp_path, monkeypatch, capsys):
    cache, one = opened(tmp_path), record(1)
    cache.keep(SHARD, 0, one)
    cache._used.clear()

    def removed(path, utime=os.utime):
        os.unlink(path)
        utime(path)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "utime", removed)
        cache.find(SHARD, 0, len(one))
    assert cache.find(SHARD, 0, len(one)) is None
    cache.keep(SHARD, 0, one)
    assert cache.find(SHARD, 0, len(one)) == one and capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["pwrite", "open"])
def test_a_full_disk_ends_the_cache_and_nothing_else(tmp_path, monkeypatch, capsys, what):
    cache = opened(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, what, full)
        for i in range(3):
            cache.keep(SHARD, i * 4000, record(i))
    assert cache.find(SHARD, 0, 3004) is None
    told = f"note: data.cache, {tmp_path}: No space left on device; samples are read from the store from now on\n"
    assert capsys.readouterr().err == told


def test_a_share_of_the_disk_is_left_to_others(tmp_path, monkeypatch, capsys):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(total=100 << 30, free=4 << 30))
    cache = opened(tmp_path, 50 << 30)
    for i in range(3):
        cache.keep(SHARD, i * 4000, record(i))
    assert not (tmp_path / SHARD).exists()
    assert capsys.readouterr().err.count("GB free, so no more samples are kept there") == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    told = re.escape("data.cache cannot be written (Not a directory); choose another folder")
    with pytest.raises(OSError, match=told) as caught:
        CacheSettings(str(tmp_path / "file" / "cache"), 1).check()
    assert caught.value.filename == str(tmp_path / "file" / "cache")
