"""What bad configurations get: one line that names the key and what is expected."""

import dataclasses
import os

import pytest

from janus_jax.config import (
    PRESETS,
    original_config,
    parse_config,
    read_config,
)
from tests.library.test_config import DIALECTS, changed, to_transformers

ORIGINAL, TRANSFORMERS = (write(PRESETS["janus_tiny"]) for write in DIALECTS.values())
REMOVED = ...


@pytest.mark.parametrize(
    "base, path, value, message",
    [
        (ORIGINAL, "model_type", "llama", "model_type is 'llama'"),
        (ORIGINAL, "model_type", REMOVED, "model_type is None"),
        (ORIGINAL, "language_config", REMOVED, "'language_config' is missing"),
        (ORIGINAL, "vision_config.params", REMOVED, "'params' is missing"),
        (ORIGINAL, "vision_config.params.width", REMOVED, "'width' is missing"),
        (ORIGINAL, "gen_vision_config.params.ch_mult", REMOVED, "'ch_mult' is missing"),
        (ORIGINAL, "gen_head_config.params.image_token_embed", REMOVED, "'image_token_embed' is missing"),
        (ORIGINAL, "vision_config.params.model_name", "clip_large", "'clip_large' is unknown; known: custom, siglip"),
        (ORIGINAL, "gen_vision_config.cls", "VQ-8", "'VQ-8' is unknown; known: VQ-16, custom"),
        (ORIGINAL, "vision_config.params.select_feature", "cls_patch", "select_feature 'cls_patch' is not supported"),
        (ORIGINAL, "aligner_config.params.projector_type", "linear", "aligner: projector_type 'linear' is not"),
        (ORIGINAL, "aligner_config.params.input_dim", 65, "aligner: input_dim must be its encoder's 64, got 65"),
        (
            ORIGINAL,
            "gen_aligner_config.params.n_embed",
            97,
            "n_embed must be the decoder's width 96, got 97",
        ),
        (ORIGINAL, "gen_head_config.params.image_token_size", 9, "image_token_size must be the codebook's 256, got 9"),
        (ORIGINAL, "gen_head_config.params.n_embed", 9, "gen_head: n_embed must be the decoder's width 96, got 9"),
        (ORIGINAL, "language_config", [], "must be an object, got a list"),
        (ORIGINAL, "language_config", "llama", "must be an object, got a string"),
        (ORIGINAL, "language_config.model_type", "qwen2", "must be 'llama', got 'qwen2'"),
        (ORIGINAL, "language_config.hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        (ORIGINAL, "language_config.attention_bias", True, "attention_bias is set"),
        (ORIGINAL, "language_config.mlp_bias", True, "mlp_bias is set"),
        (ORIGINAL, "language_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope type 'linear' is not"),
        (ORIGINAL, "language_config.rope_theta", "1e4", r"rope_theta must be a number above 0 and .*, got '1e4'"),
        (
            ORIGINAL,
            "language_config.vocab_size",
            "512",
            r"config\.vocab_size must be an integer from 1 to .*, got '512'",
        ),
        (ORIGINAL, "torch_dtype", "int8", "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (ORIGINAL, "language_config.num_key_value_heads", 3, "4 attention heads must be a multiple of the 3"),
        (ORIGINAL, "language_config.head_dim", 25, "head_dim must be even .*, got 25"),
        (ORIGINAL, "vision_config.params.heads", 5, "width 64 must be a multiple of its 5 heads"),
        (ORIGINAL, "vision_config.params.image_size", 8, "image_size must be at least its patch_size 16, got 8"),
        (ORIGINAL, "gen_vision_config.params.ch", 48, "channels 48 x 1 must be a multiple of 32"),
        (TRANSFORMERS, "text_config", REMOVED, "'text_config' is missing"),
        (TRANSFORMERS, "vq_config", REMOVED, "'vq_config' is missing"),
        (TRANSFORMERS, "text_config.rope_parameters", {"rope_type": "yarn"}, "rope type 'yarn' is not supported"),
        (TRANSFORMERS, "vision_config.use_qk_norm", True, "use_qk_norm is set"),
        (TRANSFORMERS, "vision_config.attention_bias", False, "attention_bias is off"),
        (TRANSFORMERS, "vision_config.hidden_act", "gelu_pytorch_tanh", "must be 'gelu', got 'gelu_pytorch_tanh'"),
        (TRANSFORMERS, "vq_config.double_latent", True, "double_latent is set"),
        (
            TRANSFORMERS,
            "vision_config.projection_dim",
            95,
            "vision projection_dim must be the .* width 96, got 95",
        ),
        (
            TRANSFORMERS,
            "vq_config.projection_dim",
            REMOVED,
            "vq projection_dim must be the .* width 96, got 2048",
        ),
        (TRANSFORMERS, "vision_config", None, "must be an object, got null"),
    ],
)
def test_bad_configs(base, path, value, message):
    with pytest.raises(ValueError, match=message):
        parse_config(changed(base, path, value))


@pytest.mark.parametrize("base, block", [(ORIGINAL, "language_config"), (TRANSFORMERS, "text_config")])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "intermediate_size"]
)
def test_counts_beyond_any_model(base, block, key):
    """They used to be worked on for hours."""
    for value in (10**9, 10**30):
        with pytest.raises(ValueError, match=rf"{block}\.{key} must be an integer from 1 to .*, got {value}"):
            parse_config(changed(base, f"{block}.{key}", value))


