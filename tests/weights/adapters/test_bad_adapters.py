"""Adapters that do not fit, or need what is not implemented: one line that names the thing."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from janus_jax.weights.adapters.adapter import chosen, saved_slots
from janus_jax.weights.adapters.peft_files import CONFIG, WEIGHTS, read_adapter
from tests.conftest import SIZES
from tests.library.tiny_janus import raises_one_line
from tests.weights.adapters.random_adapters import written

MODEL = SIZES["tiny"]
Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "adapter", MODEL, targets=("attention",))


def change(folder, **settings):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | settings))


def change_tensors(folder, changes):
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which is not implemented"),
        ({"lora_bias": True}, "lora_bias is True, which is not implemented"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"target_parameters": ["x"]}, "target_parameters is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"of_the_future": 1}, "of_the_future is 1, which is not implemented"),
        ({"r": 0}, "r must be an integer from 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj must be an integer from 1"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is too involved; name the modules in full"),
        ({"alpha_pattern": {"(": 1}}, "is not a regular expression"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"modules_to_save": ["lm_haed"]}, "'lm_haed', of which there is no tensor; did you mean lm_head"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(folder, settings, told):
    change(folder, **settings)
    with raises_one_line(told):
        read_adapter(folder, MODEL)


def test_settings_without_effect(folder):
    plain = read_adapter(folder, MODEL)
    change(folder, lora_dropout=0.1, peft_version="9", task_type="CAUSAL_LM", megatron_core="megatron.core",
           loftq_config={}, init_lora_weights="gaussian", use_qalora=False, qalora_group_size=16)  # fmt: skip
    assert read_adapter(folder, MODEL).deltas.keys() == plain.deltas.keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{Q}.lora_A.weight": None}, "q_proj has no lora_A"),
        (
            {f"{Q}.lora_A.weight": np.zeros((3, 7), np.float32)},
            r"q_proj.lora_A is \[3, 7\], and this",
        ),
        ({f"{Q}.lora_B.weight": np.full((96, 3), np.nan, np.float32)}, "q_proj.lora_B has numbers that are not finite"),
        ({f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}, "but use_dora is false"),
        ({Q.replace("q_proj", "query") + ".lora_A.weight": np.zeros((3, 64), np.float32)}, "no linear layer"),
        ({"lora.up": np.zeros(3, np.float32)}, "is not named like PEFT's"),
        ({"base_model.model.lm_head.weight": np.zeros(3, np.float32)}, "neither an adapter's nor in modules_to_save"),
        ({Q + ".base_layer.weight": np.zeros((5, 64), np.float32)}, "q_proj.weight is"),
    ],
    ids=lambda value: next(iter(value)).rpartition("layers.0.")[2] if isinstance(value, dict) else "",
)
def test_tensors(folder, changes, told):
    change_tensors(folder, changes)
    with raises_one_line(told):
        read_adapter(folder, MODEL)


def test_of_another_model(folder, tmp_path):
    with raises_one_line("it changes .*layers.2.self_attn.q_proj and 3 more, which is no linear layer of the model"):
        read_adapter(folder, SIZES["grouped"])
    with raises_one_line("_proj.lora_. is .*, and this model with rank 3 has"):
        read_adapter(folder, SIZES["multi_query"])
    (folder / WEIGHTS).unlink()
    with raises_one_line("has neither adapter_model.safetensors nor", FileNotFoundError):
        read_adapter(folder, MODEL)


def test_layers_are_chosen_by_names_in_the_original():
    def names(*targets):
        return {slot.name.removesuffix(".weight") for slot in chosen(MODEL, targets)}

    layers = MODEL.language.layers
    assert len(names("attention")) == 4 * layers and len(names("decoder")) == 7 * layers
    assert names("q_proj") == {f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(layers)}
    assert names(r"layers\.0\.mlp\.up_proj") == {"language_model.model.layers.0.mlp.up_proj"}
    assert names("heads") == {"language_model.lm_head", "gen_head.output_mlp_projector", "gen_head.vision_head"}
    assert names("vision", "aligners", "decoder", "heads") == names("all")
    assert {slot.path[0] for slot in saved_slots(MODEL, ["gen_head"])} == {"gen_head"}
    with raises_one_line("targets: 'q_prj' names no linear layer of the model; did you mean q_proj"):
        chosen(MODEL, ["q_prj"])
    with raises_one_line("targets: 'atention' names no linear layer of the model; did you mean attention"):
        chosen(MODEL, ["atention"])
    with raises_one_line(r"targets: '\(' is not a regular expression"):
        chosen(MODEL, ["("])
    with raises_one_line("save: 'gen_heat' names no module of the model; did you mean gen_head"):
        saved_slots(MODEL, ["gen_heat"])
