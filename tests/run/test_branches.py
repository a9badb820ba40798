"""Branches that depend on platform, number of processes or version, and that no other test takes on a CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import MODEL, write_checkpoint
from janus_jax import loading
from janus_jax.loading import layout
from janus_jax.sharding import flatten
from train.overrides import load_config
from train.run import distributed, lease, loop
from train.step.state import attention_on


@pytest.mark.parametrize(
    ("device", "dtype", "best"),
    [
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16", "cudnn"),
        ({"platform": "gpu", "compute_capability": "8.0"}, "bfloat16", "cudnn"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "bfloat16", "xla"),
        ({"platform": "gpu", "compute_capability": "10.0"}, "float32", "xla"),
        ({"platform": "gpu", "compute_capability": "gfx942"}, "bfloat16", "xla"),  # AMD's, which has no cuDNN
        ({"platform": "gpu"}, "bfloat16", "xla"),
        ({"platform": "tpu"}, "bfloat16", "splash"),
        ({"platform": "tpu"}, "float32", "splash"),
        ({"platform": "cpu"}, "bfloat16", "xla"),
        ({"platform": "another"}, "bfloat16", "xla"),
    ],
)
def test_attention_by_device(device, dtype, best):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(**device)]))
    config = dataclasses.replace(load_config("7b_stage3"), compute_dtype=dtype)
    assert attention_on(config, mesh) == best
    # Neither kernel takes rows of any other length.
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, context=1001))
    assert attention_on(odd, mesh) == "xla"
    assert attention_on(dataclasses.replace(config, attention="xla"), mesh) == "xla"


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16), ("cpu", jnp.float32)])
def test_loading_by_platform(tmp_path, monkeypatch, platform, dtype):
    folder = write_checkpoint(tmp_path / "model")
    device = types.SimpleNamespace(platform=platform, compute_capability="8.0")
    monkeypatch.setattr(loading, "first_device", lambda mesh: device)
    janus = janus_jax.load(folder, progress=False)
    assert {x.dtype for x in flatten(janus.params).values()} == {jnp.dtype(dtype)}
    assert layout(MODEL, platform)["scan_layers"] == janus.model.scan_layers


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "host[0-3]"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in the batch script itself, which srun has not started
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "host0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": "1"}, False),
    ],
)
def test_started_as_several(monkeypatch, env, several):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert distributed._started_as_several() == several


def test_other_versions_of_libraries_are_told(monkeypatch):
    """Process 1 has another jax: a line names it, in every process."""

    def gather(text: str) -> list[str]:
        host, mine = json.loads(text)
        theirs = {
            **mine,
            "code": {k: v for k, v in mine["code"].items() if not k.startswith("jax ")} | {"jax 0.1": "0.1"},
        }
        return [text, json.dumps(["host-1", theirs])] if host else []

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(ValueError, match=rf"code of process 1 \(host-1\) differs .*jax {jax.__version__}; jax 0.1$"):
        distributed.check_same({"steps": 3}, {})


def test_slices_that_the_devices_are_not_of_are_refused_before_anything_is_read():
    config = load_config("debug", ["mesh.slices=2", "mesh.fsdp=4", "init_from=nowhere", "tokenizer=nowhere"])
    with pytest.raises(ValueError, match="a mesh of slices=2, but the 8 devices are of 1 slice; set slices=1"):
        loop.train(config)


def test_leases_where_there_is_no_proc(tmp_path, monkeypatch):
    """As on macOS: a process that answers is the one that is meant."""
    monkeypatch.setattr(lease, "_PROC", tmp_path / "absent")
    (tmp_path / "run").mkdir()
    first = lease.Lease(tmp_path / "run")
    assert first.acquire() == ""
    with pytest.raises(ValueError, match="is in use by another start"):
        lease.Lease(tmp_path / "run").acquire()
    path = tmp_path / "run" / lease.FILE
    gone = os.fork()
    if not gone:
        os._exit(0)
    os.waitpid(gone, 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": gone}))
    assert lease.Lease(tmp_path / "run").acquire() == ""
