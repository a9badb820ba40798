"""From a file of pictures to an adapter, by a function and by a command; and what bad input gets."""

import dataclasses
import json
import pathlib
import shlex

import jax
import numpy as np
import pytest
from PIL import Image

import janus_jax
from examples.tiny.run import MODEL, write_checkpoint
from examples.tiny.tokenizer import write_tokenizer
from janus_jax import __main__ as command
from janus_jax.config import PRESETS
from janus_jax.sampling.footprint import params_bytes
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights.adapters.peft_files import read_adapter
from train import finetune
from train.config import EvalConfig, EvalsConfig
from train.run import faults, figures, loop
from train.run.metrics import read_metrics
from train.step.state import activation_bytes

WORDS = ("a red house", "two green trees", "the blue sea", "some yellow sun")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    write_tokenizer(folder, image_size=MODEL.vision.image_size, num_image_tokens=MODEL.vision.num_patches)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(44):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": WORDS[i % 4]}) for i in range(44)]
    (folder / "photos.jsonl").write_text("\n".join(lines))
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": WORDS[1]}]
    asked = [json.dumps({"image": f"{i}.png", "conversations": turns}) for i in range(6)]
    (folder / "questions.jsonl").write_text("\n".join(asked))
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(finetune.jax, "devices", lambda *args, real=jax.devices: real(*args)[:1])


@pytest.mark.slow
def test_interrupted_and_gone_on_with(model, photos, tmp_path, monkeypatch, capsys):
    """Preparation is not repeated, held-out samples are told apart, and the result is used as the command says."""
    how = {"steps": 4, "batch_size": 2, "rank": 2, "targets": ("o_proj",), "weights": "int8", "prompts": ()}
    given = (model, photos / "photos.jsonl", "generation", tmp_path / "out")

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(*given, **how)
    prepared = sorted(path for path in (tmp_path / "out").glob("*/data-*") if path.suffix != ".json")
    times = {path: path.stat().st_mtime_ns for path in prepared}
    assert {path.parent.name for path in prepared} == {"train", "held_out"}
    capsys.readouterr()

    with monkeypatch.context() as patch:
        patch.setattr(figures.Live, "_update", lambda self, name, path: shown.append((name, path.stat().st_size > 0)))
        patch.setattr(finetune, "in_notebook", lambda: True)
        shown = []
        adapter = finetune.finetune(*given, **how)
    assert {path: path.stat().st_mtime_ns for path in prepared} == times
    assert {name for name, _ in shown} == {"curves"} and all(good for _, good in shown)
    assert not (tmp_path / "out" / "run" / "failures.txt").exists()
    lines = read_metrics(tmp_path / "out" / "run")
    assert [line["step"] for line in lines if "eval/loss_generation" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "train/loss_generation" in line] == [1, 2, 3, 4]

    *_, said = capsys.readouterr().out.strip().splitlines()
    words = shlex.split(said)
    assert words[:4] == ["python", "-m", "janus_jax", "generate"]
    args = command._parser().parse_args(words[3:])
    assert (args.model, args.adapter, args.weights) == (model, str(adapter), "int8")
    janus = janus_jax.load(args.model, weights=args.weights, adapter=args.adapter, progress=False)
    assert any(np.asarray(x).any() for path, x in flatten(janus.params).items() if path.endswith("o_proj/lora_b"))
    assert read_adapter(adapter, MODEL).base == model
    assert finetune.finetune(*given, **how) == adapter, "what is done is not done again"


