"""A run's workdir in a store: who may write to it, what is complete in it, and what a killed start leaves."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import janus_jax
from examples.tiny.run import MODEL, random_params, tiny_config
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.io import store_access
from janus_jax.io.stores import StorePath
from janus_jax.weights import checkpoint, store_arrays
from janus_jax.weights.torch_weights import read_now
from train.run import distributed, faults, lease
from train.run.checkpoints import Workdir
from train.run.distributed import together
from train.run.lease import FILE
from train.run.metrics import Metrics, read_metrics
from train.step.earlier import complete_steps
from train.step.leaves import split
from train.step.state import TrainState
from train.watch.dry_run import Findings, _workdir
from train.workdir import in_store
from train.workdir.mirror import Mirror
from train.workdir.store_lease import StoreLease

ABSENT = dict.fromkeys(("understanding", "text", "generation", "tokenizer"), "absent")


@pytest.fixture
def soon(monkeypatch):
    """Renewals and lapses within a test's patience."""
    monkeypatch.setattr(lease, "RENEW", 0.05)
    monkeypatch.setattr(lease, "LAPSE", 0.5)


# ---------------------------------------------------------------- the lease


def elsewhere(folder: StorePath, **changes):
    """Makes the lease in `folder` one of another machine."""
    path = folder / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another", "host": "host-7"} | changes))


def test_one_start_holds_the_lease(store, soon):
    folder, _ = store
    first, second = StoreLease(folder), StoreLease(folder)
    assert first.acquire() == "" and first.held
    with pytest.raises(ValueError, match=r"is in use by another start \(process \d+ on .*--steal"):
        second.acquire()
    time.sleep(0.3)
    assert json.loads((folder / FILE).read_text())["renewed"] > 0
    assert second.acquire(steal=True) == ""
    with pytest.raises(faults.Stopped, match="was taken over by another start"):
        first.check(fresh=True)
    time.sleep(0.2)  # renewals of both
    first.release()
    second.check(fresh=True)
    second.release()
    assert not folder.exists()


def test_a_lease_of_another_machine_lapses_unless_it_is_renewed(store, soon):
    folder, _ = store
    StoreLease(folder)._create()
    elsewhere(folder)
    ours, began = StoreLease(folder), time.monotonic()
    assert "on host-7)" in ours.acquire()
    elsewhere(folder, renewed=1)
    with pytest.raises(ValueError, match=r"is in use by another start \(process \d+ on host-7\)"):
        ours.acquire()
    ours = StoreLease(folder)
    while ours.acquire():
        time.sleep(0.05)
    assert 0.5 < time.monotonic() - began < 10 and ours.held
    ours.release()
    (folder / FILE).write_text("[]")  # no lease: it lapses too
    assert "is held by another start; it lapses" in StoreLease(folder).acquire()


def test_of_many_starts_at_once_one_gets_the_lease(store):
    folder, _ = store
    for earlier in (None, {"machine": lease._machine(), "pid": 2**22 + 1, "started": "1"}):
        if earlier:
            (folder / FILE).write_text(json.dumps(earlier))
        starts = [StoreLease(folder) for _ in range(6)]

        def start(one: StoreLease) -> bool:
            try:
                return one.acquire() == ""
            except ValueError:
                return False

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            got = list(pool.map(start, starts))
        for one in starts:
            if one._held:
                one._ask()
        assert sum(one.held for one in starts) == 1, got
        for one in starts:
            one.release()
    assert not folder.exists()


def test_an_answer_that_is_lost_does_not_lose_the_lease(store, monkeypatch):
    """The write is done, and tried again, and then fails because the object has changed."""
    folder, _ = store
    ours = StoreLease(folder)
    real = store_access.write_if
    monkeypatch.setattr("train.workdir.store_lease.write_if", lambda *given: real(*given) and None)
    assert ours._create() and ours._renew_now()
    monkeypatch.undo()
    assert ours._renew_now()


# ---------------------------------------------------------------- arrays


def test_shards_are_written_apart_and_read_on_other_devices(store):
    folder, _ = store
    devices = np.array(jax.devices()[:8])
    two, one = (jax.sharding.Mesh(devices.reshape(shape), ("a", "b")) for shape in ((4, 2), (2, 4)))
    tree = {
        "x": jnp.arange(8 * 12, dtype=jnp.float32).reshape(8, 12),
        "rest": [jnp.int32(3), jnp.arange(4, dtype=jnp.bfloat16), jnp.zeros((4, 4), jnp.int8)],
    }
    specs = {"x": ("a", "b"), "rest": [(), (), ("b",)]}

    def on(mesh, tree):
        def place(x, spec):
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

        return {"x": place(tree["x"], specs["x"]), "rest": list(map(place, tree["rest"], specs["rest"]))}

    store_arrays.write_tree(folder, on(two, tree), describe=True)
    chunks = [path.relative_to(folder).as_posix() for path in folder.walk()]
    assert len([name for name in chunks if name.startswith("x/c/")]) == 8
    assert {"rest.0/zarr.json", "rest.0/c", "rest.1/c/0", "rest.2/c/1/0"} <= set(chunks)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), on(one, tree))
    found = store_arrays.read_tree(folder, abstract)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(on(one, tree)), strict=True):
        assert ours.sharding == wanted.sharding and ours.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))
    # The readers of checkpoints read them too, and what is damaged or missing is told.
    path = folder / "x/c/0/0"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(OSError, match=r"crc32c|[Cc]hecksum|digest"):
        store_arrays.read_tree(folder, abstract)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        store_arrays.read_tree(folder, abstract)
    with pytest.raises(ValueError, match=r"x is float32\[8, 12\], not float32\[8, 6\]"):
        wrong = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=abstract["x"].sharding)
        store_arrays.read_tree(folder, abstract | {"x": wrong})


