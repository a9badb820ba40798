"""Folders and files that come to be whole or not at all, and whose folders are erased."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from janus_jax.io.whole.files import write_file
from janus_jax.io.whole.folders import Staging, new_folder, staged
from janus_jax.io.whole.leftovers import remove_left
from janus_jax.io.whole.ownership import MARK
from janus_jax.weights.conversion import from_torch, to_torch
from tests.weights.golden import GOLDEN

ROOT = pathlib.Path(__file__).resolve().parents[3]


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted") / "janus"
    from_torch(GOLDEN, folder)
    return folder


def write_some(folder: pathlib.Path, text: str = "new") -> None:
    (folder / "config.json").write_text(text)


# ---------------------------------------------------------------- whose folder it is


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    for overwrite in (False, True):
        out = tmp_path / f"out{overwrite}"
        refused = pytest.raises(ValueError, match=r"was created by another process|is not a checkpoint folder")
        with refused, staged(out, overwrite=overwrite) as folder:
            write_some(folder)
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")
        assert (out / "thesis.tex").read_text() == "years of work"
    assert names(tmp_path) == {"outFalse", "outTrue"}


def test_from_torch_leaves_a_folder_that_appears_meanwhile(tmp_path, monkeypatch):
    from janus_jax.weights import conversion

    out, write_lazy = tmp_path / "out", conversion.write_lazy

    def write_and_intrude(*args):
        write_lazy(*args)
        shutil.copytree(GOLDEN, out)  # a download, say: it has a config.json, too

    monkeypatch.setattr(conversion, "write_lazy", write_and_intrude)
    with pytest.raises(ValueError, match="out was created by another process and is left as it is"):
        from_torch(GOLDEN, out)
    assert names(out) == names(GOLDEN)
    assert names(tmp_path) == {"out"}


def test_something_that_appears_within_the_swap_is_left_alone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with staged(out) as folder:
        write_some(folder, "old")
    rename = pathlib.Path.rename

    def rename_and_intrude(self, target):
        rename(self, target)
        if self.name == "out":
            out.mkdir()
            (out / "thesis.tex").touch()

    monkeypatch.setattr(pathlib.Path, "rename", rename_and_intrude)
    refused = pytest.raises(ValueError, match=r"left as it is; the folder to be replaced is in .*old")
    with refused, staged(out, overwrite=True) as folder:
        write_some(folder)
    assert names(out) == {"thesis.tex"}
    (aside,) = names(tmp_path) - {"out"}
    assert (tmp_path / aside / "config.json").read_text() == "old"


def test_only_marked_folders_are_erased(tmp_path, converted):
    download = tmp_path / "download"
    shutil.copytree(GOLDEN, download)
    before = names(download)
    with pytest.raises(ValueError, match=f"download is not overwritten: it has no {MARK}"):
        from_torch(GOLDEN, download, overwrite=True)
    for text in ("{}", "[1]", "{", '{"made_by": "janus_jax"}', '{"made_by": "me", "holds": []}'):
        (download / MARK).write_text(text)
        with pytest.raises(ValueError, match="download is not overwritten: "):
            from_torch(GOLDEN, download, overwrite=True)
    assert names(download) == before | {MARK}

    ours = tmp_path / "ours"
    shutil.copytree(converted, ours)
    (ours / "notes.md").write_text("what I found out")
    with pytest.raises(ValueError, match=r"ours is not overwritten: it also has notes.md, not made by janus_jax"):
        to_torch(GOLDEN, ours, "original", overwrite=True)
    (ours / "notes.md").unlink()
    to_torch(GOLDEN, ours, "original", overwrite=True)
    assert names(ours) == {"config.json", "model.safetensors", MARK}
    assert json.loads((ours / MARK).read_text())["holds"] == ["config.json", "model.safetensors"]
    assert names(tmp_path) == {"download", "ours"}


def test_converted_folders_from_before_the_mark_may_be_overwritten(tmp_path, converted):
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    (out / MARK).unlink()
    (out / "run.py").write_text("print()")
    with pytest.raises(ValueError, match=r"out is not overwritten: it also has run.py, not made by janus_jax"):
        from_torch(GOLDEN, out, overwrite=True)
    (out / "run.py").unlink()
    from_torch(GOLDEN, out, overwrite=True)
    assert MARK in names(out)


def test_links_are_followed_and_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("disk/there", "disk/absent"):
        if not name.endswith("absent"):
            (tmp_path / name).mkdir()
        link = tmp_path / f"link-{name[5:]}"
        link.symlink_to(tmp_path / name)
        for text in ("old", "new"):
            with staged(link, overwrite=True) as folder:
                write_some(folder, text)
            assert link.is_symlink() and (tmp_path / name / "config.json").read_text() == text
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(ValueError, match="round is a link that leads nowhere"):
        Staging(tmp_path / "round")
    (tmp_path / "file").write_text("text")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    for name in ("file", "to-file"):
        with pytest.raises(ValueError, match=f"{name} already exists and is not a folder"):
            Staging(tmp_path / name, overwrite=True)
    with pytest.raises(ValueError, match="is a mount point"):
        Staging("/", overwrite=True)
    with pytest.raises(ValueError, match="null"):
        Staging("a\0b")
    assert names(tmp_path / "disk") == {"there", "absent"}


# ---------------------------------------------------------------- nothing is left behind


def test_parents_go_with_what_failed(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b" / "out") as folder:
        write_some(folder)
        raise RuntimeError
    assert names(tmp_path) == set()


def test_threads_that_still_write_do_not_bring_the_folder_back(tmp_path):
    import threading

    def write_on(folder, until):
        while time.monotonic() < until:
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (folder / f"{time.monotonic()}").touch()

    with pytest.raises(RuntimeError), staged(tmp_path / "out") as folder:
        thread = threading.Thread(target=write_on, args=(folder, time.monotonic() + 0.5))
        thread.start()
        raise RuntimeError
    thread.join()
    assert names(tmp_path) == set()


def test_what_cannot_fit_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(OSError, match=r"needs 1e[+]12 GB, but its disk has .* GB free; make room there") as caught:
        Staging(tmp_path / "a" / "out", num_bytes=10**21)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == set()


def test_a_maker_that_lives_keeps_its_folder(tmp_path):
    notes = []
    first = Staging(tmp_path / "out")
    with staged(tmp_path / "out", note=notes.append) as folder:
        write_some(folder)
    assert notes == [] and first.folder.is_dir()
    with pytest.raises(ValueError, match="was created by another process"):
        first.finish()
    first.discard()
    assert names(tmp_path) == {"out"}


SLOW = """
import runpy, sys, time
from janus_jax.weights import conversion
def stop(*_):
    print("there", flush=True)
    time.sleep(100)