def test_rows_and_steps_follow_the_data(model, photos, tmp_path, monkeypatch):
    """Without training: the run that would be started."""
    runs = []
    monkeypatch.setattr(finetune, "train", lambda config, more: runs.append(config) or tmp_path / "adapter")
    finetune.finetune(model, photos / "photos.jsonl", "generation", tmp_path / "many")
    category = tmp_path / "mme" / "MME_Benchmark_release_version" / "color"
    category.mkdir(parents=True)
    (category / "a.txt").write_text("Is it red? Please answer yes or no.\tYes\n")
    asked = {"tasks": ["mme"], "tasks_data": tmp_path / "mme", "tasks_limit": 7}
    finetune.finetune(model, photos / "questions.jsonl", "understanding", tmp_path / "few", context=200, **asked)
    many, few = runs
    assert (many.steps, many.optimizer.warmup_steps, many.adapter.alpha) == (round(20 * 41 / 4), 20, 32)
    assert many.data.ratio == (0, 0, 1) and few.data.ratio == (1, 0, 0)
    assert many.data.context == 128 and many.batch_size == 1, "four samples of some twenty tokens"
    assert many.samples.every == many.steps // 4 and set(many.samples.prompts) <= set(WORDS)
    assert many.evaluation.generation == (str(tmp_path / "many" / "held_out"),)
    assert few.evaluation == EvalConfig(batches=2) and few.samples.every == 0, "too few to hold some out"
    assert (few.data.context, few.steps) == (128, 100)
    assert many.evals == EvalsConfig() and few.evals == EvalsConfig(25, ("mme",), str(tmp_path / "mme"), limit=7)
    assert few.save_every == 25 and many.save_every == many.steps // 5
    assert (few.compute_dtype, few.init_from) == ("float32", model)
    # Layers are computed twice where keeping them would take more than a quarter of what is free.
    for free, remat in ((None, "full"), (2**20, "full"), (2**30, "none")):
        monkeypatch.setattr(finetune, "least_available_bytes", lambda mesh, free=free: free)
        assert finetune._remat(few) == remat
    large = dataclasses.replace(few, model=PRESETS["janus_pro_1b"], batch_size=8)
    least = 4 * activation_bytes(large, 1) + params_bytes(large.model, "float32")
    for free, remat in ((least, "none"), (least - 1, "full")):
        monkeypatch.setattr(finetune, "least_available_bytes", lambda mesh, free=free: free)
        assert finetune._remat(large) == remat


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "nowhere"}, "nowhere is neither a folder nor a hub id"),
        ({"tasks": "pop", "tasks-data": "."}, "evals: unknown task pop; did you mean pope"),
        ({"tasks": "pope"}, "tasks and tasks_data go together; give both, or none"),
        ({"tasks-limit": "3"}, "tasks_every and tasks_limit are of tasks, and there are none"),
        ({"tasks": "pope", "tasks-data": ".", "tasks-every": "0"}, "tasks_every must be an integer of at least 1, got"),
        ({"tasks": "pope", "tasks-data": "nowhere"}, "evals: nowhere is not a folder"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ({"targets": "o_prj"}, "adapter.targets: 'o_prj' names no linear layer of the model; did you mean o_proj"),
        ({"save": "gen_heat"}, "adapter.save: 'gen_heat' names no module of the model; did you mean gen_head"),
        ({"rank": "0"}, "rank must be an integer of at least 1, got 0"),
        ({"alpha": "-1"}, "adapter.alpha must be above 0"),
        ({"learning-rate": "0"}, "optimizer.learning_rate must be a number above 0"),
        ({"data": "two.jsonl"}, "a caption needs one image, got 2|missing_image"),
        ({"data": "questions.jsonl"}, "generation needs a caption with its image|missing_field"),
        ({"format": "jsn"}, "unknown format 'jsn'; did you mean json"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input(model, photos, tmp_path, changes, told, capsys):
    two = {"image": ["0.png", "1.png"], "caption": "both"}
    (photos / "two.jsonl").write_text(json.dumps(two) + "\n" + json.dumps({"image": "2.png", "caption": "one"}))
    given = {"model": model, "data": "photos.jsonl", "kind": "generation", "out": str(tmp_path / "out")} | changes
    given["data"] = str(photos / given["data"])
    assert finetune.main([word for name, value in given.items() for word in (f"--{name}", value)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert any(part in line for part in told.split("|")), line
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_the_function_raises(model, photos, tmp_path):
    with pytest.raises(ValueError, match="kind must be generation or understanding, got 'generatoin'; did you mean"):
        finetune.finetune(model, photos / "photos.jsonl", "generatoin", tmp_path / "out")
    with pytest.raises(ValueError, match="weights must be int8 or int4, got 'int2'"):
        finetune.finetune(model, photos / "photos.jsonl", "generation", tmp_path / "out", weights="int2")


def test_what_ends_a_run_is_an_ordinary_error(model, photos, tmp_path, monkeypatch):
    """In a notebook: neither an exit nor an exception of the loop's own."""
    given = (model, photos / "questions.jsonl", "understanding", tmp_path / "out")
    for raised, kind, told in (
        (faults.Stopped("not finite", faults.STOPPED), ValueError, "not finite"),
        (faults.Stopped("disk full", faults.STORAGE), OSError, "disk full"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), OutOfMemory, "a step does not fit"),
    ):

        def train(*args, raised=raised, **options):
            raise raised

        monkeypatch.setattr(finetune, "train", train)
        with pytest.raises(kind, match=told):
            finetune.finetune(*given)
