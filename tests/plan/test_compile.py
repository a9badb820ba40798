"""TPU slices, the layouts that the configs name for them, and compilation without a TPU."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from train import compile as ahead
from train.config import Layout, MeshConfig, TrainConfig, options_of, refused_options
from train.overrides import config_names, load_config
from train.plan import topologies
from train.plan.topologies import KNOWN, choose_layout, laid_out, topology
from train.step.leaves import abstract_leaves

ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is for Linux on x86")
cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
needs_cuda = pytest.mark.skipif(not cuda, reason="JAX's CUDA plugin is not installed")
SHIPPED = [name for name in config_names() if name.split("_")[0] in ("janus", "1b", "7b")]


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [
        ("v5e-256", "v5e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v6e-1", "v6e:1x1", 1),
        ("v5p:4x8x8", "v5p:4x8x8", 256),
        ("2xv5e-256", "2xv5e:16x16", 512),
        ("2xv5p:4x4x4", "2xv5p:4x4x4", 128),
        ("1xv6e-8", "v6e:2x4", 8),
        ("h100-1", "h100:1x1", 1),
        ("h200-16", "h200:2x8", 16),
    ],
)
def test_topologies_by_either_name(name, shape, chips):
    found = topology(name)
    assert (found.name, found.chips) == (shape, chips)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5p_128", "did you mean v5p-128"),
        ("v5e:3x3", r"Known: v5e-1 \(v5e:1x1\)"),
        ("tpu", r"v4-8 .*v6e-256.*h100-8"),
        ("h100-3", r"Known: h100-1 \(h100:1x1\)"),
        ("2xv5p_128", "unknown topology 'v5p_128'; did you mean v5p-128"),
        ("2xh100-8", "topology '2xh100-8' must be 1 to 256 slices of TPUs, such as 2xv5e-256"),
        ("0xv5e-8", "topology '0xv5e-8' must be 1 to 256 slices"),
    ],
)
def test_unknown_topologies_list_the_known_ones(name, told):
    with pytest.raises(ValueError, match=told) as error:
        topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_divide_their_homes(name):
    config = load_config(name)
    assert {layout.topology for layout in config.layouts} >= {"v5e-256", "v5p-128", "v6e-256", "2xv5e-256", "2xv5p-128"}
    for layout in config.layouts:
        place = topology(layout.topology)
        devices = devices_of(place)
        chosen = choose_layout(config, devices)
        assert (chosen.mesh, chosen.accumulate) == (layout.mesh, layout.accumulate)
        fixed = {axis: size for axis, size in dataclasses.asdict(layout.mesh).items() if size != -1}
        shards = place.chips // fixed["tensor"]
        assert fixed["slices"] == place.slices and place.chips // place.slices % (fixed["fsdp"] * fixed["tensor"]) == 0
        assert shards % fixed["fsdp"] == 0 and config.batch_size % (layout.accumulate * shards) == 0
        assert config.model.language.width % (128 * fixed["fsdp"]) == 0
    if name.endswith("3"):
        assert [layout.topology for layout in config.sampling_layouts] == ["v5e-8", "v6e-1", "v5p-8"]


def devices_of(place):
    each = place.chips // place.slices
    return [SimpleNamespace(device_kind=place.device_kind, slice_index=n // each) for n in range(place.chips)]


def test_as_many_chips_in_another_number_of_slices_have_no_layout():
    config = load_config("7b_stage3")
    assert choose_layout(config, devices_of(topology("v5p-256"))) is config
    assert choose_layout(config, devices_of(topology("4xv5p:2x4x4"))) is config


def test_compiler_options_of_a_layout_stay_if_the_compiler_knows_them(monkeypatch, capsys):
    """And the layout's only where the run has none of its own; nothing after the = leaves them out."""
    config = load_config("7b_stage3")
    layout = next(layout for layout in config.layouts if layout.topology == "v6e-256")
    assert layout.compiler_options and laid_out(config, layout).compiler_options == layout.compiler_options
    for given, kept in (([], ("xla_cpu_enable_fast_math=false",)), (["compiler_options="], ())):
        config = load_config("7b_stage3", given)
        mixed = dataclasses.replace(layout, compiler_options=("no_such=1", "xla_cpu_enable_fast_math=false"))
        monkeypatch.setattr(topologies.jax, "devices", lambda: devices_of(topology("v6e-256")))
        assert choose_layout(dataclasses.replace(config, layouts=(mixed,))).compiler_options == kept
    monkeypatch.undo()
    assert capsys.readouterr().err.count("No such compile option: 'no_such'; the step is compiled without it") == 1


