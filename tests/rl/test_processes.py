"""A run of GRPO in several real processes on one machine is the run of one process."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from examples.tiny.run import params_of
from tests.rl.test_answers import config_of, folder  # noqa: F401  (a fixture)
from tests.rl.test_run import folders, grpo_config  # noqa: F401  (a fixture)
from tests.several import environment, launch, outcome
from train.config import MeshConfig
from train.run import loop
from train.run.metrics import read_metrics

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
TOLD = ("reward", "reward_spread", "distinct", "kl", "entropy", "clip_share")


def write_config(path: pathlib.Path, made: str) -> pathlib.Path:
    path.write_text(
        "from tests.rl.test_answers import config_of\n"
        "from tests.rl.test_run import grpo_config\n"
        "from train.config import MeshConfig\n"
        "def get_config():\n"
        f"    return {made}, mesh={MESH!r}, steps=3)\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("drawn", ["pictures", "answers"])
def test_two_processes_of_four_devices_are_one_of_eight(drawn, folders, folder, tmp_path):  # noqa: F811
    """They draw the same pictures or answers, judge half of them each, and update the same parameters."""
    if drawn == "pictures":
        one, made = grpo_config(folders, tmp_path / "one", mesh=MESH, steps=3), f"grpo_config({folders!r}, 'run'"
    else:
        one, made = config_of(folder, str(tmp_path / "one"), mesh=MESH, steps=3), f"config_of({str(folder)!r}, 'run'"
    loop.train(one)
    config = write_config(tmp_path / "two.py", made)
    env = environment(4, JAX_DEFAULT_MATMUL_PRECISION="float32")
    told = outcome(launch(config, env, [tmp_path, tmp_path]))
    assert [code for code, _, _ in told] == [0, 0], told
    lines = [
        [line for line in read_metrics(folder) if "train/reward" in line] for folder in (one.workdir, tmp_path / "run")
    ]
    assert len(lines[0]) == len(lines[1]) == 3
    for ours, theirs in zip(*lines, strict=True):
        for name in TOLD:
            assert theirs[f"train/{name}"] == pytest.approx(ours[f"train/{name}"], rel=1e-5, abs=1e-7), name
    both = params_of(tmp_path / "run")
    for path, x in params_of(one.workdir).items():
        # The gradient of keys' biases is nothing but rounding, which Adam makes large.
        atol = 1e-4 if path.endswith("attn/k/bias") else 1e-6
        np.testing.assert_allclose(both[path], x, atol=atol, rtol=1e-5, err_msg=path)
