"""Configurations: both dialects there and back, what bad ones get, and the sizes they stand for."""

import copy
import dataclasses
import json
import math
import pathlib

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from janus_jax.config import (
    PRESETS,
    JanusConfig,
    LlamaConfig,
    SiglipConfig,
    VQConfig,
    dialect_of,
    get_preset,
    original_config,
    parse_config,
    read_config,
    transformers_config,
)
from janus_jax.model.janus import Janus, init_params

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"


def to_transformers(config: JanusConfig) -> dict:
    return transformers_config(config, image_token_id=7)


DIALECTS = {"original": original_config, "transformers": to_transformers}


@st.composite
def configs(draw, dialect: str) -> JanusConfig:
    """Any configuration that `dialect` can say."""
    size = st.integers(1, 9)
    heads, kv_heads = draw(size), draw(size)
    grid, patch = draw(size), draw(st.integers(1, 20))
    vision_heads = draw(size)
    width = heads * kv_heads * draw(size)
    only = dialect == "original"
    vision = SiglipConfig(
        image_size=grid * patch + draw(st.integers(0, patch - 1)),
        patch_size=patch,
        width=vision_heads * draw(size),
        layers=draw(size),
        heads=vision_heads,
        mlp_ratio=draw(st.floats(0.5, 8)),
        norm_eps=1e-6 if only else draw(st.floats(1e-8, 1e-3)),
    )
    norm_groups = draw(size) if only else 32
    gen_vision = VQConfig(
        ch=norm_groups * draw(size),
        ch_mult=tuple(draw(st.lists(size, min_size=1, max_size=5))),
        num_res_blocks=draw(size),
        norm_groups=norm_groups,
        z_channels=draw(size),
        codebook_size=draw(st.integers(1, 10**5)),
        codebook_dim=draw(size),
        grid=draw(size) if only else grid,
    )
    language = LlamaConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        width=width,
        mlp_dim=draw(st.integers(1, 999)),
        layers=draw(size),
        heads=heads * kv_heads,
        kv_heads=kv_heads,
        head_dim=2 * draw(size),
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        rope_theta=draw(st.floats(1, 1e7)),
        max_positions=draw(st.integers(1, 10**6)),
    )
    return JanusConfig(
        vision=vision,
        gen_vision=gen_vision,
        language=language,
        aligner_depth=draw(size),
        gen_aligner_depth=draw(size),
        gen_head_width=draw(st.integers(1, 300)) if only else width,
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )


@pytest.mark.parametrize("write", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name, write):
    assert parse_config(json.loads(json.dumps(write(PRESETS[name])))) == PRESETS[name]


@pytest.mark.parametrize("dialect", DIALECTS)
@hypothesis.given(st.data())
def test_round_trip(dialect, data):
    config = data.draw(configs(dialect))
    raw = json.loads(json.dumps(DIALECTS[dialect](config)))
    assert dialect_of(raw) == dialect
    assert parse_config(raw) == config


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(configs("transformers"))
def test_transformers_reads_what_we_write(config):
    """Through transformers' own classes and back, as when it saves a checkpoint of ours."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.JanusConfig.from_dict(to_transformers(config))
    assert theirs.image_token_id == 7 and not theirs.tie_word_embeddings
    assert parse_config(json.loads(theirs.to_json_string(use_diff=False))) == config


def test_golden_config():
    config = read_config(GOLDEN)
    assert config == read_config(GOLDEN / "config.json") == PRESETS["janus_tiny"]


def test_pro_7b_leaves_out_what_llama_defaults_to():
    """The language block of Janus-Pro-7B names three sizes; the rest are LlamaConfig's defaults."""
    raw = original_config(PRESETS["janus_pro_7b"])
    sizes = {"num_hidden_layers": 30, "vocab_size": 102400, "max_position_embeddings": 16384}
    raw["language_config"] = {"model_type": "llama", "torch_dtype": "bfloat16", **sizes}
    assert parse_config(raw) == PRESETS["janus_pro_7b"]


@pytest.mark.parametrize("select, layers", [(-1, 24), (-2, 23), (0, 24), (5, 5), (40, 24)])
def test_select_layer(select, layers):
    """As in the reference's create_siglip_vit: counted from the end when not positive, never more than there are."""
    raw = original_config(PRESETS["janus_pro_1b"])
    raw["vision_config"]["params"]["select_layer"] = select
    assert parse_config(raw).vision.layers == layers


def changed(raw: dict, path: str, value=...) -> dict:
    """`raw` with the entry at the dotted `path` replaced, or taken out."""
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    node = raw
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return raw


ORIGINAL, TRANSFORMERS = (write(PRESETS["janus_tiny"]) for write in DIALECTS.values())


def test_vq_norm_groups_and_res_blocks():
    """Our own extension of the original dialect: said only where they differ from VQ-16's, and in a custom block."""
    tiny = PRESETS["janus_tiny"]
    plain = original_config(tiny)["gen_vision_config"]
    assert plain["cls"] == "custom" and not {"norm_groups", "num_res_blocks"} & plain["params"].keys()
    small = dataclasses.replace(tiny.gen_vision, ch=16, norm_groups=16, num_res_blocks=1)
    config = dataclasses.replace(tiny, gen_vision=small)
    raw = json.loads(json.dumps(original_config(config)))
    assert raw["gen_vision_config"]["params"].items() >= {"norm_groups": 16, "num_res_blocks": 1}.items()
    assert parse_config(raw) == config
    with pytest.raises(ValueError, match=r"params\.norm_groups must be an integer from 1 to .*, got '16'"):
        parse_config(changed(raw, "gen_vision_config.params.norm_groups", "16"))
    # A VQ-16 that differs in these alone is no VQ-16.
    large = dataclasses.replace(PRESETS["janus_pro_1b"], gen_vision=VQConfig(norm_groups=16))
    assert original_config(large)["gen_vision_config"]["cls"] == "custom"
    assert parse_config(original_config(large)) == large


# What the original checkpoints hold and the model does not use: SigLIP's attention-pool head (a probe, q, kv and proj,
# a LayerNorm, an MLP) and the VQ model's usage counters.
UNUSED = 1024 + 4 * (1024 * 1024 + 1024) + 2 * 1024 + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 65536


@pytest.mark.parametrize("name, in_checkpoint", [("janus_pro_1b", 2_089_297_547), ("janus_pro_7b", 7_420_434_059)])
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_element_counts(name, in_checkpoint, scan_layers):
    model = Janus(PRESETS[name], scan_layers=scan_layers)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == in_checkpoint - UNUSED == {"janus_pro_1b": 2_076_636_811, "janus_pro_7b": 7_407_773_323}[name]


def test_get_preset():
    assert get_preset("janus_tiny") is PRESETS["janus_tiny"]
    with pytest.raises(ValueError, match="unknown preset 'janus_2b'; known: janus_1_3b, janus_pro_1b"):
        get_preset("janus_2b")
