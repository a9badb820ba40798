"""The golden checkpoint, and what it takes for two trees to be the same."""

from __future__ import annotations

import pathlib

import numpy as np
from flax import traverse_util

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"


def flatten(tree) -> dict[tuple[str, ...], np.ndarray]:
    return traverse_util.flatten_dict(tree)


def assert_same_trees(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].dtype == other[path].dtype and one[path].shape == other[path].shape, path
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(other[path]), err_msg="/".join(path))
