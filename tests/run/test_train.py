"""Whole runs: from prepared data to an exported model, stopped, resumed, moved to other meshes, and refused."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny import run as tiny_run
from examples.tiny.run import MODEL, params_of, tiny_config, write_checkpoint, write_data
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights import checkpoint
from janus_jax.weights.conversion import to_torch
from janus_jax.weights.torch_weights import abstract_params
from tests.emulated import emulate_slices
from tests.handles import needs_sys
from train.config import EvalConfig, MeshConfig, SampleConfig, TrainConfig
from train.main import main
from train.run import faults, loop
from train.run.lease import Lease
from train.run.metrics import read_metrics
from train.step import step


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Runs take as many devices as their mesh asks for."""
    patch = pytest.MonkeyPatch()

    def mesh(shape):
        return make_mesh(shape, jax.devices()[: math.prod(abs(size) for size in shape.values())])

    patch.setattr(loop, "make_mesh", mesh)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"), count=12)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("start")))


@dataclasses.dataclass(frozen=True)
class Run:
    config: TrainConfig
    exported: pathlib.Path

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.config.workdir)

    def params(self) -> dict[str, np.ndarray]:
        return params_of(self.folder)

    def losses(self, prefix: str = "train") -> dict[int, float]:
        key = f"{prefix}/loss"
        return {line["step"]: line[key] for line in read_metrics(self.folder) if key in line}


@pytest.fixture(scope="module")
def get_config(folders, start, tmp_path_factory):
    def make(workdir: pathlib.Path | None = None, **changes) -> TrainConfig:
        workdir = workdir or tmp_path_factory.mktemp("run")
        return tiny_config(folders, workdir, **({"init_from": start} | changes))

    return make


@pytest.fixture(scope="module")
def whole(get_config) -> Run:
    """Four steps in one go on one device, with samples at the end."""
    config = get_config(samples=SampleConfig(every=4, prompts=("a red house", "a tree"), images=2))
    return Run(config, loop.train(config))


@pytest.fixture(scope="module")
def half(get_config) -> Run:
    """Two steps of the same run."""
    config = get_config(steps=2)
    return Run(config, loop.train(config))


