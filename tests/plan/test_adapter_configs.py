"""Runs of adapters in configs/lora, and adapters in any other run."""

import jax
import pytest

from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights.quantize import array_bytes
from train.config import AdapterConfig
from train.overrides import load_config
from train.plan import programs
from train.plan.topologies import topology
from train.step.state import abstract_state
from train.validate import validate


def test_adapters_of_the_released_models():
    sizes = {}
    for name, weights in (("lora_1b", None), ("lora_7b", "int4")):
        c = load_config(name)
        assert (c.name, c.init_from, c.adapter.weights) == (name, f"deepseek-ai/Janus-Pro-{name[-2:].upper()}", weights)
        assert {layout.topology for layout in c.layouts} == {"v5e-1", "t4-1"}
        state, frozen = abstract_state(c, make_mesh({}, jax.devices()[:1]))
        sizes[name] = sum(x.size for x in jax.tree.leaves(state.trained))
        kernels = {x.dtype.name for path, x in flatten(frozen).items() if path.endswith("up_proj/kernel")}
        assert kernels == {weights or "bfloat16"}
    # Rank 16 on seven projections: sums of inputs and outputs, times layers.
    assert sizes["lora_1b"] == 16 * 24 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
    assert sizes["lora_7b"] == 16 * 30 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


def test_a_part_that_is_left_out_is_set_by_its_fields():
    config = load_config("1b_stage3", ["adapter.rank=8", "init_from=x"])
    assert config.adapter == AdapterConfig(rank=8)
    assert load_config("lora_1b", ["adapter=none"]).adapter is None
    with pytest.raises(ValueError, match=r"adapter is not a single value; set its fields: adapter\.rank"):
        load_config("1b_stage3", ["adapter=lora"])
    with pytest.raises(ValueError, match=r"unknown key 'adapter\.dropout'"):
        load_config("lora_1b", ["adapter.dropout=0.1"])
    with pytest.raises(ValueError, match="compute_dtype=float16 has too little range for the gradients of whole parts"):
        validate(load_config("1b_stage3", ["compute_dtype=float16"]))


@pytest.mark.slow
def test_a_step_of_an_adapter_is_compiled_ahead(monkeypatch):
    """Here for this machine's own device: what is trained has moments, and int4 counts half a byte."""
    monkeypatch.setattr(programs, "devices_of", lambda place: jax.devices()[:1])
    smallest = ["model.language.layers=1", "data.ratio=0,1,1", "data.context=64", "batch_size=1", "remat=none"]
    config = load_config("debug", ["adapter.rank=4", "adapter.targets=attention", "adapter.weights=int4", *smallest])
    made = programs.compile_training(config, topology("t4-1"))
    state, frozen = abstract_state(config, make_mesh({}, jax.devices()[:1]))
    trained = sum(4 * x.size for x in jax.tree.leaves(state.trained))
    stored = sum(array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(frozen))
    assert made.arguments["parameters"] == trained + stored
    assert 2 * trained <= made.arguments["optimizer state"] < 2 * trained + 64
    assert made.peak >= sum(made.arguments.values()) + made.temporaries and made.fits
