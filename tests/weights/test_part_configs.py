"""Parts in the folders of their own libraries: config.json says what the run's model does, or the part is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from examples.tiny.run import MODEL
from janus_jax.weights.parts import open_part
from janus_jax.weights.torch_weights import place
from tests.torch_oracle import load_file, save_file, torch, transformers
from tests.weights.test_parts import check, params, written  # noqa: F401

T = MODEL.language
SIZES = {
    "vocab_size": T.vocab_size,
    "hidden_size": T.width,
    "intermediate_size": T.mlp_dim,
    "num_hidden_layers": T.layers,
    "num_attention_heads": T.heads,
    "num_key_value_heads": T.kv_heads,
    "head_dim": T.head_dim,
    "max_position_embeddings": 4096,
    "rms_norm_eps": T.norm_eps,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def save(folder, kind: str = "llama", **changes):
    """A model of random weights as transformers saves it."""
    torch.manual_seed(0)
    config, model = CLASSES[kind]
    model(config(**SIZES | changes)).save_pretrained(folder)
    return folder


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(path, part: str = "language_model") -> str:
    with pytest.raises(ValueError) as raised:
        open_part(path, MODEL, part)
    message = str(raised.value)
    assert str(path) in message and message.isprintable() and len(message) < 2000
    return message


def kernels(folder) -> dict:
    return place(open_part(folder, MODEL, "language_model"), as_numpy=True)["language_model"]


# ---------------------------------------------------------------- language_model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"max_position_embeddings": 512, "attention_dropout": 0.1}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 512}),  # never less than the run's positions
    ],
)
def test_what_a_janus_decoder_says_is_read(tmp_path, kind, changes):
    state = load_file(save(tmp_path / "m", kind, **changes) / "model.safetensors")
    found = kernels(tmp_path / "m")
    q = state["model.layers.1.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(found["layers"]["self_attn"]["q_proj"]["kernel"][1].reshape(q.shape), q)
    np.testing.assert_array_equal(found["lm_head"]["kernel"], state["lm_head.weight"].numpy())


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("llama", {"rope_theta": 500000.0}, "rope_theta is 500000.0, the run's model has 10000.0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rope type 'linear' is not supported",
        ),
        ("llama", {"rms_norm_eps": 1e-5}, "norm_eps is 1e-05, the run's model has 1e-06"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"attention_bias": True}, "attention_bias is set"),
        ("llama", {"mlp_bias": True}, "mlp_bias is set"),
        ("llama", {"num_hidden_layers": T.layers + 1}, f"layers is {T.layers + 1}, the run's model has {T.layers}"),
        ("llama", {"num_key_value_heads": 4}, "kv_heads is 4, the run's model has 2"),
        ("llama", {"head_dim": 8}, "head_dim is 8, the run's model has 16"),
        ("mistral", {"sliding_window": 256}, "sliding_window is 256: it would limit attention within the 512"),
        ("qwen2", {}, "model_type must be 'llama' or 'mistral' for a Janus decoder, got 'qwen2'"),
    ],
)
def test_what_the_runs_model_cannot_say_is_refused(tmp_path, kind, changes, told):
    config = {**changes}
    if "rope_theta" in changes:  # as transformers 5 wants it
        config = {"rope_parameters": {"rope_type": "default", "rope_theta": changes["rope_theta"]}}
    assert told in refusal(save(tmp_path / "m", kind, **config))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": None, "rope_theta": 500000.0}, "rope_theta is 500000.0"),  # as transformers 4 writes it
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "several kinds of rotary embeddings"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "gemma"}, "for a Janus decoder, got 'gemma'"),
        ({"model_type": "phi3"}, "for a Janus decoder, got 'phi3'"),
        ({"model_type": ["llama"]}, "for a Janus decoder, got ['llama']"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"embedding_multiplier": 12}, "embedding_multiplier is 12"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_other_keys_are_refused(tmp_path, changes, told):
    change(save(tmp_path / "m"), **changes)
    assert told in refusal(tmp_path / "m")
    # Named by its file, too.
    with pytest.raises(ValueError, match="config"):
        open_part(tmp_path / "m" / "model.safetensors", MODEL, "language_model")


def test_the_cure_is_the_runs_model(tmp_path):
    save(tmp_path / "m", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    model = dataclasses.replace(MODEL, language=dataclasses.replace(T, rope_theta=500000.0))
    assert open_part(tmp_path / "m", model, "language_model")


@pytest.mark.parametrize("bin_file", [False, True])
def test_tied_heads_are_the_embedding(tmp_path, bin_file):
    save(tmp_path / "m", tie_word_embeddings=True)
    state = load_file(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in state
    if bin_file:
        (tmp_path / "m" / "model.safetensors").unlink()
        head = {"lm_head.weight": state["model.embed_tokens.weight"]}
        torch.save(state | head, tmp_path / "m" / "pytorch_model.bin")
    found = kernels(tmp_path / "m")
    np.testing.assert_array_equal(found["lm_head"]["kernel"], state["model.embed_tokens.weight"].numpy())
    change(tmp_path / "m", tie_word_embeddings=False)
    if not bin_file:
        assert "missing: lm_head.weight" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.{}.self_attn.q_proj.bias", "unexpected: model.layers.{0..1}.self_attn.q_proj.bias [2] (2)"),
        ("model.layers.{}.self_attn.q_norm.weight", "unexpected: model.layers.{0..1}.self_attn.q_norm.weight [2] (2)"),
        ("model.layers.1{}.mlp.up_proj.weight", "unexpected: model.layers.{10..11}.mlp.up_proj.weight [2] (2)"),
    ],
)
def test_tensors_of_no_use_are_refused(tmp_path, name, told):
    """Without a config.json they are all that tells another model."""
    state = load_file(save(tmp_path / "m") / "model.safetensors")
    path = tmp_path / "other.safetensors"
    save_file(state | {name.format(i): torch.zeros(2) for i in (0, 1)}, path)
    assert told in refusal(path)


# ---------------------------------------------------------------- vision_model

V = MODEL.vision


@pytest.fixture
def siglip(tmp_path, params):  # noqa: F811
    """A folder as timm's are on the hub, of the sizes of MODEL."""
    folder = tmp_path / "siglip"
    folder.mkdir()
    shutil.move(written(tmp_path, params, "vision_model"), folder / "model.safetensors")
    raw = {
        "architecture": f"vit_tiny_patch{V.patch_size}_siglip_{V.image_size}",
        "num_classes": 0,
        "global_pool": "map",
        "model_args": {"embed_dim": V.width, "depth": V.layers, "num_heads": V.heads},
        "pretrained_cfg": {"input_size": [3, V.image_size, V.image_size], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_timms_folder(siglip, params):  # noqa: F811
    check(open_part(siglip, MODEL, "vision_model"), params, "vision_model")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "vit_large_patch16_siglip_384", "model_args": {}}, "width is 1024, the run's model has 32"),
        ({"architecture": "vit_large_patch16_384"}, "must be a SigLIP of timm's"),
        ({"architecture": "vit_so400m_patch16_siglip_384"}, "activation 'gelu_tanh'"),
        ({"architecture": "vit_tiny_patch16_siglip_32"}, "patch_size is 16, the run's model has 8"),
        ({"model_args": {"num_heads": 8}}, "heads is 8, the run's model has 2"),
        ({"model_args": {}}, "needs model_args.num_heads to say how many heads"),
        ({"model_args": {"num_heads": 2, "act_layer": "gelu_tanh"}}, "act_layer is 'gelu_tanh'"),
        ({"model_args": {"num_heads": 2, "class_token": True}}, "class_token is set"),
        ({"model_args": {"num_heads": 2, "init_values": 1e-5}}, "init_values is 1e-05, which is not supported"),
        ({"model_args": [2]}, "model_args must be an object"),
        ({"pretrained_cfg": {"input_size": [3, 256, 256]}}, "image_size is 256, the run's model has 32"),
        ({"pretrained_cfg": {"input_size": [3, 32, 64]}}, "must be that of square RGB images"),
        ({"pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}, "pretrained_cfg.mean"),
        ({"architecture": None, "model_type": "siglip"}, "'siglip'; vision_from needs a SigLIP from timm"),
        ({"architecture": None}, "there is no architecture"),
    ],
)
def test_other_towers_are_refused(siglip, changes, told):
    change(siglip, **changes)
    assert told in refusal(siglip, "vision_model")


