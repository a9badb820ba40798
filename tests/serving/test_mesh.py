"""The engine over a mesh: jobs that are drawn together get what one device gives each alone."""

# ruff: noqa: F811  (fixtures are imported)

import math

import jax
import numpy as np
import pytest

from janus_jax import load
from janus_jax.sampling.sampler import Options
from janus_jax.serving.engine import Engine
from janus_jax.serving.jobs import Ended, drawings, question
from janus_jax.sharding import make_mesh
from tests.library.tiny_janus import MESHES, QUESTION, SETTINGS, SHORT, codes, folder, janus  # noqa: F401
from tests.serving.test_engine import run

LIMIT = SETTINGS["max_new_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "speculate"), [({"tensor": 2}, False), (MESHES[-1], False), (MESHES[-1], 4)], ids=str
)
def test_a_mesh_serves_the_same(folder, janus, codes, shape, speculate):
    picture = np.random.default_rng(4).integers(0, 100, (40, 60, 3), np.uint8)
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    expected = [
        janus.chat(QUESTION, [picture], LIMIT, system_prompt=""),
        janus.chat(QUESTION, [picture], LIMIT, system_prompt="", **drawn),
    ]
    devices = jax.devices()[: math.prod(shape.values())]
    spread = load(folder, mesh=make_mesh(shape, devices))
    with Engine(spread, slots=6, speculate=speculate) as engine:
        options = (Options(temperature=0.0), Options(**drawn))
        asked = [question(spread, QUESTION, [picture], LIMIT, how, system_prompt="") for how in options]
        images = drawings(spread, SHORT, 2)
        ends = run(engine, *asked, *images)
    assert all(isinstance(end, Ended) for end in ends)
    assert [spread.processor.tokenizer.answer(job.tokens) for job in asked] == expected
    assert [job.tokens for job in images] == codes[:2].tolist()
