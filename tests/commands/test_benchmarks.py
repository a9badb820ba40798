"""Every benchmark's command at the smallest size, its variants in this process (and, marked slow, in their own)."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import signal
import time

import jax
import numpy as np
import pytest

from benchmarks import load, parity, sampling, scaling, training, understanding
from benchmarks.common import device as _device
from benchmarks.common import forms
from benchmarks.common import runs as _common
from janus_jax import sharding
from janus_jax.config import PRESETS
from janus_jax.weights.torch_weights import abstract_params

COMMANDS = {
    "compile": ["--rounds", "1"],
    "evals": [
        "--rounds",
        "1",
        "--vs",
        "torch",
        "--layers",
        "1",
        "--pictures",
        "2",
        "--questions",
        "3",
        "--tokens",
        "2",
    ],
    "load": ["--rounds", "1", "--whole"],
    "sampling": ["--rounds", "1", "--vs", "torch", "--images", "2", "--steps", "2", "--repeats", "1"],
    "scaling": ["--rounds", "1", "--layers", "1", "--steps", "2"],
    "training": ["--rounds", "1", "--layers", "1", "--context", "64", "--steps", "1"],
    "understanding": ["--rounds", "1", "--vs", "torch", "--tokens", "2", "--repeats", "1"],
}
# So few variants that every test run can have them.
FEW = {
    "compile": ("no cache", "cache found"),
    "load": ("no cache",),
    "sampling": ("jax float32", "jax float32 int8", "torch float32", "torch float32 generate"),
    "training": ("packed full 64",),
    "understanding": ("jax float32", "torch float32 eager", "torch float32 static"),
}


def run_here(name, arguments, environment):
    """Stands in for `_common.run_child`: no new process, whose imports take seconds."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for key, value in environment.items():
            patch.setenv(key, value)
        assert importlib.import_module(f"benchmarks.{name}").main(arguments) == 0
    return json.loads(output.getvalue().splitlines()[-1])


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(_common, "run_child", run_here)
    monkeypatch.setattr(_device, "COPY_BYTES", 1 << 20)


def run_few(name, tmp_path, *more):
    return run(name, tmp_path, *more, *(argument for variant in FEW[name] for argument in ("--variant", variant)))


def run(name, tmp_path, *more):
    """The table that a command appends to an empty record, as lists of cells, and the record."""
    record = tmp_path / "RESULTS.md"
    plot = ["--plot", str(tmp_path / "scaling.png")] if name == "scaling" else []
    arguments = ["--preset", "janus_tiny", *COMMANDS[name], *more, *plot, "--record", str(record)]
    assert importlib.import_module(f"benchmarks.{name}").main(arguments) == 0
    text = record.read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert all(len(row) == len(rows[0]) for row in rows)
    return [rows[0], *rows[2:]], text


def numbers(cells):
    return [float(cell.replace(",", "")) for cell in cells if cell]


@pytest.mark.slow
def test_evals(tmp_path, here):
    (header, *rows), text = run("evals", tmp_path)
    others = ["jax float32 one at a time", "torch float32 batches"]
    ratios = [f"x {other}{of}" for other in others for of in ("", ", processor")]
    assert header == ["", "questions/s", "processor s a question", *ratios]
    assert [row[0] for row in rows] == ["jax float32 evals", *others]
    assert all(value > 0 for row in rows for value in numbers(row[1:]))
    # Even so small, questions that are asked together take less of the processor's time.
    assert numbers(rows[0][1:])[3] > 1
    for number, row in enumerate(rows[1:]):
        assert numbers(row[1:])[2 + 2 * number : 4 + 2 * number] == [1, 1]
    assert "3 questions about each of 2 pictures, answers of 2 tokens" in text


@pytest.mark.slow
def test_compile(tmp_path, here):
    (header, *rows), text = run_few("compile", tmp_path)
    assert header[2:4] == ["compile s, no cache", "compile s, cache found"]
    assert [row[0] for row in rows] == ["SigLIP", "prefill", "loop", "VQ decode"]
    assert all(len(row) == 5 and min(numbers(row[1:])) > 0 for row in rows)
    for part in (
        "## Compilation: `python -m benchmarks.compile`",
        f"jax {jax.__version__}",
        "jaxlib",
        "float32",
        "cores;",
    ):
        assert part in text


@pytest.mark.slow
def test_load(tmp_path, here):
    (header, *rows), text = run_few("load", tmp_path)
    assert header == ["seconds", *FEW["load"]]
    seconds = {row[0]: numbers(row[1:])[0] for row in rows}
    whole = seconds.pop("**start to the first image**")
    assert 0 < seconds.pop("**start to the second code**") < whole
    peak, beyond = (seconds.pop(name) for name in [name for name in seconds if name.startswith("GiB")])
    assert beyond < peak and 0 < peak < 4
    # Nothing of the whole is left out.
    assert len(seconds) == 13 and min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.05)
    assert "GB on disk in bfloat16" in text


