"""The recipe of 7B on a thousandth of its parameters."""

import dataclasses

import numpy as np
import pytest

from examples.tiny.run import MODEL, params_of, write_checkpoint, write_data
from janus_jax.config import LlamaConfig
from train.config import EvalConfig, MeshConfig, SampleConfig
from train.overrides import load_config
from train.run import loop
from train.run.metrics import read_metrics


@pytest.mark.slow
def test_7b_stage3_takes_a_step(tmp_path):
    """All of the recipe but its size: a thousandth of the parameters on eight devices."""
    folders = write_data(tmp_path / "data", count=12)
    config = load_config("7b_stage3")
    real = config.model
    language = LlamaConfig(
        vocab_size=416, width=64, mlp_dim=128, layers=3, heads=4, kv_heads=4, head_dim=16, max_positions=512
    )
    model = dataclasses.replace(
        real,
        vision=dataclasses.replace(MODEL.vision, layers=2),
        gen_vision=MODEL.gen_vision,
        language=language,
        gen_head_width=64,
    )
    kinds = {kind: (folders[kind],) for kind in ("understanding", "text", "generation")}
    config = dataclasses.replace(
        config,
        workdir=str(tmp_path / "run"),
        model=model,
        init_from=str(write_checkpoint(tmp_path / "checkpoint", model)),
        tokenizer=folders["tokenizer"],
        steps=1,
        batch_size=8,
        data=dataclasses.replace(config.data, **kinds, context=128, workers=0),
        mesh=MeshConfig(fsdp=8),
        evaluation=EvalConfig(),
        samples=SampleConfig(),
        loss_chunk=64,
    )
    assert (config.compute_dtype, config.frozen_dtype, config.remat) == ("bfloat16", "bfloat16", "full")
    assert config.data.ratio == (5, 1, 4)
    loop.train(config)
    (line,) = read_metrics(config.workdir)
    kinds = [line[f"train/loss_{kind}"] for kind in ("understanding", "text", "generation")]
    assert all(0 < loss < 20 for loss in kinds)
    assert line["train/grad_norm"] > 0 and line["train/skipped_updates"] == 0
    params = params_of(config.workdir)
    assert {path.split("/")[0] for path, x in params.items() if x.dtype != np.float32} == {"gen_vision_model"}
