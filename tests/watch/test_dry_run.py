"""What `--dry-run` finds before a run, in one go, and that it leaves the workdir as it was."""

import dataclasses
import functools
import math
import os
import pathlib
import re

import jax
import pytest

from examples.tiny.run import encode, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import make_mesh
from janus_jax.weights import checkpoint
from tests.raw.test_sources import png
from tests.several import environment, launch, ours, outcome
from train.config import DataConfig, DpoConfig, EvalConfig, GrpoConfig, MeshConfig, RewardConfig, TrainConfig
from train.data.prepared import open_prepared
from train.main import main
from train.overrides import to_json
from train.prepare import prepare
from train.raw.sources import RawSample
from train.run.lease import FILE, Lease
from train.watch import dry_run as module
from train.watch.dry_run import dry_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"), count=6)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start") / "model"))


@pytest.fixture
def config(folders, start, tmp_path) -> TrainConfig:
    return tiny_config(folders, tmp_path / "run", init_from=start)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Unless the mesh asks for more."""

    def mesh(shape):
        return make_mesh(shape, jax.devices()[: math.prod(abs(size) for size in shape.values())])

    monkeypatch.setattr(module, "make_mesh", mesh)


def listing(folder: pathlib.Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of everything in `folder`."""
    stats = [(path, path.stat()) for path in (folder, *sorted(folder.rglob("*")))]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def rows(text: str) -> dict[str, str]:
    """The table that a dry run prints."""
    return dict(re.findall(r"^  (\w+) +(.*)$", text, re.MULTILINE))


def test_nothing_is_in_the_way_or_memory_is(config, tmp_path, monkeypatch, capsys):
    """A small program stands for the step, whose own takes long to compile (see the slow test)."""
    before = listing(tmp_path)
    program = jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((2048, 2048), "float32"))
    monkeypatch.setattr(module, "lower_step", lambda *args: (program, {"parameters": 16 << 20}))
    assert dry_run(config) == 0
    told, errors = capsys.readouterr()
    found = rows(told)
    assert found["config"] == "tiny: stage 3, 4 steps of 8 rows"
    assert found["devices"] == "8 x cpu, 1 processes" and found["mesh"] == "slices 1 x data 1 x fsdp 1 x tensor 1"
    assert found["data"] == "3 of 3 folders opened: 18 samples"
    assert re.fullmatch(r"8 rows of 128, \d+% filled, \d+ groups left out, made in [\d.]+ s", found["batch"])
    assert found["parameters"].endswith(f", vision_model from init_from={config.init_from}")
    assert found["workdir"] == f"{tmp_path}/run: new" and "a checkpoint takes 0.00" in found["storage"]
    assert re.match(r"0.0[23] GiB per device \(parameters 0.02, temporaries 0.0\d\) of [\d.]+ free;", found["memory"])
    assert "compiling a training step" in told and errors == ""
    assert told.splitlines()[-1].startswith(f"nothing is in the way, and nothing was written to {tmp_path}/run;")

    monkeypatch.setattr(module, "available_bytes", lambda device: 1 << 20)
    assert dry_run(config) == 2
    told, errors = capsys.readouterr()
    assert " of 0.00 free; compiled in " in rows(told)["memory"] and "nothing is in the way" not in told
    (line,) = errors.splitlines()
    peak = found["memory"].partition(" of ")[0]  # whose second digit depends on the compiler's version
    assert line.startswith(f"error: a training step does not fit in the devices' memory: it needs {peak} of 0.00 free")
    assert line.endswith("; raise accumulate, or give mesh.fsdp more devices")
    assert listing(tmp_path) == before and not (tmp_path / "run").exists()


