"""One run writes to a workdir: a second start is refused, a dead run's lease lapses."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from examples.tiny.run import tiny_config
from train.run import faults, lease
from train.run.checkpoints import Workdir
from train.run.lease import FILE, Lease

ROOT = pathlib.Path(__file__).resolve().parents[2]
ABSENT = dict.fromkeys(("understanding", "text", "generation", "tokenizer"), "absent")


@pytest.fixture
def soon(monkeypatch):
    """Renewals and lapses within a test's patience."""
    monkeypatch.setattr(lease, "RENEW", 0.05)
    monkeypatch.setattr(lease, "LAPSE", 0.5)


def elsewhere(folder: pathlib.Path, **changes):
    """Makes the lease in `folder` one of another machine."""
    path = folder / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another", "host": "host-7"} | changes))


def held_by_another_process(folder: pathlib.Path) -> subprocess.Popen:
    program = (
        "import pathlib, sys, time\n"
        "from train.run.lease import Lease\n"
        "print(Lease(pathlib.Path(sys.argv[1])).acquire(), flush=True)\n"
        "time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "\n"
    return process


def test_a_living_one_refuses_and_a_killed_one_does_not(tmp_path):
    process = held_by_another_process(tmp_path)
    before = (tmp_path / FILE).read_text()
    try:
        with pytest.raises(ValueError, match=rf"in use by another start \(process {process.pid} on .*--steal"):
            Lease(tmp_path).acquire()
        assert (tmp_path / FILE).read_text() == before
    finally:
        process.kill()
    # Nobody has asked for its end yet: it is a zombie. That must not delay the next start.
    time.sleep(0.2)
    ours = Lease(tmp_path)
    assert ours.acquire() == "" and ours.held
    process.wait()
    ours.release()
    assert not list(tmp_path.iterdir())


def test_another_process_of_the_same_number(tmp_path):
    assert Lease(tmp_path).acquire() == ""
    with pytest.raises(ValueError, match="is in use"):
        Lease(tmp_path).acquire()
    path = tmp_path / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))
    assert Lease(tmp_path).acquire() == ""


def test_on_another_machine_it_lapses(tmp_path, soon):
    Lease(tmp_path)._create()
    elsewhere(tmp_path)
    ours = Lease(tmp_path)
    began = time.monotonic()
    told = ours.acquire()
    assert "is held by another start (process" in told and "on host-7)" in told and "waits until then" in told
    while told := ours.acquire():
        time.sleep(0.05)
    assert 0.5 < time.monotonic() - began < 5 and ours.held
    ours.release()


def test_on_another_machine_it_is_renewed(tmp_path, soon):
    Lease(tmp_path)._create()
    elsewhere(tmp_path)
    ours = Lease(tmp_path)
    assert ours.acquire()
    elsewhere(tmp_path, renewed=1)
    with pytest.raises(ValueError, match=r"is in use by another start \(process \d+ on host-7\)"):
        ours.acquire()


def test_a_stolen_one_is_found_out(tmp_path, soon):
    first, second = Lease(tmp_path), Lease(tmp_path)
    assert first.acquire() == ""
    first.check()
    assert second.acquire(steal=True) == ""
    with pytest.raises(faults.Stopped, match="was taken over by another start") as stopped:
        first.check()
    assert stopped.value.code == faults.STOPPED
    time.sleep(0.3)  # renewals of both
    second.check()
    first.release()
    second.check()
    assert second._count > 0
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": 3}', '{"machine": 5, "pid": "x"}'])
def test_what_is_no_lease_lapses(tmp_path, soon, text):
    (tmp_path / FILE).write_text(text)
    ours = Lease(tmp_path)
    assert ours.acquire()
    time.sleep(0.6)
    assert ours.acquire() == ""
    ours.release()


def test_of_many_starts_at_once_one_gets_it(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for earlier in (None, dead.pid):
        if earlier:
            (tmp_path / FILE).write_text(json.dumps({"machine": lease._machine(), "pid": earlier, "started": "1"}))
        starts = [Lease(tmp_path) for _ in range(8)]

        def start(one: Lease) -> bool:
            try:
                return one.acquire() == ""
            except ValueError:
                return False

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            got = list(pool.map(start, starts))
        assert sum(one.held for one in starts) == 1, got
        for one in starts:
            one.release()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- of a workdir


def test_a_second_start_deletes_nothing(tmp_path):
    config = tiny_config(ABSENT, tmp_path / "run")
    with Workdir(config, {}):
        writing = tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp"
        time.sleep(1)  # orbax clears away what is left of earlier starts in a thread
        writing.mkdir()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"run is in use by another start .*--steal") as refused:
            Workdir(config, {})
        assert "\n" not in str(refused.value) and sorted(tmp_path.rglob("*")) == before
        with Workdir(config, {}, steal=True) as second:
            second.check()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "run.json"]


def test_nothing_is_written_without_the_lease(tmp_path):
    config = tiny_config(ABSENT, tmp_path / "run")
    with Workdir(config, {}) as first, Workdir(config, {}, steal=True):
        before = sorted(tmp_path.rglob("*"))
        for write in (
            lambda: first.save(1, None),
            lambda: first.save_frozen({"a": 1}),
            lambda: first.export(1, {}, {}),
            first.check,
        ):
            with pytest.raises(faults.Stopped, match="was taken over by another start"):
                write()
        first.note_damaged(1, ["a sample"])
        assert sorted(tmp_path.rglob("*")) == before


def test_a_start_that_is_refused_gives_it_back(tmp_path, monkeypatch):
    config = tiny_config(ABSENT, tmp_path / "run")

    def fail(self):
        raise ValueError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "_open", lambda self, run: fail(self))
        with pytest.raises(ValueError, match="not today"):
            Workdir(config, {})
    assert not list((tmp_path / "run").iterdir())
    with Workdir(config, {}) as workdir:
        assert workdir.latest is None


def test_a_start_waits_for_the_lapse(tmp_path, soon, monkeypatch, capsys):
    monkeypatch.setattr("train.run.checkpoints._ASK_AGAIN", 0.05)
    config = tiny_config(ABSENT, tmp_path / "run")
    (tmp_path / "run").mkdir()
    Lease(tmp_path / "run")._create()
    elsewhere(tmp_path / "run")
    with Workdir(config, {}):
        pass
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith("waiting: ") and "host-7" in told[0]