def test_chunks_lie_within_shards(monkeypatch):
    monkeypatch.setattr(store_arrays, "_CHUNK_BYTES", 64)
    assert store_arrays.chunk_shape((4, 4), (4, 4), 4) == (4, 4)
    assert store_arrays.chunk_shape((5, 16), (5, 4), 4) == (3, 4)  # the whole axis may be cut anywhere
    assert store_arrays.chunk_shape((12, 16), (6, 8), 4) == (1, 8)  # others into equal parts
    assert store_arrays.chunk_shape((22, 2), (11, 2), 8) == (11, 1)  # and if there are none, along the next axis
    assert store_arrays.chunk_shape((), (), 4) == ()


# ---------------------------------------------------------------- the workdir


def state_of(config, seed: int) -> tuple[TrainState, dict]:
    trained, frozen = split(jax.tree.map(jnp.asarray, random_params(MODEL, seed)), config.stage)
    trained = {name: trained[name] for name in ("aligner", "gen_head")}
    moments = [{"mu": jax.tree.map(lambda x: 2 * x, trained), "count": jnp.int32(seed)}]
    return TrainState(jnp.int32(seed), trained, moments, jnp.int32(0)), {
        "gen_aligner": frozen["gen_vision_model"]["post_quant_conv"]
    }


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def report(workdir: Workdir, step: int, first: int = 0) -> None:
    with Metrics(workdir.local, 8, first, writers=("jsonl",), shared=workdir.folder) as metrics:
        metrics.write(step, {"loss": step})


def test_a_killed_start_leaves_its_last_complete_checkpoint(store, monkeypatch):
    folder, _ = store
    config = tiny_config(ABSENT, folder / "run", keep=2)
    state, frozen = state_of(config, 2)
    first = Workdir(config, {"a": "b"})
    assert first.latest is None and first.local != first.folder
    first.save_frozen(frozen)
    for step in (2, 4, 6):
        report(first, step, step - 1)
        first.save(step, dataclasses.replace(state, step=jnp.int32(step)))
    first.wait()
    first.note_damaged(6, ["a sample"])
    assert complete_steps(folder / "run") == [4, 6] and first.latest == 6
    # Killed while it saves: neither that checkpoint nor the metrics after the last one count.
    with monkeypatch.context() as patch:
        patch.setattr(in_store.StoreCheckpoints, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "killed")))
        report(first, 8, 6)
        first.save(8, state)
        first._checkpoints._thread.join()
    assert (folder / "run/checkpoints/8").is_dir() and complete_steps(folder / "run") == [4, 6]

    with Workdir(config, {"a": "b"}, steal=True) as second:
        assert second.latest == 6 and not (folder / "run/checkpoints/8").exists()
        found, held = second.restore(abstract_of(state), abstract_of(frozen))
        assert int(found.step) == 6
        for ours, wanted in zip(
            jax.tree.leaves((found.trained, found.opt_state, held)),
            jax.tree.leaves((state.trained, state.opt_state, frozen)),
            strict=True,
        ):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))
        report(second, 7, 6)
        # The one before does not know yet that it was taken over, and spoils nothing.
        with pytest.raises(faults.Stopped, match="was taken over by another start"):
            first._seal()
        first._mirror.copy()
        first._mirror._over.set()
        second.save(8, state)
    assert [line["step"] for line in read_metrics(folder / "run")] == [2, 4, 6, 7]
    assert not second.local.exists() and not (folder / "run" / FILE).exists()
    with pytest.raises(ValueError, match="has a run on other data"):
        Workdir(config, {"a": "c"})
    # What a checkpoint lacks is told, with the cure.
    (folder / "run/checkpoints/8" / "complete.json").write_text("{}")
    with pytest.raises(ValueError, match=r"complete.json does not name the folder of a start; delete .*/checkpoints/8"):
        Workdir(config, {"a": "b"})