@pytest.mark.parametrize(("option", "told"), [
    ("no_such=1", "compiler_options: No such compile option: 'no_such'"),
    ("xla_cpu_enable_fast_math=maybe", "compiler_options: While setting option xla_cpu_enable_fast_math, 'maybe' is"),
])  # fmt: skip
def test_options_that_the_compiler_refuses_are_one_line(option, told):
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda: 0, compiler_options=options_of((option,)))()
    assert refused_options(error.value).startswith(told) and refused_options(ValueError("other")) == ""


def test_a_mesh_that_is_given_stays():
    config = load_config("7b_stage3", ["mesh.fsdp=64", "mesh.data=4"])
    place = KNOWN["v5e-256"]
    assert choose_layout(config, devices_of(place)) is config
    assert choose_layout(load_config("7b_stage3"), jax.devices()).mesh == MeshConfig()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give --config NAME, or --all"),
        (["--config", "7b_stage9"], "unknown config '7b_stage9'"),
        (["--config", "7b_stage3", "--topology", "v5x-8"], "unknown topology 'v5x-8'"),
        (["--config", "debug"], "debug names no topology; give --topology"),
        (["--config", "debug", "--weights", "int8"], "--images and --weights are for --sampling"),
        (["--config", "debug", "--sampling", "--images", "0"], "--images must be at least 1, got 0"),
        (["--config", "debug", "--speculate", "8"], "--speculate is for --sampling and --serving"),
    ],
)
def test_bad_input_is_one_line(arguments, told, capsys):
    assert ahead.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0]


@pytest.mark.parametrize(("place", "extra"), [("v5e-256", "tpu"), ("h100-8", "cuda")])
def test_a_missing_compiler_is_one_line(monkeypatch, capsys, place, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ahead, "_environment", lambda: None)
    assert ahead.main(["--config", "7b_stage3", "--topology", place]) == 2
    assert f"pip install 'janus_jax[{extra}]'" in capsys.readouterr().err


SMALL = [
    "model.language.width=256",
    "model.language.heads=2",
    "model.language.kv_heads=2",
    "model.language.head_dim=128",
    "data.context=256",
    "loss_chunk=128",
    "compute_dtype=bfloat16",
    "frozen_dtype=bfloat16",
    "remat=full",
]


@needs_libtpu
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["mesh.fsdp=3"], "a mesh of slices=1 x data=1 x fsdp=3 x tensor=1 does not match the 4 devices"),
        pytest.param(["batch_size=6", "mesh.fsdp=4"], "batch_size=6 does not divide", marks=pytest.mark.slow),
        pytest.param(["model.language.width=250", "mesh.fsdp=4"], "does not divide the model", marks=pytest.mark.slow),
    ],
)
def test_layouts_that_do_not_fit_are_refused_before_compiling(overrides, told, capfd):
    done = _command("--config", "debug", "--topology", "v5e-4", *SMALL, *overrides)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if told in line] and "Traceback" not in done.stderr


_LOWER = """
import sys
from janus_jax.processing.images import ImageSettings
from janus_jax.sharding import make_mesh
from train.compile import _environment
from train.overrides import load_config
from train.plan.programs import devices_of, lower_step
from train.plan.topologies import topology
_environment()
config = load_config("debug", sys.argv[1:])
lowered, arguments = lower_step(config, make_mesh({"fsdp": 4}, devices_of(topology("v5e-4"))), ImageSettings(384))
assert "sharding" in lowered.as_text() and all(arguments.values()), arguments
"""