@pytest.mark.parametrize(
    "base, path, value, message",
    [
        (ORIGINAL, "model_type", [], r"model_type is \[\]; a Janus config has"),
        (ORIGINAL, "model_type", {"a": 1}, "model_type is {'a': 1}; a Janus config has"),
        (TRANSFORMERS, "text_config", None, "text_config must be an object, got null"),
        (ORIGINAL, "vision_config.params", 3, "vision_config.params must be an object, got a number"),
        (ORIGINAL, "language_config.rope_scaling", "x", "rope_scaling must be an object, got a string"),
        (ORIGINAL, "language_config.attention_bias", "no", "attention_bias must be true or false, got 'no'"),
        (ORIGINAL, "language_config.head_dim", True, "head_dim must be an integer from 1 to 4,096, got True"),
        (ORIGINAL, "gen_vision_config.params.ch_mult", [1] * 9, "ch_mult must be 1 to 8 integers from 1 to 64, got"),
        (ORIGINAL, "gen_vision_config.params.ch_mult", {}, "ch_mult must be 1 to 8 integers from 1 to 64, got {}"),
        (ORIGINAL, "vision_config.params.model_name", [], r"model_name must be a string, got \[\]"),
        (
            ORIGINAL,
            "vision_config.params.image_size",
            8192 * 2,
            "image_size must be an integer from 1 to 8,192, got 16384",
        ),
        (ORIGINAL, "torch_dtype", 16, "torch_dtype must be a string, got 16"),
        (
            TRANSFORMERS,
            "vision_config.projection_dim",
            {"a": "b" * 9000},
            "projection_dim must be the decoder's width 96, got {'a': .{0,90}$",
        ),
        (TRANSFORMERS, "vision_config.hidden_act", "a\n\x1b[31m", r"hidden_act must be 'gelu', got 'a\\n\\x1b\[31m'"),
    ],
)
def test_wrong_types_name_the_key_and_what_is_expected(base, path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_config(changed(base, path, value))
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_config_files_within_bounds(tmp_path):
    path = tmp_path / "config.json"
    for text, told in [
        ("[" * 3000, "nested|not valid"),
        ('{"a": 1e999}', "too large for float64"),
        ('{"a": NaN}', "NaN is not"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json.*({told})"):
            read_config(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"config\.json is a FIFO"):
        read_config(tmp_path)


def leaves(raw: dict, prefix: str = ""):
    """(dotted path, value) of every entry that is not a dict."""
    for key, value in raw.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


# For transformers alone: we derive them.
UNREAD = ("architectures", "image_token_id", "num_image_tokens", "num_patches", "image_token_embed_dim")
NUMBERS = [
    pytest.param(raw, path, id=f"{dialect}-{path}")
    for dialect, raw in (("original", ORIGINAL), ("transformers", TRANSFORMERS))
    for path, value in leaves(raw)
    if type(value) in (int, float, list) and path.split(".")[-1] not in UNREAD
]


@pytest.mark.parametrize("base, path", NUMBERS)
def test_numbers_of_the_wrong_type(base, path):
    """Words, lists, fractions, zero and less where a size belongs: a ValueError, never a configuration."""
    values = ["many", [1.5], {}, True, float("nan"), -9]
    if path.split(".")[-1] not in ("mlp_ratio", "rms_norm_eps", "layer_norm_eps", "rope_theta"):
        values.append(2.5)
    if not path.endswith("select_layer"):  # which counts from the end
        values.append(0)
    for value in values:
        try:
            config = parse_config(changed(base, path, value))
        except ValueError:
            continue
        pytest.fail(f"{path} = {value!r} was taken: {config}")


def test_zero_heads():
    """With no head_dim beside them, which would be the width over them."""
    raw = changed(changed(ORIGINAL, "language_config.head_dim"), "language_config.num_attention_heads", 0)
    with pytest.raises(ValueError, match=r"language_config\.num_attention_heads must be .*, got 0"):
        parse_config(raw)


@pytest.mark.parametrize("raw", [None, [], "multi_modality", 3, {}], ids=str)
def test_not_a_config(raw):
    with pytest.raises(ValueError, match="model_type is None"):
        parse_config(raw)


def test_read_config_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json of a Janus checkpoint"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe{}", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not valid JSON|not UTF-8"):
            read_config(tmp_path)
    path.write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llama'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "write, change, message",
    [
        (original_config, {"vision": {"norm_eps": 1e-5}}, "original dialect cannot express a vision norm eps"),
        (original_config, {"gen_vision": {"norm_eps": 1e-5}}, "no dialect can express a VQ norm eps of 1e-05"),
        (to_transformers, {"gen_head_width": 64}, "image head as wide as the decoder"),
        (to_transformers, {"gen_vision": {"grid": 5}}, "generated grid 5 to equal the patch grid 4"),
        (to_transformers, {"gen_vision": {"norm_groups": 16}}, "transformers dialect cannot express 16 VQ norm groups"),
        (to_transformers, {"gen_vision": {"norm_eps": 1e-5}}, "no dialect can express a VQ norm eps of 1e-05"),
        (to_transformers, {"language": {"heads": 5, "kv_heads": 5}}, r"width \(96\) that is a multiple of its 5 heads"),
    ],
)
def test_what_a_dialect_cannot_say(write, change, message):
    """Refused, not dropped in silence."""
    config = PRESETS["janus_tiny"]
    for name, value in change.items():
        value = dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        config = dataclasses.replace(config, **{name: value})
    with pytest.raises(ValueError, match=message):
        write(config)