def copy_of(run: Run, folder: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(run.folder, folder / "copy")


# ---------------------------------------------------------------- stopping and going on


def test_two_and_two_steps_are_four(whole, half, tmp_path, capsys):
    config = dataclasses.replace(half.config, workdir=str(copy_of(half, tmp_path)), steps=4)
    run = Run(config, loop.train(config))
    assert "resuming after step 2" in capsys.readouterr().out
    assert run.losses() == whole.losses() and list(run.losses()) == [1, 2, 3, 4]
    assert run.losses("eval") == whole.losses("eval") and list(run.losses("eval")) == [2, 4]
    ours, theirs = run.params(), whole.params()
    assert ours.keys() == theirs.keys() == flatten(abstract_params(MODEL)).keys()
    for path in ours:
        assert ours[path].dtype == np.float32
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_learns(whole, start):
    assert whole.losses()[4] < whole.losses()[1]
    before, after = flatten(checkpoint.load_params(start, as_numpy=True)), whole.params()
    still = {path.split("/")[0] for path in before if np.array_equal(before[path], after[path])}
    moved = {path.split("/")[0] for path in before if not np.array_equal(before[path], after[path])}
    assert still == {"gen_vision_model"}
    assert moved == {"vision_model", "aligner", "gen_aligner", "gen_embed", "gen_head", "language_model"}


@pytest.mark.slow
def test_goes_on_on_another_mesh(whole, half, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(half.config, workdir=str(copy_of(half, tmp_path)), steps=4, mesh=mesh)
    check_same(Run(config, loop.train(config)), whole)


@pytest.mark.slow
def test_starts_on_two_slices_and_goes_on_on_one(whole, get_config, monkeypatch):
    monkeypatch.setattr(jax.Device, "slice_index", None, raising=False)  # and gone again after the test
    emulate_slices(2)
    config = get_config(steps=2, mesh=MeshConfig(slices=2, fsdp=2, tensor=2))
    loop.train(config)
    config = dataclasses.replace(config, steps=4, mesh=MeshConfig(fsdp=4))
    check_same(Run(config, loop.train(config)), whole)


def check_same(run: Run, whole: Run):
    """Of runs on different meshes."""
    for prefix in ("train", "eval"):
        ours, theirs = run.losses(prefix), whole.losses(prefix)
        assert ours == pytest.approx(theirs, rel=1e-4) and ours.keys() == theirs.keys()
    params = run.params()
    for path, theirs in whole.params().items():
        # Adam divides by the root of what may be nearly nothing: an update may differ more than its gradient does.
        np.testing.assert_allclose(params[path], theirs, atol=2e-3, err_msg=path)
    fills = [[line["train/tokens"] for line in read_metrics(r.folder) if "train/fill" in line] for r in (run, whole)]
    assert fills[0] == fills[1], "batches do not depend on the mesh"


def test_a_finished_run_is_left_as_it_is(half, capsys):
    before = half.losses()
    assert loop.train(half.config) == half.exported
    assert half.losses() == before
    with pytest.raises(ValueError, match=r"steps=1, but .* is already at step 2"):
        loop.train(dataclasses.replace(half.config, steps=1))


# ---------------------------------------------------------------- what is left behind


def test_metrics(whole):
    lines = read_metrics(whole.folder)
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    wanted = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds_per_step", "fill", "data_wait"}
    wanted |= {f"{what}_{kind}" for what in ("loss", "tokens") for kind in ("understanding", "text", "generation")}
    wanted |= {"tokens", "left_out_groups", "bad_samples", "skipped_updates"}
    for line in train:
        assert {name.removeprefix("train/") for name in line} >= wanted
        assert all(value is not None and math.isfinite(value) for value in line.values())
        assert 0 < line["train/fill"] <= 1 and 0 <= line["train/data_wait"] <= 1
        kinds = ("understanding", "text", "generation")
        total = sum(line[f"train/loss_{kind}"] * line[f"train/tokens_{kind}"] for kind in kinds)
        assert line["train/loss"] * line["train/tokens"] == pytest.approx(total, rel=1e-5)
        assert line["train/tokens_generation"] % MODEL.gen_vision.num_tokens == 0
    assert [line["train/learning_rate"] for line in train] == pytest.approx([0, 1.5e-3, 3e-3, 3e-3])
    assert [line["step"] for line in lines if "eval/loss_generation" in line] == [2, 4]


@pytest.mark.slow
def test_every_key_of_the_steps_metrics_is_reported(get_config, monkeypatch):
    """Those of today, and one more that nobody has told the loop of."""
    known = {}

    def more(*args):
        state, metrics = train_step(*args)
        known.update(metrics)
        return state, metrics | {"largest": state.step.astype("float32")}

    train_step = step.train_step
    monkeypatch.setattr(step, "train_step", more)
    config = get_config(stage=1, steps=3, log_every=2, evaluation=EvalConfig())
    loop.train(config)
    first, second = read_metrics(config.workdir)
    for line in (first, second):
        assert {name.removeprefix("train/") for name in line} >= {*known, "largest"}
    # The mean of steps 1 and 2, and step 3 alone.
    assert (first["train/largest"], second["train/largest"]) == (1.5, 3.0)
    assert first["train/finite"] == 1 and first["train/damaged"] == 0


def test_pictures(whole):
    from PIL import Image

    size = MODEL.gen_vision.image_size
    sheet = Image.open(whole.folder / "samples" / "0000004.png")
    assert sheet.width >= 2 * size and sheet.height >= 2 * size
    assert Image.open(whole.folder / "curves.png").width > 100
    assert list((whole.folder / "tensorboard").iterdir())


def test_export_loads_draws_and_answers(whole):
    assert whole.exported == whole.folder / "export" / "4"
    janus = janus_jax.load(whole.exported, dtype="float32")
    assert dataclasses.replace(janus.config, dtype="float32") == MODEL
    trained = whole.params()
    for path, leaf in flatten(janus.params).items():
        if path in trained:
            rounded = trained[path].astype("bfloat16").astype(np.float32)
            np.testing.assert_array_equal(np.asarray(leaf), rounded, err_msg=path)
    images = janus.generate_images("a red house", n=1, progress=False)
    assert images[0].size == (MODEL.gen_vision.image_size,) * 2
    assert isinstance(janus.chat("What is it?", images=[images[0]], max_new_tokens=3), str)


def test_export_converts_to_torch(whole, tmp_path):
    to_torch(whole.exported, tmp_path / "torch", "original")
    ours = flatten(checkpoint.load_params(whole.exported, as_numpy=True))
    theirs = flatten(checkpoint.load_params(tmp_path / "torch", as_numpy=True))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


def test_checkpoints_kept(whole):
    kept = {path.name for path in (whole.folder / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "4"}
    run = json.loads((whole.folder / "run.json").read_text())
    assert run["config"]["steps"] == 4 and set(run["data"]) == {
        path for kind in ("understanding", "text", "generation") for path in getattr(whole.config.data, kind)
    }


# ---------------------------------------------------------------- refusals before the first step


def refused(config: TrainConfig, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        loop.train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_workdir_of_another_run(half, tmp_path):
    optimizer = dataclasses.replace(half.config.optimizer, learning_rate=1.0)
    told = refused(dataclasses.replace(half.config, optimizer=optimizer, seed=5))
    assert "another configuration" in told and "optimizer.learning_rate" in told and "seed" in told
    (tmp_path / "letter.txt").write_text("mine")
    told = refused(dataclasses.replace(half.config, workdir=str(tmp_path)))
    assert f"{tmp_path} is not empty and has no run in it" in told
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    (tmp_path / "run.json").write_text("[]")
    assert "run.json is not a run's description" in refused(dataclasses.replace(half.config, workdir=str(tmp_path)))


def test_data_that_changed(half, tmp_path):
    folder = copy_of(half, tmp_path)
    run = json.loads((folder / "run.json").read_text())
    name = half.config.data.text[0]
    run["data"][name] = "other"
    (folder / "run.json").write_text(json.dumps(run))
    told = refused(dataclasses.replace(half.config, workdir=str(folder), steps=3))
    assert f"has a run on other data: {name} changed" in told


def test_data_of_another_model(get_config, tmp_path):
    other = tiny_run.write_tokenizer(tmp_path / "other", vocab_size=380, image_size=32)
    told = refused(get_config(tmp_path / "run", tokenizer=str(other)))
    assert "was prepared with another tokenizer" in told
    gen_vision = dataclasses.replace(MODEL.gen_vision, grid=2)
    told = refused(get_config(tmp_path / "run", model=dataclasses.replace(MODEL, gen_vision=gen_vision)))
    assert "16 codes per image, the model has 4" in told
    assert not (tmp_path / "run").exists()


def test_held_out_data_are_checked_too(get_config, folders, tmp_path):
    evaluation = EvalConfig(text=(folders["generation"],), every=2)
    assert "is listed in data.text" in refused(get_config(tmp_path / "run", evaluation=evaluation))


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(folders, start, tmp_path):
    """Runs `train.main.main` on a config file of the tiny run; returns exit code and standard error's lines."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from examples.tiny.run import tiny_config\n\n"
        f"def get_config():\n    return tiny_config({folders!r}, {str(tmp_path / 'run')!r}, init_from={start!r})\n"
    )

    def call(capsys, *overrides: str, config: str = str(path)) -> tuple[int, list[str]]:
        capsys.readouterr()
        try:
            code = main(["--config", config, *overrides])
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().err.strip().splitlines()

    return call


@pytest.mark.parametrize(
    "override, told",
    [
        ("data.text=nowhere", "nowhere"),
        ("mesh.fsdp=3", "batch_size=8 does not divide into accumulate=1 micro-batches over 3 slices x data x fsdp"),
        ("init_from=absent", "init_from: absent is not a folder"),
        ("init_from=tests", "init_from: tests"),
        ("vision_from=absent.safetensors", "vision_from: absent.safetensors does not exist"),
        ("batch_size=0", "batch_size must be at least 1, got 0"),
        ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate"),
        ("model.language.layers=3", "language.layers is 2, the config's model has 3"),
        ("data.early_steps=3", "data.early_steps=3"),
        pytest.param("workdir=/sys/run", "/sys/run: ", marks=needs_sys),
    ],
)
def test_bad_input_is_one_line(command, capsys, override, told):
    code, lines = command(capsys, override)
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0], lines


def test_a_second_start_is_one_line(command, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    other = Lease(tmp_path / "run")
    other.acquire()
    before = sorted((tmp_path / "run").rglob("*"))
    code, lines = command(capsys)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and "is in use by another start" in lines[0] and "--steal" in lines[0]
    assert sorted((tmp_path / "run").rglob("*")) == before
    other.release()


def test_an_export_that_must_be_refused_is_refused_first(get_config, tmp_path):
    vision = dataclasses.replace(MODEL.vision, norm_eps=1e-5)
    told = refused(get_config(tmp_path / "run", model=dataclasses.replace(MODEL, vision=vision)))
    assert told.startswith("model: the original dialect cannot express a vision norm eps of 1e-05")
    assert not (tmp_path / "run").exists()


def test_unknown_config_is_one_line(command, capsys):
    code, lines = command(capsys, config="7b_stage4")
    assert code == 2 and len(lines) == 1 and "did you mean" in lines[0] and "7b_stage3" in lines[0]


@pytest.mark.parametrize("module", ["main", "prepare", "compile", "vq"])
def test_without_the_train_extra(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['grain'] = None\n")
    command = [sys.executable, "-m", f"train.{module}", "--help"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(pathlib.Path.cwd())])}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    told = "error: training needs grain: pip install -e '.[train]'"
    assert (run.returncode, run.stderr.splitlines()) == (2, [told])


def test_too_many_damaged_samples_stop_the_run(command, capsys, monkeypatch):
    from train.data.prepared import Prepared

    def damaged(self, index):
        raise ValueError(f"{self.folder} sample {index} is damaged")

    # The folders' first sample is looked at before the first step.
    sample = Prepared.__getitem__
    monkeypatch.setattr(Prepared, "__getitem__", lambda self, i: sample(self, i) if i == 0 else damaged(self, i))
    code, lines = command(capsys, "evaluation.every=0", "data.max_bad_share=0.5")
    assert code == faults.STOPPED
    assert len(lines) == 1 and "samples were damaged, more than data.max_bad_share=0.5" in lines[0]


def test_a_config_names_what_runs_it(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import dataclasses\nfrom typing import ClassVar\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Own:\n"
        "    RUNNER: ClassVar[str] = 'builtins:print'\n    workdir: str = 'here'\n\n"
        "def get_config():\n    return Own()\n"
    )
    assert main(["--config", str(tmp_path / "own.py"), "workdir=there"]) == 0
    assert capsys.readouterr().out == "Own(workdir='there') False\n"
    text = (tmp_path / "own.py").read_text().replace("RUNNER: ClassVar[str]", "other: str")
    (tmp_path / "own.py").write_text(text)
    assert main(["--config", str(tmp_path / "own.py")]) == 2
    assert capsys.readouterr().err == "error: the config is a Own, which names no RUNNER; return a TrainConfig\n"
