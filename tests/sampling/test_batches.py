"""Cutting work into batches that fit: the arithmetic, and what the pipeline does when memory runs out."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from janus_jax import JanusPipeline
from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus
from janus_jax.sampling.batches import even_batches
from janus_jax.sampling.images import generate_codes
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import Options
from janus_jax.sharding import make_mesh
from tests.library.tiny_janus import SHORT, codes, folder, janus  # noqa: F401

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1234 bytes.\nBuffers:\n  ..."


@settings(deadline=None)
@given(total=st.integers(1, 300), size=st.integers(0, 400), multiple=st.integers(1, 16))
def test_batches_cover_everything_once(total, size, multiple):
    batches, padded = even_batches(total, size, multiple)
    assert [i for batch in batches for i in range(batch.start, batch.stop)] == list(range(total))
    assert all(batch.stop - batch.start == padded for batch in batches[:-1])
    assert 0 < batches[-1].stop - batches[-1].start <= padded


@settings(deadline=None)
@given(total=st.integers(1, 300), size=st.integers(0, 400), multiple=st.integers(1, 16))
def test_batches_are_few_and_fit(total, size, multiple):
    batches, padded = even_batches(total, size, multiple)
    assert padded % multiple == 0
    assert padded <= max(size, multiple), "larger than asked for"
    most = max(size // multiple, 1) * multiple
    assert len(batches) == math.ceil(total / most), "more batches than needed"
    # Equal: no smaller size would do with as many batches.
    assert padded == multiple or (padded - multiple) * len(batches) < total


# ---------------------------------------------------------------- in the pipeline


class Drawing:
    """Stands for `images.generate_codes`: codes that say which image they are of, and a memory of so many images."""

    def __init__(self, most: float = math.inf):
        self.most, self.sizes = most, []

    def __call__(self, model, params, ids, mask, keys, *, guidance, sampler, progress, speculate):
        self.sizes.append(len(ids))
        if len(ids) > self.most:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        for _ in range(model.config.gen_vision.num_tokens):
            if progress is not None:
                progress(1)
        assert len(ids) == len(mask) == len(keys)
        return np.asarray(jax.random.key_data(keys))[:, :1] + np.asarray(ids)[:, 0], None


TOTAL = 13


def draw(mesh=None, **settings) -> np.ndarray:
    """Which images came out, for a total of 13."""
    config = PRESETS["janus_tiny"]
    pipeline = JanusPipeline(config, {}, Janus(config), mesh=None if mesh is None else make_mesh(mesh))
    ids = np.arange(TOTAL, dtype=np.int32)[:, None, None].repeat(8, axis=2)
    keys = jax.random.wrap_key_data(np.zeros((TOTAL, 2), np.uint32))
    return pipeline.sample_codes(ids, ids >= 0, keys, Options(temperature=0), **settings)[:, 0]


@pytest.fixture
def drawing(monkeypatch):
    def replace(most: float = math.inf, free: int | None = None) -> Drawing:
        stub = Drawing(most)
        monkeypatch.setattr("janus_jax.pipeline.generate_codes", stub)
        monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: free)
        return stub

    return replace


@pytest.mark.parametrize(
    ("most", "batch_size", "sizes"),
    [
        (math.inf, None, [13]),
        (math.inf, 5, [5, 5, 5]),
        (math.inf, 100, [13]),
        (6, None, [13, 5, 5, 5]),
        (2, None, [13, 5, *[2] * 7]),
        (1, 4, [4, 2, *[1] * 13]),
    ],
)
def test_halved_until_it_fits(drawing, most, batch_size, sizes):
    stub = drawing(most)
    np.testing.assert_array_equal(draw(batch_size=batch_size), np.arange(TOTAL))
    assert stub.sizes == sizes


@pytest.mark.parametrize(("most", "sizes"), [(math.inf, [16]), (8, [16, 8, 8])])
def test_sizes_are_multiples_of_the_shards(drawing, most, sizes):
    stub = drawing(most)
    np.testing.assert_array_equal(draw({"data": 2, "fsdp": 4}), np.arange(TOTAL))
    assert stub.sizes == sizes


@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}])
def test_not_even_one(drawing, mesh):
    stub = drawing(0)
    with pytest.raises(OutOfMemory) as caught:
        draw(mesh)
    assert str(caught.value) == "drawing one image at a time does not fit in the device's memory"
    assert stub.sizes[-1] == (1 if mesh is None else 8)


def test_other_errors_pass(drawing, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("janus_jax.pipeline.generate_codes", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        draw()


def test_little_free_memory_cuts_into_parts(drawing):
    """An image takes at least its cache; eight shards hold eight times as much."""
    c = PRESETS["janus_tiny"].language
    cache = 4 * 2 * c.layers * c.kv_heads * c.head_dim * (8 + PRESETS["janus_tiny"].gen_vision.num_tokens)
    for free, mesh, largest in ((10**12, None, 13), (6 * cache, None, 5), (1, None, 1), (cache, {"fsdp": 8}, 8)):
        stub = drawing(free=free)
        np.testing.assert_array_equal(draw(mesh), np.arange(TOTAL))
        assert set(stub.sizes) == {max(stub.sizes)} and max(stub.sizes) <= largest
    assert stub.sizes == [8, 8]
    # Asked for by hand, the size is taken as it is.
    stub = drawing(free=1)
    draw(batch_size=7)
    assert stub.sizes == [7, 7]


def test_progress_starts_anew(drawing, capfd):
    drawing(most=6)
    draw(progress=True)
    steps = PRESETS["janus_tiny"].gen_vision.num_tokens
    assert f"{3 * steps}/{3 * steps}" in capfd.readouterr().err.splitlines()[-1]


def test_real_draws_after_running_out(janus, codes, monkeypatch):  # noqa: F811
    original, sizes = generate_codes, []

    def limited(model, params, ids, mask, keys, **kwargs):
        sizes.append(len(keys))
        if len(keys) > 2:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        return original(model, params, ids, mask, keys, **kwargs)

    monkeypatch.setattr("janus_jax.pipeline.generate_codes", limited)
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5), codes)
    assert sizes == [5, 2, 2, 2]


def test_several_processes_do_not_halve(drawing, monkeypatch):
    """One of them may have had the room: it waits within the larger batch, and would never try the smaller one."""
    stub = drawing(most=8)
    vars(make_mesh({"data": 2, "fsdp": 4})).pop("is_multi_process", None)  # meshes are shared, and remember the answer
    monkeypatch.setattr(Mesh, "is_multi_process", True)
    with pytest.raises(OutOfMemory) as caught:
        draw({"data": 2, "fsdp": 4})
    assert str(caught.value) == (
        "drawing 16 images at a time does not fit in the device's memory, and several processes cannot retry with 8; "
        "use a smaller batch"
    )
    assert stub.sizes == [16]
    stub.sizes.clear()
    np.testing.assert_array_equal(draw({"data": 2, "fsdp": 4}, batch_size=8), np.arange(TOTAL))
    assert stub.sizes == [8, 8]