@pytest.mark.parametrize(
    "name", ["cls_token", "reg_token", "norm_pre.weight", "blocks.0.ls1.gamma", "blocks.7.norm1.bias"]
)
def test_tensors_of_another_tower_are_refused(tmp_path, params, name):  # noqa: F811
    path = written(tmp_path, params, "vision_model")
    save_file(load_file(path) | {name: torch.zeros(2)}, path)
    assert f"unexpected: {name} [2]" in refusal(path, "vision_model")


# ---------------------------------------------------------------- gen_vision_model

G = MODEL.gen_vision


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"codebook_l2_norm": False}, "codebook_l2_norm is False, the run's model has True"),
        ({"decoder_ch_mult": [1, 2]}, "decoder_ch_mult is [1, 2], the run's model has [1, 1]"),
        ({"codebook_size": 128}, "codebook_size is 128, the run's model has 64"),
        ({"z_channels": 256}, "z_channels is 256, the run's model has 16"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_llamagens_folder(tmp_path, params, changes, told, nested):  # noqa: F811
    folder = tmp_path / "vq"
    folder.mkdir()
    shutil.move(written(tmp_path, params, "gen_vision_model"), folder / "model.safetensors")
    raw = {"codebook_size": G.codebook_size, "codebook_embed_dim": G.codebook_dim, "z_channels": G.z_channels}
    raw |= {"encoder_ch_mult": list(G.ch_mult), "decoder_ch_mult": list(G.ch_mult), "dropout_p": 0.0} | changes
    (folder / "config.json").write_text(json.dumps({"config": raw} if nested else raw))
    if told is None:
        check(open_part(folder, MODEL, "gen_vision_model"), params, "gen_vision_model")
    else:
        assert told in refusal(folder, "gen_vision_model")


@pytest.mark.parametrize("raw", [{"_class_name": "VQModel"}, {"model_type": "emu3"}, {}])
def test_other_tokenizers_are_refused_by_name(tmp_path, params, raw):  # noqa: F811
    folder = tmp_path / "vq"
    folder.mkdir()
    shutil.move(written(tmp_path, params, "gen_vision_model"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    message = refusal(folder, "gen_vision_model")
    assert "vq_from needs LlamaGen's VQ-16" in message and all(str(value) in message for value in raw.values())


def test_an_average_is_preferred_and_told(tmp_path, params):  # noqa: F811
    state = load_file(written(tmp_path, params, "gen_vision_model"))
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": other, "ema": state, "optimizer": {}, "steps": 3}, tmp_path / "vq.pt")
    told = []
    check(open_part(tmp_path / "vq.pt", MODEL, "gen_vision_model", told.append), params, "gen_vision_model")
    assert told == [f"{tmp_path / 'vq.pt'}: it has ema and model; ema is read"]