def test_every_problem_is_told_at_once(config, folders, tmp_path, capsys):
    """Settings, data, sources, mesh and workdir; what depends on what is broken is left out."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    data = dataclasses.replace(config.data, text=("missing", folders["generation"]))
    wrong = dataclasses.replace(
        config, data=data, vq_from="nowhere", language_from="neither", mesh=MeshConfig(data=3, fsdp=3)
    )
    assert dry_run(wrong) == 2
    told, errors = capsys.readouterr()
    assert rows(told)["data"] == "3 of 5 folders opened: 18 samples"
    assert rows(told)["memory"] == "not known before the problems above are solved"
    starts = (
        "devices cannot be divided", "missing: no such file or folder",
        f"{folders['generation']} has generation samples",
        "language_from: neither does not exist", "vq_from: nowhere does not exist", f"{tmp_path}/run is not empty",
    )  # fmt: skip
    lines = errors.splitlines()
    assert len(lines) == len(starts), errors
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith("error: ") and (start in line or start == starts[0]), line
    assert listing(tmp_path) == before

    settings = {"optimizer": dataclasses.replace(config.optimizer, b1=2.0), "steps": 0, "attention": "splash"}
    other = dataclasses.replace(config.model, language=dataclasses.replace(config.model.language, width=64))
    assert dry_run(dataclasses.replace(config, model=other, workdir="run.py/there", **settings)) == 2
    lines = capsys.readouterr().err.splitlines()
    for start in ("steps must be", "attention=splash does not", "optimizer.b1 must be", "init_from: "):
        assert sum(line.startswith(f"error: {start}") for line in lines) == 1, lines


def started(config: TrainConfig, step: int) -> pathlib.Path:
    """The workdir of a run as a start of it leaves it, without arrays."""
    folder = pathlib.Path(config.workdir)
    kinds = (*config.data.understanding, *config.data.text, *config.data.generation)
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    prints = {name: open_prepared(name).fingerprint for name in kinds}
    checkpoint.write_json(folder / "run.json", {"config": to_json(config), "data": prints})
    return folder


@pytest.fixture
def stands_for_the_step(monkeypatch):
    program = jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    monkeypatch.setattr(module, "lower_step", lambda *args: (program, {"parameters": 1 << 20}))


def drawing_config(config: TrainConfig, folders, tmp_path, **changes) -> TrainConfig:
    """A run of GRPO from the same checkpoint."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house\na tall tree\n")
    reward = RewardConfig("train.rl.rewards.brightness:brightness", workers=0)
    grpo = GrpoConfig(prompts=(str(prompts),), rewards=(reward,), group=4, guidance=2.0)
    usual = {"stage": 2, "data": DataConfig(context=64, workers=0), "evaluation": EvalConfig(), "loss_chunk": 16}
    return dataclasses.replace(config, grpo=dataclasses.replace(grpo, **changes), **usual)


def test_grpo_is_looked_at_with_its_prompts_and_rewards(config, folders, tmp_path, stands_for_the_step, capsys):
    config = drawing_config(config, folders, tmp_path)
    before = listing(tmp_path)
    assert dry_run(config) == 0
    found = rows(capsys.readouterr().out)
    assert found["data"] == "4 pictures of each of 2 of 2 prompts, 1 update"
    assert found["rewards"] == "train.rl.rewards.brightness:brightness" and "GiB per device" in found["memory"]
    assert listing(tmp_path) == before and not (tmp_path / "run").exists()

    for changes, told in (
        ({"prompts": ("nowhere.txt",)}, "nowhere.txt"),
        ({"rewards": (RewardConfig("train.rl.rewards.brightness:brightnes", workers=0),)}, "brightnes"),
        ({"group": 3}, "batch_size=8 must be a multiple of grpo.group=3"),
    ):
        assert dry_run(drawing_config(config, folders, tmp_path, **changes)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line


def test_dpo_is_looked_at_with_its_pairs(config, folders, tmp_path, stands_for_the_step, capsys):
    processor = Processor.from_folder(folders["tokenizer"], config.model)
    pictures = tuple(png(color) for color in ((250, 0, 0), (0, 0, 250)))
    samples = [RawSample(str(i), prompt=f"a tree {i}", images=pictures) for i in range(3)]
    how = {"batch_size": 4, "context": 96, "encode": encode, "progress": False}
    prepare(samples, tmp_path / "pairs", "preference", processor, **how)
    made = drawing_config(config, folders, tmp_path)
    good = dataclasses.replace(made, grpo=None, dpo=DpoConfig(pairs=(str(tmp_path / "pairs"),)))
    assert dry_run(good) == 0
    found = rows(capsys.readouterr().out)
    assert found["data"] == "8 of 3 pairs" and "rewards" not in found
    wrong = dataclasses.replace(good, dpo=DpoConfig(pairs=(folders["generation"],)))
    assert dry_run(wrong) == 2
    assert "has generation samples; prepare pairs with train.prepare" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.1, 0.0])
def test_the_updates_of_grpo_are_compiled_with_the_reference_beside_them(config, folders, tmp_path, kl, capsys):
    assert dry_run(drawing_config(config, folders, tmp_path, kl=kl)) == 0
    assert ("reference 0.00" in rows(capsys.readouterr().out)["memory"]) == (kl > 0)


