"""A trained model of digits: the recipe from nothing, in narrow forms, and what adapters teach it.

Ten minutes on two cores for the recipe, and some more for each of the others.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")

from examples.digits import evaluate, tune
from train.run.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEED = 5  # which no table shows


def command(module: str, *arguments: str) -> str:
    """Its standard output. In a process of its own: this one's programs are hardly optimized."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run."""
    folder = tmp_path_factory.mktemp("digits")
    command("train.main", "--config", "digits", f"seed={SEED}", f"workdir={folder}")
    return folder


@pytest.fixture(scope="module")
def model(run) -> str:
    (exported,) = (run / "stage3" / "export").iterdir()
    return str(exported)


@pytest.mark.slow
def test_a_seed_that_no_table_shows(run):
    """The bounds are some three standard deviations below the means in RESULTS."""
    figures = json.loads((run / "results.json").read_text())
    assert figures["understanding"] >= 0.96 and figures["generation"] >= 0.97
    assert figures["distinct"] >= 990
    assert all((run / name).stat().st_size for name in ("answers.png", "curves.png", "generated.png"))


@pytest.mark.slow
def test_quantized_weights_lose_little(model, tmp_path):
    """Half a point with int8 and one with int4, of questions and of 2,000 digits drawn with the same seeds."""
    given = ["--weights", "int8", "int4", "--images", "200", "--out", str(tmp_path)]
    told = command("examples.digits.evaluate", "--model", model, *given)
    assert told.startswith("| split held_out | float32 | int8 | int4 |\n")
    figures = json.loads((tmp_path / "results.json").read_text())
    for form, most in (("int8", 0.005), ("int4", 0.01)):
        for what in ("understanding", "generation"):
            assert figures[form][what] >= figures["float32"][what] - most, (form, what)
        assert (tmp_path / form / "generated.png").stat().st_size


@pytest.mark.slow
def test_speculation_draws_the_same_distribution(model):
    """Over 20,000 images: the plain loop's own ones, and by the other rules the same codes, pairs and digits."""
    told = command("benchmarks.speculation", "agreement", "--model", model)
    found = {name.strip(): float(value) for name, value in (line.rsplit(" ", 1) for line in told.splitlines())}
    assert found.pop("same: equal images") > 0.999
    assert len(found) == 8 and min(found.values()) > 0.001


@pytest.mark.slow
def test_an_adapter_learns_to_mirror(model, tmp_path):
    command("examples.digits.tune", "--model", model, "--only", "mirrored", "--out", str(tmp_path))
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["parameters"] < 0.08
    assert figures["tuned mirrored prompts, mirrored back"] >= 0.9
    assert figures["tuned mirrored prompts"] <= figures["base mirrored prompts"]
    assert figures["tuned old prompts"] >= 0.95 * figures["base old prompts"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_adapter_learns_a_question(model, dtype, tmp_path):
    """In float16 as well as in float32."""
    command("examples.digits.tune", "--model", model, "--only", "even", "--dtype", dtype, "--out", str(tmp_path))
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["base even questions"] < 0.1 and figures["tuned even questions"] >= 0.95
    assert figures["tuned old questions"] >= 0.95 * figures["base old questions"]
    lines = [json.loads(line) for line in (tmp_path / "even" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("train/skipped_updates", 0) for line in lines) == 0


@pytest.mark.slow
def test_benchmarks_are_learned_and_watched(model, tmp_path):
    """The figures of a run's own benchmarks rise over its steps; what is drawn is judged by GenEval's rules."""
    command("examples.digits.benchmarks", "--model", model, "--out", str(tmp_path / "out"))
    figures = json.loads((tmp_path / "out" / "results.json").read_text())

    def value(which: str, name: str) -> float:
        return float(figures[which][name].split(" ")[0].replace(",", ""))

    assert value("geneval", "overall") >= 95
    assert value("as it is", "pope, F1 random") < 75 and value("as it is", "mmbench, vanilla-all") < 40
    # The letters of MMBench are not learned in so few steps.
    assert value("taught", "pope, F1 random") >= 80 and value("taught", "mme, perception") >= 180
    lines = read_metrics(tmp_path / "out" / "run")
    curve = [line["evals/pope/f1_random"] for line in lines if "evals/pope/f1_random" in line]
    assert len(curve) == 6 and curve[-1] >= max(80, curve[0] + 10)
    assert (tmp_path / "out" / "evals.png").stat().st_size


@pytest.mark.parametrize("module", [evaluate, tune])
def test_no_model(module, tmp_path, capsys):
    assert module.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_number_of_images(tmp_path, capsys):
    assert evaluate.main(["--model", "any", "--images", "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --images must be at least 1, got 0\n"


@pytest.mark.slow
def test_rewarded_answers_become_right(model, tmp_path):
    """About dark pictures that nothing was trained on, in the rewarded wordings and in another one."""
    told = command("train.main", "--config", "grpo_digits", "parts=answers", f"model={model}", f"workdir={tmp_path}")
    assert "right answers about dark pictures" in told
    found = json.loads((tmp_path / "results.json").read_text())["answers"]
    before, after = found["before"], found["after"]
    assert before["rewarded"] < 0.8 < 0.85 < after["rewarded"]
    assert after["other_wording"] > before["other_wording"] + 0.05 and after["bright"] > 0.85
