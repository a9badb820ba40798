"""The dtype in which gradients are summed over devices: as the config says, and what it costs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import flatten, make_mesh
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.step import step as step_module
from train.step.init import first_state
from train.step.state import batch_sharding

ROWS = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    folders = write_data(folder / "data", count=12)
    start = str(write_checkpoint(folder / "start"))
    config = tiny_config(folders, "unused", init_from=start, batch_size=ROWS, compute_dtype="bfloat16", stage=2)
    processor = Processor.from_folder(folders["tokenizer"], MODEL)
    ids = processor.tokenizer
    mixture = Mixture(config.data, ROWS, 0)
    batch = Assembler(mixture, processor.settings, ids.pad_id, ids.image_placeholder_id)(0)[0]
    return config, processor.settings, batch


@pytest.fixture(scope="module")
def lower(job):
    """The lowered gradients of a config on a mesh of so many devices, and their arguments."""
    config, settings, batch = job

    @functools.cache
    def make(reduce_dtype: str, sizes: tuple[tuple[str, int], ...], count: int, compute_dtype: str = "bfloat16"):
        own = dataclasses.replace(config, reduce_dtype=reduce_dtype, compute_dtype=compute_dtype)
        mesh = make_mesh(dict(sizes), jax.devices()[:count])
        state, frozen = first_state(own, mesh)
        placed = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
        gradients = jax.jit(functools.partial(step_module.gradients, own, mesh, settings))
        arguments = state.trained, frozen, placed
        with jax.set_mesh(mesh):
            return gradients.lower(*arguments), arguments

    return make


EIGHT = (("data", 2), ("fsdp", 4)), 8
ONE = (), 1


def reduced_bytes(text: str) -> dict[str, int]:
    """Bytes that go into sums over devices, by dtype, of the program `text` (loops counted once)."""
    found: collections.Counter[str] = collections.Counter()
    for one in re.finditer(r'"stablehlo\.(?:reduce_scatter|all_reduce)".*?\}\) : \(tensor<([^>]*)>', text, re.S):
        *shape, dtype = one[1].split("x")
        if dtype[0] == "i":  # counts
            continue
        found[dtype] += int(np.prod([int(n) for n in shape])) * (2 if dtype == "bf16" else 4)
    return dict(found)


@pytest.mark.slow
def test_sums_travel_in_the_dtype_of_the_config(lower):
    bytes_of = {dtype: reduced_bytes(lower(dtype, *EIGHT)[0].as_text()) for dtype in ("bfloat16", "float32")}
    print(bytes_of)
    small = bytes_of["bfloat16"].get("f32", 0)  # losses, counts
    assert small < 10_000 and bytes_of["bfloat16"]["bf16"] > 100_000
    assert bytes_of["float32"].keys() == {"f32"}
    assert bytes_of["float32"]["f32"] - small == 2 * bytes_of["bfloat16"]["bf16"]
    # A run in float32 sums in float32 whatever is said.
    assert reduced_bytes(lower("bfloat16", *EIGHT, "float32")[0].as_text()).keys() == {"f32"}


def distance(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> float:
    """Of all gradients together, as a part of y's norm."""
    squares = [np.square(x[path] - y[path], dtype=np.float64).sum() for path in y]
    return float(np.sqrt(sum(squares) / sum(np.square(a, dtype=np.float64).sum() for a in y.values())))


@pytest.mark.slow
def test_eight_devices_come_to_what_one_does(lower):
    def gradients(*which):
        lowered, arguments = lower(*which)
        return flatten(jax.device_get(lowered.compile()(*arguments)[0]))

    true = gradients("float32", *ONE, "float32")
    one = gradients("float32", *ONE)
    found = {dtype: gradients(dtype, *EIGHT) for dtype in ("bfloat16", "float32")}
    assert all(x.dtype == np.float32 for x in found["float32"].values())
    errors = {"one device": distance(one, true)} | {dtype: distance(x, true) for dtype, x in found.items()}
    apart = {dtype: distance(x, one) for dtype, x in found.items()}
    print(f"from float32's: {errors}; from one device's in bfloat16: {apart}")
    # What products in bfloat16 cost is more than what sums in bfloat16 add.
    assert errors["float32"] < 1.1 * errors["one device"]
    assert errors["bfloat16"] < 1.5 * errors["one device"]
    assert apart["float32"] < apart["bfloat16"]
