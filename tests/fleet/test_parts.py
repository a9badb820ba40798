"""A folder prepared by several processes: their shares, the merge, and what does not fit together."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from janus_jax.io.whole import files as whole_files
from tests.data.test_prepare import OPTIONS, content, encode, run
from tests.raw.test_sources import lines
from train.data.prepared import open_prepared
from train.fleet import merge as merge_module
from train.fleet import shares
from train.fleet.merge import merge
from train.fleet.preparation import default_shard_size
from train.fleet.shares import Part, find_part, parse_part
from train.prepare import main, prepare
from train.raw.sources import open_source


def part(source, out, processor, index, count, **options):
    given = OPTIONS | {"encode": encode, "shard_size": 3, "part": Part(index, count)} | options
    return prepare(open_source(source), out, "generation", processor, **given)


@pytest.fixture
def whole(captions, processor, tmp_path):
    part(captions, tmp_path / "whole", processor, 0, 1)
    return content(tmp_path / "whole")


def test_parts_in_any_order_are_the_bytes_of_one_process(captions, processor, tmp_path, whole):
    out = tmp_path / "out"
    first = part(captions, out, processor, 2, 3)
    assert (first.read, first.kept, first.waits_for) == (6, 6, 5) and "5 shards of other parts" in str(first)
    with pytest.raises(ValueError, match=r"5 of 7 shards are missing \(0 to 1, 3 to 4, 6\)"):
        open_prepared(out)
    with pytest.raises(ValueError, match=r"out cannot be merged: 5 of its 7 shards are missing \(0 to 1, 3 to 4, 6\)"):
        merge(out)
    assert part(captions, out, processor, 0, 3).waits_for == 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.bag")}
    # Begun in three processes, ended by one of two: with shards of its own and of those.
    report = part(captions, out, processor, 1, 2, max_bad_share=0.2)
    assert report.waits_for == 1 and report.read == 9
    report = part(captions, out, processor, 0, 2)
    assert (report.read, report.kept, report.waits_for) == (20, 18, 0)
    assert content(out) == whole and len(open_prepared(out)) == 18
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    # All others, started again, find it finished.
    assert part(captions, out, processor, 2, 3) == report == merge(out)
    assert content(out) == whole


@pytest.mark.parametrize("count", [2, 4])
def test_parts_at_the_same_time(captions, processor, tmp_path, whole, count):
    """They begin and merge at the same time too; each part twice, as when one is started again too early."""
    for turn in range(3):
        start = threading.Barrier(2 * count)

        def one(index, out=tmp_path / f"out{turn}", start=start):
            start.wait()
            return part(captions, out, processor, index % count, count, workers=1, max_bad_share=0.5)

        with ThreadPoolExecutor(2 * count) as pool:
            reports = list(pool.map(one, range(2 * count)))
        assert any(report.kept == 18 and not report.waits_for for report in reports)
        assert content(tmp_path / f"out{turn}") == whole


def test_a_merge_that_another_overtakes(captions, processor, tmp_path, whole, monkeypatch):
    """The other finishes, and removes what was to be merged, after this one has read half of it."""
    out = tmp_path / "out"
    read_indices, met = merge_module.read_indices, []

    def overtaken(folder, shards, mark=""):
        for shard, index in read_indices(folder, shards, mark):
            if shard == 3 and not met:
                met.append(shard)
                assert merge(out, 0.1).kept == 18
            yield shard, index

    monkeypatch.setattr(merge_module, "read_indices", overtaken)
    assert part(captions, out, processor, 0, 1).kept == 18
    assert met and content(out) == whole


def test_a_killed_merge_is_done_again(captions, processor, tmp_path, whole, monkeypatch):
    out = tmp_path / "out"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        part(captions, out, processor, 0, 1)
    with pytest.raises(ValueError, match="or with --merge: its 7 shards are complete, but not merged"):
        open_prepared(out)
    monkeypatch.undo()
    (out / "data-00001.bag.0123.partial").write_bytes(b"left by a killed process")
    assert main(["--merge", "--out", str(out), "--max-bad-share", "0.1"]) == 0
    assert content(out) == whole


def test_storage_without_links(captions, processor, tmp_path, whole, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(whole_files.os, "link", refused)
    part(captions, tmp_path / "out", processor, 0, 1)
    assert content(tmp_path / "out") == whole


def test_bad_samples_are_judged_over_all_parts(captions, processor, tmp_path):
    assert part(captions, tmp_path / "out", processor, 0, 2, max_bad_share=0.05).waits_for
    with pytest.raises(ValueError, match=r"2 of 20 samples are bad, more than max_bad_share 0.05"):
        part(captions, tmp_path / "out", processor, 1, 2, max_bad_share=0.05)
    with pytest.raises(ValueError, match=r"2 of 20 samples are bad"):
        merge(tmp_path / "out")
    assert merge(tmp_path / "out", 0.1).kept == 18
    # A part stops by itself once it has seen enough.
    path = lines(tmp_path / "t.jsonl", *({"text": "Fine." if i % 3 else ""} for i in range(1000)))
    with pytest.raises(ValueError, match=r"of 10\d samples are bad"):
        run(path, tmp_path / "bad", processor, "text", part=Part(0, 2), shard_size=100)


def test_parts_of_other_settings_are_refused(captions, processor, tmp_path):
    out = tmp_path / "out"
    part(captions, out, processor, 0, 2)
    with pytest.raises(ValueError, match=r"out was begun with other settings \(context 100, now 90\)"):
        part(captions, out, processor, 1, 2, context=90)
    # Stores cannot tell who was first: a part may have gone on for a while.
    path = out / "data-00004.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"settings": "0123"}))
    expected = r"data-00004.bag was prepared with other settings than .*out; delete data-00004.json beside it and run"
    for attempt in (lambda: part(captions, out, processor, 0, 2), lambda: merge(out)):
        part(captions, tmp_path / "other", processor, 1, 2)
        for shard in (1, 3, 5):
            for name in (f"data-0000{shard}.bag", f"data-0000{shard}.json"):
                (out / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ValueError, match=expected):
            attempt()


def test_a_folder_begun_by_an_earlier_version(captions, processor, tmp_path, whole):
    out = tmp_path / "out"
    part(captions, out, processor, 0, 2)
    path = out / "prepared.json"
    meta = json.loads(path.read_text())
    del meta["ids"]
    path.write_text(json.dumps(meta))
    (out / "tokenizer.json").unlink()
    for index in out.glob("data-*.json"):
        found = json.loads(index.read_text())
        del found["settings"]
        index.write_text(json.dumps(found))
    part(captions, out, processor, 1, 2)
    assert content(out)["data-00002.bag"] == whole["data-00002.bag"]
    assert {**json.loads(content(out)["prepared.json"])} == json.loads(whole["prepared.json"])


@pytest.mark.parametrize(
    ("kind", "samples", "expected"),
    [
        ("generation", 20, 8192),
        ("generation", 2_000_000, 8192),
        ("generation", 10_000_000, 39_062),
        # 2.6 KB each: 0.7 GB.
        ("generation", 160_000_000, 262_144),
        ("text", 160_000_000, 65_536),
        ("understanding", 160_000_000, 8192),
    ],
)
def test_shards_of_large_sources_are_large(kind, samples, expected):
    assert default_shard_size(kind, samples) == expected


# ---------------------------------------------------------------- shares


def test_shares_are_disjoint_and_cover_all():
    for count in range(1, 9):
        assert sorted(shard for index in range(count) for shard in Part(index, count).of(7)) == list(range(7))


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "n[0-3]"}
ARRAY = {f"SLURM_ARRAY_TASK_{k}": v for k, v in zip(("ID", "MIN", "MAX", "STEP", "COUNT"), "61925", strict=True)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        (SLURM, (3, 16)),
        # A batch script, or a shell in an allocation, is one process.
        (SLURM | {"SLURM_STEP_NODELIST": None}, (0, 1)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "5"}, (2, 5)),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "5"} | SLURM, (2 * 16 + 3, 80)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c"}, (2, 3)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1)),
    ],
)
def test_the_share_that_the_environment_gives(environment, expected):
    found = find_part({name: value for name, value in environment.items() if value is not None})
    assert (found.index, found.count) == expected


def test_the_share_of_a_host_of_a_tpu_slice(monkeypatch):
    monkeypatch.setattr(shares, "has_tpu", lambda: True)
    monkeypatch.setattr(shares.jax, "process_count", lambda: 8)
    monkeypatch.setattr(shares.jax, "process_index", lambda: 5)
    assert find_part({}) == Part(5, 8, "the TPU slice")


def test_shares_that_cannot_be(tmp_path, capsys):
    for text in ("4", "1/0", "a/b", "-1/4", "1/2/3"):
        with pytest.raises(ValueError, match="--part must be I/N, such as 0/4"):
            parse_part(text)
    with pytest.raises(ValueError, match="a part must be one of 0/4 to 3/4, got 4/4"):
        parse_part("4/4")
    with pytest.raises(ValueError, match="SLURM's array task 6 is not of evenly spaced ones"):
        find_part(ARRAY)
    assert main(["--merge", "--out", str(tmp_path)]) == 2
    assert main(["--out", str(tmp_path), "--kind", "text"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("has no prepared.json: nothing has been prepared there")
    assert told[1] == "error: --source and --model missing; see --help"