def test_an_export_is_complete_with_its_last_object(store, tmp_path, monkeypatch):
    folder, _ = store
    write_tokenizer(tmp_path, image_size=MODEL.vision.image_size, num_image_tokens=MODEL.vision.num_patches)
    config = tiny_config(ABSENT | {"tokenizer": str(tmp_path)}, folder / "run")
    state, frozen = state_of(config, 1)
    with Workdir(config, {}) as workdir:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(OSError(5, "killed")))
            with pytest.raises(faults.Stopped, match="the export could not be written"):
                workdir.export(4, state.trained, frozen)
        (folder / "run/export/4/params/left").write_text("of another mesh")
        assert checkpoint.has_arrays(folder / "run/export/4/params")
        with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
            janus_jax.load(str(folder / "run/export/4"))
        exported = workdir.export(4, state.trained, frozen)
        written = {path: path.stat().st_mtime for path in exported.walk()}
        assert exported / "tokenizer.json" in written and exported / "params/left" not in written
        assert workdir.export(4, state.trained, frozen) == exported
        assert {path: path.stat().st_mtime for path in exported.walk()} == written
    wanted = {**state.trained, **frozen}
    leaves = checkpoint.array_leaves(exported / "params", wanted)
    for path, leaf in leaves.items():
        whole = functools.reduce(lambda tree, key: tree[key], path, wanted)
        np.testing.assert_array_equal(read_now(leaf), np.asarray(whole.astype("bfloat16")))
    if str(folder).startswith("gs"):  # orbax's readers know no other store
        found = ocp.load(str(exported / "params"))
        np.testing.assert_array_equal(
            found["gen_head"]["vision_head"]["kernel"], wanted["gen_head"]["vision_head"]["kernel"].astype("bfloat16")
        )


def test_a_workdir_that_cannot_be_written_is_one_line(store):
    folder, proxy = store
    scheme = str(folder)[:2]
    nowhere = tiny_config(ABSENT, f"{scheme}://no-such-bucket/run")
    with pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket") as error:
        Workdir(nowhere, {})
    assert "\n" not in str(error.value)
    config = tiny_config(ABSENT, folder / "run")
    with (
        proxy.failing(kinds=("403",), methods=("POST", "PUT")),
        pytest.raises(PermissionError, match="may not do this"),
    ):
        Workdir(config, {})
    for wrong, told in ((nowhere, "there is no bucket no-such-bucket"), (config, "may not do this")):
        found, path = Findings(), StorePath(wrong.workdir)
        with proxy.failing(kinds=("403",) if wrong is config else (), methods=("POST", "PUT")):
            _workdir(found, wrong, path, {}, None, steal=True)
        assert len(found.problems) == 1 and told in found.problems[0] and "\n" not in found.problems[0]
    found = Findings()
    _workdir(found, config, folder / "run", {}, None, steal=False)
    assert found.problems == [] and not (folder / "run").exists()


def test_a_store_that_stays_away_ends_the_run_resumably(store, monkeypatch):
    folder, proxy = store
    config = tiny_config(ABSENT, folder / "run")
    state, _ = state_of(config, 2)
    with Workdir(config, {}) as workdir:
        workdir.save(2, state)
        workdir.wait()
        monkeypatch.setattr(store_access, "WAITS", (0.01,))
        with proxy.failing(), pytest.raises(faults.Stopped, match="checkpoint of step 2 is complete") as stopped:
            workdir.save(4, state)
            workdir.wait()
        assert stopped.value.code == faults.STORAGE and "the store does not answer" in str(stopped.value)
    assert complete_steps(folder / "run") == [2]


def test_what_one_process_misses_is_told_by_all(monkeypatch):
    told = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda text: told.append(text) or [text, ""])
    with pytest.raises(store_access.StoreUnavailable, match=r"process 0 \(.*\): .*does not answer"), together():
        raise store_access.StoreUnavailable(110, "the store does not answer", "gs://bucket/x")
    monkeypatch.setattr(distributed, "gather", lambda text: [text, told[0]])
    with pytest.raises(distributed.Agreed, match="does not answer") as error, together():
        pass
    assert isinstance(error.value, store_access.StoreUnavailable)  # which ends the run with 74, not with 2


# ---------------------------------------------------------------- files


def test_files_that_change_are_copied(store, monkeypatch, capsys):
    folder, proxy = store
    (folder / "notes.txt").write_text("one\n")
    may = [True]
    mirror = Mirror(folder, lambda: may[0])
    mirror.fetch(["notes.txt", "absent.txt"])
    with (mirror.local / "notes.txt").open("a") as file:
        file.write("two\n")
    (mirror.local / "deep").mkdir()
    (mirror.local / "deep" / "a.bin").write_bytes(b"x")
    mirror.copy()
    assert (folder / "notes.txt").read_text() == "one\ntwo\n" and (folder / "deep/a.bin").read_bytes() == b"x"
    before = proxy.about(folder)
    mirror.copy()
    assert proxy.about(folder) == before
    (mirror.local / "notes.txt").write_text("three")
    may[0] = False
    mirror.copy()
    assert (folder / "notes.txt").read_text() == "one\ntwo\n"
    may[0] = True
    monkeypatch.setattr(store_access, "WAITS", (0.01,))
    with proxy.failing():
        mirror.close()
    told = capsys.readouterr().err
    assert f"metrics and notes since then are in {mirror.local}" in told and (mirror.local / "notes.txt").exists()
    mirror.close()
    assert (folder / "notes.txt").read_text() == "three" and not mirror.local.exists()