conversion.copy_files = stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def begin(out: pathlib.Path, script: str = "from_torch.py", *arguments: str, prelude: str = SLOW) -> subprocess.Popen:
    command = [sys.executable, "-c", prelude, str(ROOT / "convert" / script), "--src", str(GOLDEN), "--out", str(out)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *arguments], text=True, env=environment, **pipes)


def told_by(process: subprocess.Popen) -> list[str]:
    """What the process says on standard error, but for its bar."""
    _, told = process.communicate(timeout=60)
    lines = told.replace("\r", "\n").splitlines()
    return [line for line in lines if line and not line.startswith("writing:")]


def test_a_killed_conversion_is_found_by_the_next_one(tmp_path):
    process = begin(tmp_path / "out")
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.communicate()
    (left,) = (name for name in names(tmp_path) if name.endswith(".partial"))
    (tmp_path / ".out.notes.partial").mkdir()
    notes = []
    with staged(tmp_path / "out", note=notes.append) as folder:
        write_some(folder)
    assert len(notes) == 1 and left in notes[0] and "GB), left by a killed process" in notes[0]
    assert names(tmp_path) == {"out", ".out.notes.partial"}


def test_what_a_killed_conversion_moved_aside_is_put_back(tmp_path):
    with staged(tmp_path / "out") as folder:
        write_some(folder, "old")
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.old")
    (tmp_path / ".out.0123abcd.lock").write_text(socket.gethostname())
    notes = []
    refused = pytest.raises(ValueError, match="out already exists")
    with refused, staged(tmp_path / "out", note=notes.append) as folder:
        write_some(folder)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert len(notes) == 1 and "which a killed process had moved aside" in notes[0]
    assert names(tmp_path) == {"out"}


def test_another_hosts_folder_is_left_for_an_hour(tmp_path):
    (tmp_path / ".out.0123abcd.partial").mkdir()
    file = tmp_path / ".out.0123abcd.partial" / "model.safetensors"
    file.touch()
    (tmp_path / ".out.0123abcd.lock").write_text("another")
    assert list(remove_left(tmp_path / "out")) == []
    os.utime(file, (time.time() - 4000,) * 2)
    assert len(list(remove_left(tmp_path / "out"))) == 1
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(tmp_path, number, code):
    process = begin(tmp_path / "a" / "out")
    assert process.stdout.readline() == "there\n"
    process.send_signal(number)
    assert told_by(process) == ["interrupted" if number == signal.SIGINT else "ended by SIGTERM"]
    assert process.returncode == code
    assert names(tmp_path) == set()


FULL = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,) * 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["from_torch.py", "to_torch.py"])
def test_files_that_may_not_grow_are_one_line(tmp_path, script):
    out = tmp_path / "out"
    process = begin(out, script, *(["--dialect", "original"] if script == "to_torch.py" else []), prelude=FULL)
    assert told_by(process) == [f"error: {out}: File too large; the partial output was removed"]
    assert process.returncode == 2
    assert names(tmp_path) == set()


def test_a_full_disk_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not mounted or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        with pytest.raises(OSError, match=r"needs 0.0044[0-9]* GB, but its disk has 0.0021 GB free; make room there"):
            to_torch(GOLDEN, disk / "out", "original")
        refused = pytest.raises(OSError, match="No space left on device; the partial output was removed")
        with refused, staged(disk / "out") as folder:
            (folder / "file").write_bytes(bytes(3 << 20))
        with pytest.raises(OSError, match="No space left on device"):
            write_file(disk / "drawn.png", bytes(3 << 20))
        assert names(disk) == set()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_new_folder_goes_with_what_failed(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert names(tmp_path) == set()
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "there"):
        raise RuntimeError
    with pytest.raises(RuntimeError), new_folder(tmp_path / "kept"):
        (tmp_path / "kept" / "000.png").touch()
        raise RuntimeError
    assert names(tmp_path) == {"there", "kept"}