def test_the_run_in_the_workdir(config, monkeypatch, capsys):
    """Where it resumes, whether it is the same run, and whether another start writes to it."""
    monkeypatch.setattr(module, "_memory", lambda *args: None)  # compiled in another test
    monkeypatch.setattr(module, "Mixture", functools.cache(module.Mixture))
    config = dataclasses.replace(config, evaluation=EvalConfig())
    folder = started(config, 2)
    before = listing(folder)
    # What a run starts from is not read when it resumes.
    assert dry_run(dataclasses.replace(config, vq_from="nowhere", log_every=7)) == 0
    found = rows(capsys.readouterr().out)
    assert found["workdir"] == f"{folder}: resumes after step 2"
    assert found["parameters"] == "those of the checkpoint after step 2"

    assert dry_run(dataclasses.replace(config, seed=9, steps=1)) == 2
    note, first, second = capsys.readouterr().err.splitlines()
    assert note == "note: optimizer.warmup_steps=2: all 1 steps are warm-up"
    assert first.startswith(f"error: {folder} has a run with another configuration: seed")
    assert second.startswith(f"error: steps=1, but {folder} is already at step 2; raise steps")
    assert listing(folder) == before

    lease = Lease(folder)
    lease.acquire()
    try:
        held = listing(folder)
        assert dry_run(config) == 2 and dry_run(config, steal=True) == 0
        assert listing(folder) == held
    finally:
        lease.release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder} is in use by another start (process {os.getpid()} on ")
    # Of another machine: only a renewal would tell.
    (folder / FILE).write_text('{"id": "x", "machine": "elsewhere", "host": "far", "pid": 1}')
    assert (
        Lease(folder).look(0.01).startswith(f"{folder / FILE} is held by another start (process 1 on far), which did")
    )


def test_a_workdir_that_cannot_be_written(config, tmp_path, monkeypatch, capsys):
    for other in ("_memory", "_sources"):
        monkeypatch.setattr(module, other, lambda *args: None)
    monkeypatch.setattr(module, "_data", lambda *args: (None, []))
    monkeypatch.setattr(module.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert dry_run(config) == 2
    assert f"error: workdir={tmp_path}/run: no permission to write to {tmp_path}; " in capsys.readouterr().err
    monkeypatch.setattr(module.os, "access", lambda path, mode: True)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    assert dry_run(config) == 2
    assert f"error: workdir={tmp_path}/run: too little room: 0.00 GiB free; a checkpoint" in capsys.readouterr().err


def test_processes_are_told_apart():
    """A line that all processes have is told once; others name the first process that has it."""
    everywhere = [("a", ["one", "two"]), ("b", ["one", "three"]), ("c", ["one", "three"])]
    assert module._merged(everywhere) == ["one", "process 0 (a): two", "process 1 (b) and 1 more: three"]
    assert module._merged([("a", ["one"])]) == ["one"]


def test_configs_of_other_commands_have_none(capsys):
    assert main(["--config", "digits", "--dry-run"]) == 2
    assert "error: --dry-run is for a training run, whose config is a TrainConfig, not " in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_look_together(folders, start, tmp_path):
    """Through the command line: what one of them finds ends both with 2; else both end with 0."""

    path = tmp_path / "two.py"
    path.write_text(
        "from examples.tiny.run import tiny_config\n\n\ndef get_config():\n"
        f"    return tiny_config({folders!r}, {str(tmp_path / 'run')!r}, init_from={start!r})\n"
    )
    env = environment(4)
    for own, code in (([], 0), (["vq_from=nowhere"], 2)):
        made = outcome(launch(path, env, [tmp_path, tmp_path], ["--dry-run"], ["--dry-run", *own]))
        assert [result[0] for result in made] == [code, code], made
        told, errors = "\n".join(ours(made[0][1])), ours(made[0][2])
        assert rows(told)["devices"] == "8 x cpu, 2 processes"
        assert re.match(r"0.0\d GiB per device \(parameters 0.00, optimizer state 0.00, batch", rows(told)["memory"])
        if code:
            assert any(line.startswith("error: process 1 (") and "vq_from: nowhere" in line for line in errors), errors
            assert any(
                "the configuration of process 1" in line and "vq_from is nowhere there" in line for line in errors
            )
        assert not (tmp_path / "run").exists()
        assert not ours(made[1][1])
