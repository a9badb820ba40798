"""The search for a layout: which ones are compiled, and in what order they are reported."""

import dataclasses
import math

import pytest

from tests.plan.test_compile import SMALL, _command, needs_libtpu
from train.config import REMATS, MeshConfig
from train.overrides import load_config
from train.plan import tune as tuning
from train.plan.hlo import Traffic
from train.plan.programs import Compiled, DoesNotFit
from train.plan.topologies import COMPILER_OPTIONS, topology

V5E = topology("v5e-4")


@pytest.fixture
def compiler(monkeypatch):
    """Tells what would be compiled: activations take less memory the more is computed twice, and the more micro-batches
    there are, and more with parameters over fewer chips."""
    tried = []

    def compile_training(config, place):
        tried.append((config.mesh.fsdp, config.remat, config.accumulate))
        kept = {"none": 16, "dots": 4, "attention": 2, "full": 1}[config.remat] / config.accumulate
        peak = kept * 4 * 2**30 + 8 * 2**30 / config.mesh.fsdp
        if peak > place.hbm:
            raise DoesNotFit("too large")
        flops = 1e12 * {"none": 1, "dots": 1.02, "attention": 1.15, "full": 1.33}[config.remat]
        moved = int(1e9 * config.accumulate * (2 if config.mesh.fsdp == 4 else 1))
        mesh = dataclasses.asdict(config.mesh)
        collectives = {"all-gather": Traffic(1, moved, moved)}
        more = {"accumulate": config.accumulate, "executed": flops, "needed": 1e12}
        return Compiled("x", place, mesh, {}, 0, int(peak), 1.0, collectives, **more)

    monkeypatch.setattr(tuning, "compile_training", compile_training)
    return tried


def test_what_could_only_be_slower_is_not_compiled(compiler):
    config, said = load_config("debug", ["batch_size=32"]), []
    found = tuning.tune(config, V5E, [MeshConfig(data=-1, fsdp=4), MeshConfig(data=-1, fsdp=2)], said.append)
    first = [(remat, count) for fsdp, remat, count in compiler if fsdp == 4]
    # Nothing recomputed takes 8 micro-batches; then fewer of them, until one is enough.
    assert first == [("none", 1), ("none", 2), ("none", 4), ("none", 8), ("dots", 1), ("dots", 2), ("attention", 1)]
    assert [made.peak for _, made in found] and all(made.fits for _, made in found)
    seconds = [made.least_seconds for _, made in found]
    assert seconds == sorted(seconds)
    # One micro-batch with the MLP computed twice moves least: 1e9 bytes on the smaller mesh.
    assert (found[0][0].mesh.fsdp, found[0][0].remat, found[0][0].accumulate) == (2, "attention", 1)
    wanted = "mesh.slices=1 mesh.data=-1 mesh.fsdp=2 mesh.tensor=1 accumulate=1 remat=attention"
    assert tuning.layout_words(found[0][0]) == wanted
    assert list(tuning.report(found))[-1].startswith(tuning.layout_words(found[0][0]))
    assert len(said) == 2 * len(compiler) and "too large" in said[1]


def test_the_best_is_tried_with_the_topologys_compiler_options(monkeypatch):
    def compile_training(config, place):
        waits = 0 if config.compiler_options else 10**9
        collectives = {"all-gather": Traffic(1, 10**9, 10**9, overlapped=10**9 - waits)}
        return Compiled("x", place, {}, {}, 0, 1, 1.0, collectives, executed=1e12, needed=1e12)

    monkeypatch.setattr(tuning, "compile_training", compile_training)
    config, place = load_config("debug", ["batch_size=256"]), topology("v6e-256")
    found = tuning.tune(config, place, [MeshConfig(data=-1)], lambda _: None)
    assert [made.compiler_options for made, _ in found] == [COMPILER_OPTIONS["v6e"], ()]
    assert "compiler_options=xla_tpu_enable_sparse_core" in tuning.layout_words(found[0][0])
    given = dataclasses.replace(config, compiler_options=("x=1",))
    assert [made.compiler_options for made, _ in tuning.tune(given, place, [MeshConfig()], lambda _: None)] == [
        ("x=1",)
    ]


@pytest.mark.parametrize(("batch", "mesh", "counts"), [
    (32, MeshConfig(data=-1, fsdp=4), [1, 2, 4, 8]),
    (12, MeshConfig(fsdp=-1), [1]),
    (24, MeshConfig(fsdp=2, tensor=2), [1, 2, 4]),
])  # fmt: skip
def test_micro_batches_leave_each_device_a_row(batch, mesh, counts):
    assert tuning.micro_batches(load_config("debug", [f"batch_size={batch}"]), mesh, V5E) == counts


@pytest.mark.parametrize(("mesh", "sizes"), [
    (MeshConfig(data=-1, fsdp=2), [2, 1, 4]),
    (MeshConfig(fsdp=-1), [4, 2]),
    (MeshConfig(data=1, fsdp=-1, tensor=2), [2, 1]),
])  # fmt: skip
def test_meshes_nearby(mesh, sizes):
    found = tuning.near(mesh, V5E)
    assert [one.fsdp for one in found] == sizes
    assert all((one.data, one.tensor) == (-1, mesh.tensor) and 4 % (one.fsdp * one.tensor) == 0 for one in found)


def test_seconds_at_least():
    """The longer of products and memory, and what is waited for; links between hosts of GPUs are not known."""
    collectives = {"all-reduce": Traffic(1, 45 * 10**10, 45 * 10**10)}
    for place, accessed, seconds in (
        ("h100-8", None, 2), ("h100-8", 3.352e12 / 2, 2), ("h100-8", 3 * 3.352e12, 4), ("h100-16", None, 1),
    ):  # fmt: skip
        more = {"executed": 989e12, "needed": 1.0, "accessed": accessed}
        made = Compiled("x", topology(place), {}, {}, 0, 0, 1.0, collectives, **more)
        assert made.least_seconds == pytest.approx(seconds), (place, accessed)
    assert math.isnan(Compiled("x", V5E, {}, {}, 0, 0, 1.0, {}).recomputation)


def test_what_is_computed_beside_is_not_waited_for():
    collectives = {"all-gather": Traffic(4, 800, 200, overlapped=600), "all-reduce": Traffic(1, 200, 200)}
    made = Compiled("x", V5E, {}, {}, 0, 0, 1.0, collectives)
    assert made.waited_for == 400 and made.overlap == pytest.approx(0.6)
    assert Compiled("x", V5E, {}, {}, 0, 0, 1.0, {}).overlap == 1


@pytest.mark.slow
@needs_libtpu
def test_the_real_compiler(tmp_path):
    """Each remat executes what it should on top of what a step needs, by the compiled programs' own products."""
    found = {}
    for remat in REMATS[1:]:
        overrides = [one for one in SMALL if not one.startswith("remat")]
        table = tmp_path / f"{remat}.md"
        mesh = ["mesh.data=2", "mesh.fsdp=2", f"remat={remat}", "batch_size=16"]
        done = _command("--config", "debug", "--topology", "v5e-4", "--table", str(table), *overrides, *mesh)
        assert done.returncode == 0, done.stderr
        head, _, row = (line.split(" | ") for line in table.read_text().splitlines())
        found[remat] = float(row[head.index("executed / needed FLOPs")])
    assert 1 <= found["dots"] < 1.05 < found["attention"] < 1.15 < found["full"] < 1.3
