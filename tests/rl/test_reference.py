"""Log-probabilities of pairs by the reference: whose they are is known, and others are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.sharding import make_mesh
from tests.data.conftest import CONFIG, processor
from tests.data.test_prepare import encode
from tests.raw.test_sources import png
from train.data.prepared import open_prepared
from train.prepare import prepare
from train.raw.sources import RawSample
from train.rl.reference import FILE, params_digest, store_reference, stored_reference

__all__ = ["CONFIG", "processor"]


def params(dtype=np.float32, **changes):
    rng = np.random.default_rng(0)
    tree = {
        "a": {"kernel": rng.normal(size=(8, 16)), "bias": np.zeros(16)},
        "b": {"kernel": rng.normal(size=(3, 8, 4))},
    }
    for name, index in changes.items():
        tree["a"][name][index] += 2.0**-7 * (1 + abs(tree["a"][name][index]))
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
    return jax.tree.map(lambda x: x.astype(dtype), rounded)


def test_a_digest_is_of_values_names_and_places():
    whole = params_digest(params())
    assert params_digest(params()) == params_digest(params(jnp.bfloat16)) == whole and len(whole) == 16
    moved = params()
    moved["a"]["kernel"] = moved["a"]["kernel"][::-1]
    renamed = params()
    renamed["c"] = renamed.pop("b")
    turned = params()
    turned["b"]["kernel"] = turned["b"]["kernel"].reshape(8, 3, 4)
    others = [moved, renamed, turned, params(kernel=(0, 0)), params(kernel=(7, 15)), params(bias=3)]
    assert len({whole, *map(params_digest, others)}) == 1 + len(others)


def test_a_digest_does_not_depend_on_the_mesh():
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    specs = {"a": {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)}, "b": {"kernel": (None, "fsdp", None)}}
    laid = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))),
        params(), specs, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    assert params_digest(laid) == params_digest(params())


@pytest.fixture
def pairs(tmp_path, processor):
    samples = [RawSample(str(i), prompt=f"x {i}", images=(png((i, 0, 0)), png((0, i, 99)))) for i in range(3)]
    prepare(samples, tmp_path / "pairs", "preference", processor, encode=encode, context=100, progress=False)
    return open_prepared(tmp_path / "pairs")


VALUES = np.array([[-1.5, -2.0], [-3000.0 - 2.0**-30, -4.0], [0.0, -1e9]])


def test_computed_once(pairs):
    assert stored_reference(pairs, "ab" * 8) is None
    store_reference(pairs, "ab" * 8, VALUES)
    found = stored_reference(open_prepared(pairs.folder), "ab" * 8)
    np.testing.assert_array_equal(found, VALUES)
    assert found.dtype == np.float64
    assert not list(pairs.folder.glob("*.partial*")) and open_prepared(pairs.folder).fingerprint == pairs.fingerprint


def test_of_another_checkpoint(pairs):
    store_reference(pairs, "ab" * 8, VALUES)
    with pytest.raises(ValueError) as error:
        stored_reference(pairs, "cd" * 8)
    assert str(error.value) == (
        f"{pairs.folder}/{FILE} has log-probabilities of another reference (abababababababab) than the checkpoint that "
        "this run starts from (cdcdcdcdcdcdcdcd); start from that one, or delete it, and the run computes them again"
    )


def test_of_other_pairs_or_damaged(pairs, tmp_path, processor):
    store_reference(pairs, "ab" * 8, VALUES)
    content = (pairs.folder / FILE).read_bytes()
    samples = [RawSample(str(i), prompt=f"y {i}", images=(png((i, 0, 0)), png((0, i, 99)))) for i in range(3)]
    prepare(samples, tmp_path / "others", "preference", processor, encode=encode, context=100, progress=False)
    (tmp_path / "others" / FILE).write_bytes(content)
    with pytest.raises(
        ValueError, match="has log-probabilities of other pairs than those in its folder now; delete it"
    ):
        stored_reference(open_prepared(tmp_path / "others"), "ab" * 8)
    for damaged in (content[:100], content[:-30], b"", content[:200] + b"\0" * 9 + content[209:]):
        (pairs.folder / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"reference.npz is damaged \(.*\); delete it, and") as error:
            stored_reference(pairs, "ab" * 8)
        assert "\n" not in str(error.value)


def test_as_many_as_there_are_pairs(pairs):
    with pytest.raises(ValueError, match=r"of 3 pairs must be \[3, 2\], got \[2, 2\]"):
        store_reference(pairs, "ab" * 8, VALUES[:2])
