"""Two slices of devices: where the mesh puts them, that they train as one does, and what goes between them."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import batch_shards, flatten, make_mesh, param_shardings
from tests.emulated import emulate_slices
from train.data.batches import Assembler
from train.data.mixture import Mixture
from train.plan import hlo
from train.step.init import first_state
from train.step.state import abstract_batch, abstract_state, batch_sharding
from train.step.step import gradients
from train.validate import check_mesh

ROWS, SLICE = 16, 4


@pytest.fixture(autouse=True)
def two_slices(monkeypatch):
    monkeypatch.setattr(jax.Device, "slice_index", None, raising=False)  # and gone again after the test
    emulate_slices(2)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    folders = write_data(folder / "data", count=12)
    start = str(write_checkpoint(folder / "start"))
    config = tiny_config(folders, "unused", init_from=start, batch_size=ROWS, stage=2, accumulate=2)
    processor = Processor.from_folder(folders["tokenizer"], MODEL)
    ids = processor.tokenizer
    mixture = Mixture(config.data, ROWS, 0)
    return (
        config,
        processor.settings,
        Assembler(mixture, processor.settings, ids.pad_id, ids.image_placeholder_id)(0)[0],
    )


@pytest.fixture(scope="module")
def run(job):
    """The gradients and sums on a mesh, and the compiled program."""
    config, settings, batch = job

    @functools.cache
    def on(sizes: tuple[tuple[str, int], ...], count: int, **more):
        mesh = make_mesh(dict(sizes), jax.devices()[:count])
        own = dataclasses.replace(config, **more)
        state, frozen = first_state(own, mesh)
        placed = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
        step = jax.jit(functools.partial(gradients, own, mesh, settings))
        with jax.set_mesh(mesh):
            compiled = step.lower(state.trained, frozen, placed).compile()
        grads, sums = compiled(state.trained, frozen, placed)
        return flatten(jax.device_get(grads)), jax.device_get(sums), compiled.as_text()

    return on


def test_the_mesh_follows_the_slices():
    devices = jax.devices()
    mixed = [*itertools.chain.from_iterable(zip(devices[4:], devices[:4], strict=True))]
    mesh = make_mesh({"slices": 2, "fsdp": 2, "tensor": -1}, mixed)
    assert dict(mesh.shape) == {"slices": 2, "data": 1, "fsdp": 2, "tensor": 2} and batch_shards(mesh) == 4
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"slices": 3, "fsdp": -1}, "a mesh of slices=3 x data=1 x fsdp=-1 x tensor=1 does not match the 8 devices"),
        ({"slices": 4, "fsdp": -1}, "a mesh of slices=4, but the 8 devices are of 2 slices; set slices=2"),
    ],
)
def test_other_counts_are_refused(sizes, told):
    with pytest.raises(ValueError, match=told):
        make_mesh(sizes)


def test_devices_without_slices(monkeypatch):
    """Neither take more than one, nor do those that have them work as one on a TPU."""
    assert dict(make_mesh({"fsdp": 8}).shape)["slices"] == 1
    monkeypatch.setattr(jax.Device, "platform", "tpu")
    with pytest.raises(ValueError, match="a mesh of slices=1, but the 8 devices are of 2 slices; set slices=2"):
        make_mesh({"fsdp": 8})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a mesh of slices=2, but the 8 devices are of 1 slice; set slices=1"):
        make_mesh({"slices": 2, "fsdp": 4})


def check_same(ours, wanted):
    assert ours[1]["tokens"] == wanted[1]["tokens"] > 0
    norm = np.sqrt(sum(np.square(x).sum() for x in wanted[0].values()))
    for path, x in wanted[0].items():
        assert np.linalg.norm(ours[0][path] - x) < 1e-5 * norm, path


def sums_over_slices(jaxpr, loops: int = 0):
    """The arrays that are summed over slices, each with the number of loops that it is in."""
    for equation in jaxpr.eqns:
        if "slices" in equation.params.get("axes", ()):
            yield from ((x.aval, loops) for x in equation.invars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sums_over_slices(inner, loops + (equation.primitive.name in ("scan", "while")))


@pytest.mark.parametrize(("reduce_dtype", "sent"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_only_gradients_are_summed_over_slices_and_once_a_step(job, reduce_dtype, sent):
    config, settings, _ = job
    own = dataclasses.replace(config, compute_dtype="bfloat16", reduce_dtype=reduce_dtype)
    mesh = make_mesh({"slices": 2, "fsdp": 2, "tensor": 2})
    try:
        check_mesh(own, mesh)
    except ValueError as error:
        assert str(error).startswith("JAX 0.7.") and "use a newer JAX, or mesh.tensor=1" in str(error)
        return
    state, frozen = abstract_state(own, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(gradients, own, mesh, settings))
        found = list(sums_over_slices(step.trace(state.trained, frozen, abstract_batch(own, mesh)).jaxpr.jaxpr))
    # Shards over fsdp; those over tensor are the compiler's.
    shards = [(x.shape, x.sharding.spec) for x in jax.tree.leaves(state.trained)]
    wanted = [tuple(n // (2 if a == "fsdp" else 1) for n, a in zip(shape, spec, strict=True)) for shape, spec in shards]
    assert sorted(x.shape for x, _ in found) == sorted(wanted)
    assert {(str(x.dtype), loops) for x, loops in found} == {(sent, 0)}


SIZES = [(("slices", 2), *more) for more in ((("fsdp", 4),), (("fsdp", 2), ("tensor", 2)), (("data", 2), ("fsdp", 2)))]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_two_slices_come_to_what_one_device_does(run, sizes):
    """And only gradients and a few numbers cross, once a step; each device sends its shard."""
    ours, wanted = run(sizes, 8), run((), 1)
    check_same(ours, wanted)
    crossing = [one for one in hlo.instructions(ours[2]) if hlo.crosses_slices(one, SLICE)]
    assert crossing and not any(one.in_loop for one in crossing)
    sent = sum(np.prod(array.shape) for one in crossing for array in one.arrays if array.shape)
    mesh = make_mesh(dict(sizes))
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in wanted[0].items()}
    shardings = flatten(param_shardings(abstract, mesh))
    assert sent == sum(np.prod(shardings[path].shard_shape(x.shape)) for path, x in abstract.items())