def test_load_may_end_once_the_parameters_are_there(tmp_path, here, monkeypatch):
    monkeypatch.setitem(COMMANDS, "load", ["--rounds", "1", "--until-loaded", "--source", "torch", "--weights", "int4"])
    (header, *rows), text = run_few("load", tmp_path)
    assert header == ["seconds", *FEW["load"]]
    assert [row[0].split(":")[0] for row in rows] == ["start", "load", "GiB", "GiB"]
    assert all(numbers(row[1:])[0] > 0 for row in rows[:3])
    assert "with int4 weights; median" in text


def test_load_claims_an_image_only_where_one_was_drawn():
    runs = {"no cache": [{"load": 2.0, "second code": 5.0, "image": 9.0}]}
    rows = {False: load.table(runs, False), True: load.table(runs, True)}
    assert not [row for row in rows[False] if "image" in row[0]] and rows[True][-1][0] == "**start to the first image**"


@pytest.mark.slow
def test_scaling(tmp_path, here, monkeypatch):
    monkeypatch.setattr(scaling, "BATCHES", (1, 32))
    monkeypatch.setattr(scaling, "CONTEXTS", (64, 4096))
    (header, *rows), _ = run("scaling", tmp_path)
    assert [tuple(map(int, row[:2])) for row in rows] == scaling.points(512)
    assert all(min(numbers(row[:-1])) > 0 for row in rows)
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    memory = dict(
        zip(zip(columns["rows"], columns["context"], strict=True), numbers(columns["memory GiB"]), strict=True)
    )
    assert memory["32", "512"] > memory["1", "512"] and memory["1", "4096"] > memory["1", "64"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_scaling_counts_what_a_step_reads():
    config = scaling.shortened("janus_pro_1b", 4)
    assert config.language.layers == 4
    language = abstract_params(config)["language_model"]
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(language)) - 102400 * 2048
    cache = 4 * 2 * 16 * 128
    assert scaling.step_bytes(config, 3, 100, "bfloat16") == 2 * (weights + 300 * cache)
    assert scaling.step_flops(config, 3, 100) == 2 * (3 * weights + 300 * cache)


@pytest.mark.slow
def test_scaling_says_what_does_not_fit(tmp_path, here, monkeypatch):
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: 4_000_000)
    monkeypatch.setattr(scaling, "BATCHES", (1, 32))
    monkeypatch.setattr(scaling, "CONTEXTS", (64,))
    (_, *rows), _ = run("scaling", tmp_path)
    missing = [row[2] for row in rows if "" in row]
    assert missing and set(missing) == {"does not fit"} and len(missing) < len(rows)


@pytest.mark.slow
def test_training(tmp_path, here, monkeypatch):
    # Eight devices would take longer to compile for.
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)
    (header, row), text = run_few("training", tmp_path)
    packed = dict(zip(header, row, strict=True))
    assert [packed[name] for name in ("rows", "remat", "loss_chunk", "MFU %", "rows a device")] == [
        "packed", "full", "64", "", "1"
    ]  # fmt: skip
    tokens = float(packed["fill %"]) / 100 * 64
    assert 32 < tokens <= 64
    assert float(packed["tokens/s a device"].replace(",", "")) == pytest.approx(
        tokens / float(packed["step s"]), rel=0.02
    )
    assert "AdamW" in text and "samples a step in rows of 64" in text


def test_training_compares_rates_with_the_padded_rows():
    runs = {
        "packed full 64": [{"rate": [30.0]}, {"rate": [20.0]}],
        "padded full 64": [{"rate": [10.0]}, {"rate": [5.0]}],
    }
    assert [row[-1] for row in training.table(runs)] == ["tokens/s x padded", "3.5", "1"]


def test_training_samples_are_new_in_every_step_and_of_one_shape():
    args = training.argparse.Namespace(preset="janus_tiny", layers=1, context=64)
    config = training.make_config(args, "packed", "none", 64)
    lengths, rows = training.draw_lengths(config, 4)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert {kind for kind, _ in lengths} == {"understanding", "text", "generation"}
    config = dataclasses.replace(config, batch_size=4)
    assembler = training.make_assembler(config, lengths, rows)
    (one, report), (other, _) = assembler(0), assembler(1)
    assert report["samples"] == len(lengths) and not report["problems"]
    assert report["images"] * config.model.vision.num_patches == one["is_image"].sum()
    for name in ("segment_ids", "positions", "is_image"):
        np.testing.assert_array_equal(one[name], other[name])
    for name in ("ids", "images", "targets"):
        assert (one[name] != other[name]).any()
    assert set(np.unique(one["tasks"])) == {0, 1, 2, 3}


