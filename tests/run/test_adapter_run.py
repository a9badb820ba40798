"""Whole runs that train an adapter: stopped and resumed, exported as PEFT does, loaded again."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import tiny_config, write_checkpoint, write_data
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights.adapters.peft_files import CONFIG, WEIGHTS, read_adapter
from tests.library.tiny_janus import raises_one_line
from train.config import AdapterConfig, SampleConfig, TrainConfig
from train.run import loop
from train.step.init import open_sources


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh({}, jax.devices()[:1]))
    folders = write_data(tmp_path / "data", count=12)
    start = write_checkpoint(tmp_path / "start")
    for path in pathlib.Path(folders["tokenizer"]).iterdir():
        shutil.copy(path, start)
    adapter = AdapterConfig(
        rank=2, kind="dora", targets=("o_proj", "lm_head", "vision_head"), save=("gen_embed",), weights="int4"
    )
    made = tiny_config(folders, tmp_path / "whole", init_from=str(start), tokenizer="", batch_size=4, adapter=adapter)
    return dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, ratio=(0, 1, 2), understanding=()),
        evaluation=dataclasses.replace(made.evaluation, understanding=()),
    )


@pytest.mark.slow
def test_two_and_two_steps_are_four(config, tmp_path):
    whole = loop.train(dataclasses.replace(config, samples=SampleConfig(every=4, prompts=("a red house",), images=2)))
    half = dataclasses.replace(config, workdir=str(tmp_path / "half"), steps=2)
    first = loop.train(half)
    resumed = loop.train(dataclasses.replace(half, steps=4))
    for name in (CONFIG, WEIGHTS):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert (first / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()
    assert loop.train(config) == whole, "a finished run has its export"
    assert not (tmp_path / "whole" / "failures.txt").exists()
    assert (tmp_path / "whole" / "samples" / "0000004.png").exists()

    adapter = read_adapter(whole, config.model)
    assert adapter.base == config.init_from and adapter.dora and {d.rank for d in adapter.deltas.values()} == {2}
    assert {path for path, _ in adapter.saved} == {("gen_embed", "embedding")}
    base = janus_jax.load(config.init_from, weights="int4", progress=False)
    plain = flatten(base.params)
    base.load_adapter(whole)
    moved = {path for path, x in flatten(base.params).items() if path in plain and x is not plain[path]}
    assert moved == {"gen_embed/embedding"}
    drawn = base.generate_images("a red house", 1, temperature=0.0)[0]
    assert np.asarray(drawn).shape == (config.model.gen_vision.image_size,) * 2 + (3,)

    with raises_one_line("is a run that trains an adapter; to start from its result, merge its export"):
        open_sources(dataclasses.replace(config, init_from=str(tmp_path / "whole")))
