"""The programs of a step of GRPO and of DPO, compiled ahead, and the table of what each part takes."""

import dataclasses
import math
import re

import jax
import pytest

from tests.plan.test_compile import SMALL, _command, needs_cuda, needs_libtpu
from train.config import DpoConfig, GrpoConfig
from train.overrides import load_config
from train.plan import reinforcement
from train.plan.programs import Compiled
from train.plan.reinforcement import ROLLOUT, SCORING, UPDATE, compile_reinforcement, step_table
from train.plan.topologies import GPUS, topology

V5P = topology("v5p-64")


def made(part: str, seconds: float, runs: float = 1, peak: int = 2**30) -> Compiled:
    """A program that is bound by memory."""
    more = {"executed": 1e12, "accessed": seconds * V5P.bandwidth, "part": part, "runs": runs}
    return Compiled(part, V5P, {}, {}, 0, peak, 1.0, {}, **more)


def test_the_table_of_a_step():
    """Shares of seconds, by how often a step runs each program."""
    programs = [
        made(ROLLOUT, 1.0), made(ROLLOUT, 0.01, runs=500, peak=90 << 30), made(SCORING, 1.0), made(UPDATE, 3.0),
        made(SCORING, 7.0, runs=0),
    ]  # fmt: skip
    config = load_config("grpo_7b")
    first, *lines, last = step_table(config, programs)
    assert "peak 90.00 GiB of 95.74 a chip, fits; at least 10.00 s (predicted)" in first
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    parts = {row[0]: row[1:] for row in cells if row[0] in (ROLLOUT, SCORING, UPDATE)}
    assert parts[ROLLOUT] == ["90.00", "501.0", f"{6 * V5P.bandwidth / 2**30:.0f}", "6.000", "60%"]
    assert [parts[name][-1] for name in (SCORING, UPDATE)] == ["10%", "30%"]
    assert last.startswith("at most 360 steps of 16 groups of 8 an hour, 46,080 pictures (predicted;")
    programs[1] = dataclasses.replace(programs[1], peak=94 << 30)
    assert "does not fit with 5% to spare" in next(step_table(config, programs))


@pytest.mark.parametrize("name", ["grpo_7b", "grpo_1b", "grpo_answers_1b", "dpo_1b"])
def test_layouts_divide_their_homes(name):
    config = load_config(name)
    assert config.layouts
    for layout in config.layouts:
        place, mesh = topology(layout.topology), layout.mesh
        assert math.prod(dataclasses.astuple(mesh)) == place.chips
        parts = layout.accumulate * (config.grpo.updates if config.grpo else 1)
        assert config.batch_size % (parts * place.chips // mesh.tensor) == 0
        language = config.model.language
        assert language.width % mesh.fsdp == 0 and language.kv_heads % mesh.tensor == 0
        assert place.generation in GPUS or language.width % (128 * mesh.fsdp) == 0


def small(**changes):
    """A model that is compiled in seconds, and 8 pictures a step."""
    sizes = ["model.language.layers=1", "data.context=64", "batch_size=8", "remat=none", "loss_chunk=16"]
    return dataclasses.replace(load_config("debug", sizes), **changes)


GRPO = GrpoConfig(prompts=("x",), group=4, guidance=2.0, draw_batch=4, updates=2, kl=0.1)


@pytest.mark.slow
def test_a_step_of_grpo_is_compiled_ahead(monkeypatch):
    """Here for this machine's own device: which programs there are, and what lies on the device beside each."""
    monkeypatch.setattr(reinforcement, "devices_of", lambda place: jax.devices()[:1])
    place, config = topology("t4-1"), small(grpo=GRPO)
    programs = list(compile_reinforcement(config, place))
    assert [one.part for one in programs] == [ROLLOUT] * 4 + [SCORING] * 2 + [UPDATE]
    codes = config.model.gen_vision.num_tokens
    # Pictures are drawn in two parts, of which each is decoded at once; the first code comes with the prefill.
    assert [one.runs for one in programs] == [1, 2, 2 * (codes - 1), 2, 1, 1, 1]
    whole = programs[0].arguments
    for one in programs:
        assert whole.items() <= one.arguments.items() and one.peak >= sum(one.arguments.values()) and one.accessed > 0
    assert 2 * whole["reference"] <= whole["optimizer state"] < 2 * whole["reference"] + 64 < 2 * whole["parameters"]
    assert programs[2].arguments["cache"] > 0 and programs[2].floor <= programs[2].accessed
    old, reference, updates = (one.executed for one in programs[-3:])
    # Both rows of a prompt, forward; then the conditional one backward, too.
    assert old == reference and 1.8 * old < updates < 2.2 * old
    text = "\n".join(line for one in programs for line in (*one.lines(), *step_table(config, programs)))
    assert "nan" not in text and "2 updates" in text

    without = dataclasses.replace(GRPO, kl=0.0, loss="none", draw_batch=0)
    alone = list(compile_reinforcement(small(grpo=without), place))
    assert [one.part for one in alone] == [ROLLOUT] * 4 + [SCORING, UPDATE]
    assert "reference" not in alone[0].arguments and [one.runs for one in alone[1:4]] == [1, codes - 1, 1]


@pytest.mark.slow
def test_a_step_of_dpo_is_compiled_ahead(monkeypatch):
    monkeypatch.setattr(reinforcement, "devices_of", lambda place: jax.devices()[:1])
    config = small(dpo=DpoConfig(pairs=("x",)))
    reference, update = compile_reinforcement(config, topology("t4-1"))
    assert reference.runs == 0 and 2.5 * reference.executed < update.executed < 3.5 * reference.executed
    lines = list(step_table(config, [reference, update]))
    assert len(lines) == 5 and lines[3].startswith("| update |") and lines[3].endswith("| 100% |")
    assert lines[4].endswith(" steps of 8 pairs an hour (predicted)")


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param("v5e-4", marks=needs_libtpu), pytest.param("h100-4", marks=needs_cuda)])
def test_a_small_step_compiles_with_an_accelerators_compiler(place, tmp_path):
    path = tmp_path / "grpo.py"
    path.write_text(
        "import dataclasses\nfrom configs import debug\nfrom tests.plan.test_reinforcement import GRPO\n\n\n"
        "def get_config():\n    return dataclasses.replace(debug.get_config(), grpo=GRPO)\n"
    )
    sizes = [*SMALL, "batch_size=16", "loss_chunk=16", "mesh.data=2", "mesh.fsdp=2"]
    done = _command("--config", str(path), "--topology", place, *sizes)
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"^\| (rollout|log-probabilities|update) .*\| (\d+)% \|$", done.stdout, re.MULTILINE)
    assert [name for name, _ in shares] == [ROLLOUT, SCORING, UPDATE]
    assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=2)
    assert "copies of cache or weights in the loop: 0" in done.stdout
    # Drawing sends nothing but the weights: each chip draws its own pictures.
    code = done.stdout.partition("rollout: a code of 4")[2].partition("compiled in")[0]
    assert "cache" in code and not re.search(r"all-gather|all-reduce|all-to-all|permute", code)