@pytest.mark.slow
def test_sampling(tmp_path, here):
    (header, *rows), text = run_few("sampling", tmp_path)
    assert header[-2:] == ["step x torch float32's best", "step x torch's best"]
    assert [row[:2] for row in rows] == [["2", variant] for variant in FEW["sampling"]]
    for row in rows:
        assert min(numbers(row[2:])) > 0
        # The port's `generate` is measured as a whole, and torch has no roofline of its own.
        assert (row[4] == "") == ("generate" in row[1]) and (row[6] != "") == row[1].startswith("jax")
    best = min(float(row[3]) for row in rows if row[1].startswith("torch"))
    assert float(rows[0][-1]) == pytest.approx(best / float(rows[0][3]), rel=0.02)
    assert "a copy of 1 GiB" in text


def test_an_image_takes_prefill_every_step_and_the_vq_decoder():
    own = {"1 prefill": [1.0], "1 step": [0.5], "1 vq": [2.0], "1 image": [16.5], "1 share": [80.0]}
    theirs = {"1 prefill": [2.0], "1 step": [2.0], "1 vq": [2.0], "1 image": [64.0]}
    header, ours, torch = sampling.table({"jax bfloat16": [own], "torch bfloat16": [theirs]}, [1])
    assert ours == ("1", "jax bfloat16", "1", "500", "2", "16.5", "80", "4", "4")
    assert torch[-3:] == ("", "1", "1") and len(header) == 9


@pytest.mark.slow
def test_understanding(tmp_path, here):
    (header, *rows), text = run_few("understanding", tmp_path, "--batch", "2", "--vq-batch", "2")
    assert header[2:] == [*FEW["understanding"], "jax float32 x torch float32's best", "jax float32 x torch's best"]
    parts = ["SigLIP s", "VQ decode s", "up to the decoder s", "prefill s", "first token s", "tokens/s"]
    assert [row[:2] for row in rows] == [["2", part] for part in parts]
    for row in rows:
        assert min(numbers(row[2:])) > 0 and row[5] == row[6] != ""
        # With a static cache only the whole is measured.
        assert (row[4] != "") == (row[1] in ("first token s", "tokens/s"))
    assert "torch 2" in text and "transformers" in text


def test_ratios_are_to_the_best_of_torch():
    runs = {
        "jax float32": [{"1 first": [4.0], "1 step": [1.0]}],
        "jax bfloat16": [{"1 first": [2.0], "1 step": [0.5]}],
        "torch float32 eager": [{"1 first": [2.0], "1 step": [2.0]}],
        "torch float32 static": [{"1 first": [8.0], "1 step": [1.5]}],
        "torch bfloat16 eager": [{"1 first": [3.0], "1 step": [1.0]}],
    }
    header, first, rate = understanding.table(runs, [1])
    assert header[-4:] == tuple(
        f"jax {dtype} x {base}'s best" for dtype in ("float32", "bfloat16") for base in (f"torch {dtype}", "torch")
    )
    assert first[1:] == ("first token s", "4", "2", "2", "8", "3", "0.5", "0.5", "1.5", "1")
    assert rate[1:] == ("tokens/s", "1", "2", "0.5", "0.667", "1", "1.5", "1", "2", "2")


# ---------------------------------------------------------------- what they share


def test_medians_ratios_and_cells():
    runs = [{"step": [1.0, 3.0, 2.0]}, {"step": [4.0]}, {"other": 1.0}]
    assert _common.median(runs, "step") == 2.5
    assert math.isnan(_common.median(runs, "absent"))
    # By rounds: 4 / 2 and 6 / 2, where all together would be 5 / 2.
    assert _common.ratio([{"s": 4.0}, {"s": 6.0}, {"s": 8.0}], [{"s": 2.0}, {"s": 2.0}], "s") == 2.5
    assert math.isnan(_common.ratio([], [{"s": 1.0}], "s"))
    assert [_common.cell(x) for x in (0.01234, 1.5, 12345.6, 999.6, math.nan, None)] == [
        "0.0123", "1.5", "12,346", "1,000", "", ""
    ]  # fmt: skip


