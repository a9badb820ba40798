"""A mesh axis more, added where the contract in `janus_jax.sharding` says, trains as one device does."""

import functools

import jax
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax import sharding
from janus_jax.processing.chat import Processor
from janus_jax.sharding import batch_shards, flatten, make_mesh
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.step.init import first_state
from train.step.state import batch_sharding
from train.step.step import gradients


@pytest.mark.slow
def test_an_axis_beside_data(tmp_path, monkeypatch):
    folders = write_data(tmp_path / "data", count=12)
    start = str(write_checkpoint(tmp_path / "start"))
    config = tiny_config(folders, "unused", init_from=start, batch_size=4, compute_dtype="float32", stage=2)
    processor = Processor.from_folder(folders["tokenizer"], MODEL)
    ids = processor.tokenizer
    make = Assembler(Mixture(config.data, 4, 0), processor.settings, ids.pad_id, ids.image_placeholder_id)
    batch = make(0)[0]

    def of(mesh):
        state, frozen = first_state(config, mesh)
        placed = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
        compiled = jax.jit(functools.partial(gradients, config, mesh, processor.settings))
        with jax.set_mesh(mesh):
            return jax.device_get(compiled(state.trained, frozen, placed))

    expected, sums = of(make_mesh({}, jax.devices()[:1]))
    monkeypatch.setattr(sharding, "MESH_AXES", ("slices", "replicas", *sharding.MESH_AXES[1:]))
    monkeypatch.setitem(sharding.RULES, "batch", ("slices", "replicas", "data", "fsdp"))
    mesh = make_mesh({"replicas": 2, "fsdp": 2, "tensor": 2})
    assert batch_shards(mesh) == 4
    got, of_mesh = of(mesh)
    assert of_mesh["tokens"] == sums["tokens"] > 0
    norm = np.sqrt(sum(np.square(x).sum() for x in flatten(expected).values()))
    for path, x in flatten(expected).items():
        assert np.linalg.norm(np.asarray(flatten(got)[path]) - x) < 1e-4 * norm, path
