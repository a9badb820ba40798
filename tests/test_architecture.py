"""The house: who may import whom, no circles, nothing too large, and a map that names every module.

Imports are read from the source, those within functions too: a late import is still a way up.
"""

from __future__ import annotations

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLACES = ("janus_jax", "train", "evals", "convert", "configs", "examples", "benchmarks", "notebooks", "tests")
# The rooms from the ground floor up. A room may import itself and those above it in this list, of its own place;
# a name that ends in `.*` means all modules of the folder.
FLOORS = (
    "janus_jax.io.*",
    "janus_jax.sizes janus_jax.config janus_jax.sharding janus_jax.compilation_cache janus_jax.hub janus_jax.processes",
    "janus_jax.model.*",
    "janus_jax.processing.*",
    "janus_jax.weights.*",
    "janus_jax.sampling.*",
    "janus_jax.pipeline",
    "janus_jax.inside",
    "janus_jax.loading",
    "janus_jax.serving.*",
    "janus_jax.serving.api.*",
    "janus_jax",
    "janus_jax.lmms_eval.*",
    "janus_jax.__main__",
    "train train.rl",
    "train.rl.config train.children",
    "train.config train.overrides train.command_line",
    "train.watch.writers",
    "train.step.*",
    "train.rl.loss train.rl.checks",
    "train.rl.update",
    "train.validate",
    "train.plan.*",
    "train.raw.*",
    "train.records.*",
    "train.rl.rewards train.rl.rewards.*",
    "train.data.*",
    "train.rl.reference",
    "train.run.distributed train.run.faults train.run.lease",
    "train.workdir.*",
    "train.rl.*",
    "train.run.* train.watch.benchmarks",
    "train.fleet.*",
    "train.watch.dry_run",
    "train.main train.prepare train.inspect train.inspect_page train.compile",
    "train.autoencoder.*",
    "train.vq",
    "train.tuning.*",
    "train.finetune",
    "evals.items",
    "evals.intervals evals.prompts evals.posting",
    "evals.read.* evals.rules.*",
    "evals.generation.dpg evals.generation.geneval evals.generation.layouts",
    "evals.generation.prompts",
    "evals.generation.task",
    "evals.tasks.*",
    "evals.hosts evals.progress",
    "evals.asking.*",
    "evals.judging",
    "evals.model",
    "evals.generation.*",
    "evals.evaluate",
    "evals.drawn",
    "evals.reports.*",
    "evals.main",
)
# What a place may import of the others.
OTHERS = {
    "janus_jax": set(),
    # A run asks benchmarks; evals knows nothing of training.
    "train": {"janus_jax", "evals"},
    "evals": {"janus_jax"},
    "convert": {"janus_jax"},
    "configs": {"janus_jax", "train", "examples"},
    "examples": {"janus_jax", "train", "evals"},
    "benchmarks": {"janus_jax", "train", "evals", "examples", "convert"},
    "notebooks": {"janus_jax", "train", "examples"},
    "tests": set(PLACES),
}


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of this project that `name` imports, anywhere in it."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; name the module in full"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in inner}
    return {module for module in found if module in MODULES} - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def floor_of(module: str) -> int:
    """The floor whose room names `module`, or else its folder."""
    for wanted in (module, f"{module.rpartition('.')[0]}.*", f"{'.'.join(module.split('.')[:2])}.*", f"{module}.*"):
        for floor, rooms in enumerate(FLOORS):
            if wanted in rooms.split():
                return floor
    raise AssertionError(f"{module} has no floor: give it one in FLOORS of {pathlib.Path(__file__).name}")


@pytest.mark.parametrize("place", ["janus_jax", "train", "evals"])
def test_nothing_imports_upwards(place):
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if module.split(".")[0] == other.split(".")[0] == place and floor_of(other) > floor_of(module)
    ]
    assert not wrong


@pytest.mark.parametrize("place", PLACES)
def test_places_import_what_they_may(place):
    allowed = OTHERS[place] | {place}
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if module.split(".")[0] == place and other.split(".")[0] not in allowed
    ]
    assert not wrong


def test_there_are_no_circles():
    """Modules that import nothing which is left are taken away, until none is left; what stays goes in circles."""
    left = {name: set(others) for name, others in IMPORTS.items()}
    while leaves := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in leaves}
    assert not left, f"circles within {sorted(left)}"


def test_planning_loads_no_data():
    """As Python does it, whatever the source says."""
    code = "import sys, train.compile; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"train.plan.programs", "train.plan.topologies", "train.step.step"} <= set(loaded.split())
    assert not [name for name in loaded.split() if name.startswith(("grain", "train.data", "train.raw"))]


# ---------------------------------------------------------------- the map, and sizes

# Where users look: tests mirror the modules, and a config is a file a run.
MAPPED = ("janus_jax", "train", "evals", "convert", "examples", "benchmarks", "notebooks")
MOST_LINES, MOST_MODULES = 400, 12


def test_the_map_names_every_module_once():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    part = re.search(r"^## Map\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    rows = re.findall(r"^\| `([^`]+\.py)` \| (.*) \|$", part, re.MULTILINE)
    named = [path for path, _ in rows]
    there = [path.relative_to(ROOT).as_posix() for name, path in MODULES.items() if name.split(".")[0] in MAPPED]
    missing = sorted({path for path in there if not path.endswith("__init__.py")} - set(named))
    gone = sorted(set(named) - set(there))
    assert not missing and not gone, f"docs/architecture.md: add a row for {missing}, take out {gone}"
    assert len(set(named)) == len(named)
    assert all(len(meaning) > 10 for _, meaning in rows)


def test_no_file_is_too_long():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MOST_LINES}


def test_no_folder_is_too_full():
    counts = collections.Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert not {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MOST_MODULES}