def test_append_keeps_what_is_there(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\n## One: `a`\n\nold\n\n## Two: `b`\n\nlast\n")
    _common.append(path, "One: `a`", "new")
    assert path.read_text() == "# Results\n\n## One: `a`\n\nold\n\nnew\n\n## Two: `b`\n\nlast\n"
    _common.append(path, "Three", "third")
    assert path.read_text().endswith("last\n\n## Three\n\nthird\n")
    _common.append(tmp_path / "new.md", "One", "text")
    assert (tmp_path / "new.md").read_text() == "# Results\n\n## One\n\ntext\n"


def test_a_variant_that_fails_is_named_and_not_run_again(monkeypatch, capsys):
    asked = []

    def child(name, arguments, environment):
        asked.append((arguments[-1], environment["ROUND"]))
        return {"failed": -9} if arguments[-1] == "b" else {"step": 1.0, "device": "a device"}

    monkeypatch.setattr(_common, "run_child", child)
    runs = _common.run_rounds("x", ["--some"], ["a", "b", "c"], 2, lambda number, variant: {"ROUND": str(number)})
    assert asked == [("a", "0"), ("b", "0"), ("c", "0"), ("a", "1"), ("c", "1")]
    assert set(_common.done(runs)) == {"a", "c"}
    assert _common.publish("x", "X", "about", [("one",), ("1",)], runs, ["--some"], None) == 1
    printed = capsys.readouterr().out
    assert "Failed: b (exit code -9)." in printed and "on a device;" in printed and "benchmarks.x --some" in printed


def test_what_was_measured_before_a_stop_is_kept(monkeypatch, capsys):
    def child(name, arguments, environment):
        if arguments[-1] == "b":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # which the signal ends
        return {"step": 1.0, "device": "a device"}

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(_common, "run_child", child)
    runs = _common.run_rounds("x", [], ["a", "b", "c"], 2)
    assert runs == {"a": [{"step": 1.0, "device": "a device"}], "b": [{"failed": -15}], "c": []}
    assert signal.getsignal(signal.SIGTERM) == before
    assert _common.publish("x", "X", "about", [("one",), ("1",)], runs, [], None) == 1
    assert "Failed: b (exit code -15)." in capsys.readouterr().out


def test_a_process_that_fails_is_reported():
    assert _common.run_child("compile", ["--preset", "janus_tiny", "--layers", "1"], {}) == {"failed": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("compile", ["--preset", "janus_9b"], "invalid choice: 'janus_9b'"),
        ("understanding", ["--variant", "torch float32 eager"], "unknown variant 'torch float32 eager'; known: jax"),
        ("training", ["--context", "1000"], "--context 1000 is not a multiple of 512"),
        ("training", ["--preset", "janus_pro_1b", "--context", "512"], "--context 512"),
        ("scaling", ["--steps", "32"], "--steps 32 is too many for a cache of 64 tokens"),
        ("load", ["--rounds", "0"], "must be at least 1, got 0"),
        ("load", ["--whole", "--until-loaded"], "--whole draws an image, --until-loaded draws none"),
    ],
)
def test_bad_arguments_get_one_line(name, arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    assert ended.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_bandwidth_and_weights():
    assert 1e8 < _device.copy_bandwidth(1 << 22) < 1e13
    bandwidth, rate = _device.product_rates("float32", 1 << 22)
    assert 1e8 < bandwidth < 1e13 and 1e8 < rate < 1e16
    weights = _device.random_array((3, 1000, 1000), "float32")
    assert weights.std() == pytest.approx(0.02, rel=0.01) and (weights[0] != weights[1]).mean() > 0.99
    _, params = _device.random_model(PRESETS["janus_tiny"], "bfloat16", "scanned", ["language_model"])
    assert set(params) == {"language_model"} and params["language_model"]["lm_head"]["kernel"].dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_in_processes_of_their_own(name, tmp_path):
    rows, _ = run(name, tmp_path)
    assert len(rows) > 2


@pytest.mark.slow
def test_forms(capsys):
    """The more bits, the nearer; and the command prints what was found."""
    config = PRESETS["janus_tiny"]
    found = forms.compare(config, ("int4", "int8", "float16"), 0, 24, lambda form: None)
    for kind in ("image logits", "text logits"):
        (four, *_), (eight, *_), (half, *_) = (by_kind[kind] for by_kind in found.values())
        assert 0 < half < 0.01 < eight < 0.1 < four < 1
        assert all(0 <= same <= 1 and kl >= 0 for _, same, kl in (by_kind[kind] for by_kind in found.values()))
    assert parity.main(["--preset", "janus_tiny", "--forms", "int8", "--tokens", "24"]) == 0
    told = capsys.readouterr().out
    assert "--tokens 24 --forms int8" in told and f"| int8 | {found['int8']['image logits'][0]:.1%}, " in told
    with pytest.raises(SystemExit):
        parity.main(["--preset", "janus_tiny", "--forms", "int8", "--tokens", "0"])
    assert "--tokens must be from 1 to" in capsys.readouterr().err