@needs_libtpu
def test_a_small_step_is_lowered():
    """Devices that are not there compute nothing: what is computed while the step is made is computed elsewhere."""
    done = subprocess.run([sys.executable, "-c", _LOWER, *SMALL], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param("v5e-4", marks=needs_libtpu), pytest.param("h100-4", marks=needs_cuda)])
def test_a_small_step_compiles(place):
    """With the accelerator's own compiler: what it asks of a chip, and no collective but those of the sharding."""
    done = _command("--config", "debug", "--topology", place, *SMALL, "mesh.data=2", "mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert {"parameters", "optimizer", "batch", "temporaries", "peak", "all-gather", "reduce-scatter"} <= set(lines)
    assert not {"collective-permute", "all-to-all"} & set(lines)


@needs_libtpu
@pytest.mark.slow
def test_between_slices_go_gradients_once_a_step():
    """In the program of TPU's compiler: at most a sum for each trained array, and one for all losses and counts."""
    layout = ["mesh.slices=2", "mesh.data=8", "batch_size=64", "accumulate=2"]
    done = _command("--config", "debug", "--topology", "2xv5e-16", *SMALL, *layout)
    assert done.returncode == 0, done.stderr
    assert "32 chips in 2 slices, slices 2 x data 8 x fsdp 2 x tensor 1" in done.stdout
    trained = jax.tree.leaves(abstract_leaves(load_config("debug", SMALL))[0])
    ((count, kind),) = re.findall(r"between slices +(\d+) (\S+) with", done.stdout)
    assert 1 < int(count) <= len(trained) + 1 and kind == "all-reduce"


MOVED = re.compile(r"a step moves (\S+) GiB and computes \S+ TFLOP; parameters and cache are (\S+) GiB")


@needs_cuda
@pytest.mark.parametrize(
    ("place", "more", "most"),
    [
        ("h100-1", (), 1.3),
        ("h100-1", ("--images", "4", "--speculate", "8"), 2.5),
        ("h100-1", ("--images", "4", "--weights", "int8"), 1.3),
        ("h100-1", ("--weights", "int4"), 1.3),
        ("t4-1", ("--weights", "int8"), 1.1),
        ("t4-1", ("--weights", "int4"), 1.1),
    ],
)
def test_sampling_on_a_gpu_reads_weights_and_cache_once(place, more, most):
    """A loop over stacked layers would move three times as much: XLA copies each of them out."""
    fitting = ["model.language.layers=4", "model.language.width=1024", "model.language.mlp_dim=2816"]
    heads = ["model.language.heads=8", "model.language.kv_heads=8", "model.language.head_dim=128"]
    done = _command("--config", "debug", "--topology", place, "--sampling", *more, *fitting, *heads)
    assert done.returncode == 0, done.stderr
    moved, least = map(float, MOVED.search(done.stdout).groups())
    assert least <= moved < most * least
    assert "copies of cache or weights in the loop: 0" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_sampling_with_int4_on_a_tpu_reads_weights_and_cache_once():
    """With 7B's widths; a kernel that is written out in bfloat16 moves several times as much, or fills fast memory."""
    sizes = {"layers": 4, "width": 4096, "mlp_dim": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128}
    overrides = [f"model.language.{key}={value}" for key, value in sizes.items()]
    done = _command("--config", "debug", "--topology", "v5e-1", "--sampling", "--weights", "int4", *overrides)
    assert done.returncode == 0, done.stderr
    moved, least = map(float, MOVED.search(done.stdout).groups())
    # Some of four layers stays in fast memory from step to step.
    assert 0.5 * least < moved < 1.1 * least
    assert "copies of cache or weights in the loop: 0" in done.stdout


def _command(*arguments: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-m", "train.compile", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def test_a_home_is_part_of_a_config():
    layout = Layout("v5e-8", MeshConfig(fsdp=4, tensor=2), accumulate=2, remat="dots")
    config = dataclasses.replace(load_config("debug"), layouts=(layout,))
    assert isinstance(config, TrainConfig)
    (made, place), *others = ahead.jobs(config, None, sample=False)
    assert not others and place == KNOWN["v5e-8"]
    assert (made.mesh, made.accumulate, made.remat) == (layout.mesh, 2, "dots")
