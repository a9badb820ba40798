"""The shared step as TPU's compiler makes it: the cache is updated where it lies, and little else is moved."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLOTS, LAYERS = 16, 2
# In a process of its own, which compiles for a chip that is not there.
COMPILE = f"""
import dataclasses, json
from train.compile import _environment
from train.overrides import load_config
from train.plan.drawing import compile_serving
from train.plan.topologies import topology
_environment()
config = load_config("1b_stage3")
language = dataclasses.replace(config.model.language, layers={LAYERS})
config = dataclasses.replace(config, model=dataclasses.replace(config.model, language=language))
(made,) = compile_serving(config, topology("v5e-1"), {SLOTS})
print(json.dumps({{**made.arguments, **{{name: getattr(made, name) for name in TOLD}}}}))
""".replace("TOLD", str(("copies", "temporaries", "peak", "accessed", "floor")))


@pytest.mark.slow
def test_a_step_of_16_rows_copies_no_cache():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("TPU's compiler is not installed")
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # the tests' own are for CPUs
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    keys = made["cache"] // (2 * LAYERS)
    assert not made["copies"]
    assert made["temporaries"] < keys / 2, "there is room for a copy of a layer's keys"
    assert made["peak"] < made["parameters"] + made["cache"] + keys, "what comes in is not what goes out"
    assert made["accessed"] <= 1.1 * made["floor"], "a step moves more than weights and the filled cache"
