"""The golden checkpoint as tests of checkpoints take it; a test file may have fixtures of these names of its own."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import pytest

from janus_jax.config import JanusConfig, read_config
from janus_jax.weights.torch_weights import read_params
from tests.weights.golden import GOLDEN


@pytest.fixture(scope="session")
def config() -> JanusConfig:
    return read_config(GOLDEN)


@pytest.fixture(scope="module")
def golden(config):
    return read_params(GOLDEN, config, as_numpy=True)[0]


@pytest.fixture
def state() -> dict[str, Any]:
    """The checkpoint's torch tensors."""
    from tests.torch_oracle import load_file  # late: skips where torch is not installed

    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A checkpoint folder that still lacks its weights."""
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "config.json")
    return tmp_path
