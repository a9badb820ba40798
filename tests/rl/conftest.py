"""Models of which losses are computed here and in torch."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from examples.tiny import run as tiny_run
from janus_jax.weights.torch_weights import read_params

# transformers' port wants the head as wide as the decoder.
MODEL = dataclasses.replace(tiny_run.MODEL, gen_head_width=tiny_run.MODEL.language.width)


@pytest.fixture(scope="session")
def models(oracle, tmp_path_factory):
    """The policy, an earlier one and a reference, in float64 torch; and the parameters of the first two as ours."""
    import torch

    policy = oracle.build(MODEL)
    generator = torch.Generator().manual_seed(1)

    def moved(scale: float):
        other = copy.deepcopy(policy)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "generation" in name or "layers" in name:
                    noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
                    parameter.add_(torch.nan_to_num(noise) * scale)
        return other

    earlier, reference = moved(0.04), moved(0.08)
    params = []
    for name, model in (("policy", policy), ("earlier", earlier)):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        params.append(read_params(folder, MODEL, dtype="float32")[0])
    return [copy.deepcopy(model).double() for model in (policy, earlier, reference)], params
