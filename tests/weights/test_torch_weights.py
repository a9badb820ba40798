"""Torch checkpoints of both dialects: every tensor to its slot and back, and what damaged or strange ones get."""

import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.config import PRESETS, JanusConfig, LlamaConfig, SiglipConfig, VQConfig
from janus_jax.model.janus import Janus, init_params
from janus_jax.weights.formats.safetensors_files import write_safetensors, write_sharded
from janus_jax.weights.torch_names import DIALECTS, carried_shapes, slots
from janus_jax.weights.torch_weights import (
    LazyArray,
    abstract_params,
    lazy_params,
    place,
    read_params,
    tensors_to_write,
)
from tests.conftest import SIZES
from tests.torch_oracle import load_file, save_file, torch
from tests.weights.golden import GOLDEN, assert_same_trees, flatten


def assert_same_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def in_memory(params) -> dict[tuple[str, ...], LazyArray]:
    return {path: LazyArray(a.shape, a.dtype, np.asarray(a).__getitem__) for path, a in flatten(params).items()}


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", SIZES)
def test_slots_and_tensors_match_one_to_one(name, dialect):
    filled = slots(SIZES[name], dialect)
    assert len({(slot.path, slot.layer) for slot in filled}) == len(filled)
    parts = [(slot.name, slot.section[0]) for slot in filled]
    assert len(set(parts)) == len(parts)
    for slot in filled:
        assert math.prod(slot.shape) == math.prod(slot.torch_shape), slot
        assert sum(other.name == slot.name for other in filled) == slot.section[1], slot


@pytest.mark.parametrize(
    ("preset", "tensors", "elements"),
    [("janus_pro_1b", 882, 2_089_297_547), ("janus_pro_7b", 936, 7_420_434_059)],
)
def test_full_sizes_have_the_published_elements(preset, tensors, elements):
    shapes = {slot.name: slot.tensor_shape for slot in slots(PRESETS[preset], "original")}
    shapes |= carried_shapes(PRESETS[preset])
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == elements


@pytest.mark.parametrize(
    ("name", "scan_layers"), [*((name, scan) for name in SIZES for scan in (True, False)), ("janus_pro_7b", True)]
)
def test_abstract_params_are_those_of_the_model(name, scan_layers):
    config = SIZES[name] if name in SIZES else PRESETS[name]
    model = Janus(config, scan_layers=scan_layers)
    init = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    ours = flatten(abstract_params(config, scan_layers))
    assert {path: leaf.shape for path, leaf in ours.items()} == {p: leaf.shape for p, leaf in flatten(init).items()}
    assert {leaf.dtype.name for leaf in ours.values()} == {config.dtype}


# ---------------------------------------------------------------- round trips


def test_original_to_ours_to_original(config, state, tmp_path):
    leaves, carried = lazy_params(GOLDEN, config)
    assert carried.keys() == carried_shapes(config).keys()
    write_safetensors(tmp_path / "model.safetensors", tensors_to_write(leaves, carried, config, "original"))
    assert_same_states(load_file(tmp_path / "model.safetensors"), state)


def test_transformers_to_ours_to_transformers(case, tmp_path):
    leaves, carried = lazy_params(case.folder, case.config)
    assert carried == {}
    write_safetensors(tmp_path / "model.safetensors", tensors_to_write(leaves, {}, case.config, "transformers"))
    assert_same_states(load_file(tmp_path / "model.safetensors"), load_file(case.folder / "model.safetensors"))


def test_golden_through_the_transformers_dialect(config, golden, state, tmp_path):
    leaves, _ = lazy_params(GOLDEN, config)
    write_safetensors(tmp_path / "model.safetensors", tensors_to_write(leaves, {}, config, "transformers"))
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    again, carried = read_params(tmp_path, config, as_numpy=True)
    assert carried == {}
    assert_same_trees(again, golden)
    # What was not carried comes back as zeros of the right shape.
    again = {t.name: t for t in tensors_to_write(in_memory(again), {}, config, "original")}
    assert again.keys() == state.keys()
    for name, shape in carried_shapes(config).items():
        assert again[name].shape == tuple(state[name].shape) == shape
        assert not again[name].read().any()


@st.composite
def configs(draw) -> JanusConfig:
    small = st.integers(1, 3)
    kv_heads, groups = draw(small), draw(small)
    width = draw(st.integers(1, 20))
    return JanusConfig(
        vision=SiglipConfig(
            image_size=draw(st.integers(8, 20)),
            patch_size=draw(st.integers(2, 8)),
            width=(heads := draw(small)) * draw(st.integers(1, 6)),
            heads=heads,
            layers=draw(small),
            mlp_ratio=draw(st.sampled_from([1.0, 2.5, 4.0])),
        ),
        gen_vision=VQConfig(
            ch=32,
            ch_mult=tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))),
            num_res_blocks=draw(st.integers(1, 2)),
            z_channels=draw(st.integers(1, 9)),
            codebook_size=draw(st.integers(2, 9)),
            codebook_dim=draw(small),
            grid=2,
        ),
        language=LlamaConfig(
            vocab_size=draw(st.integers(5, 30)),
            width=width,
            mlp_dim=draw(st.integers(1, 20)),
            layers=draw(small),
            heads=kv_heads * groups,
            kv_heads=kv_heads,
            head_dim=2 * draw(small),
        ),
        aligner_depth=draw(small),
        gen_aligner_depth=draw(small),
        gen_head_width=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(config=configs(), dialect=st.sampled_from(DIALECTS), max_shard_bytes=st.sampled_from([1, 50_000, 10**9]))
def test_any_sizes_there_and_back(tmp_path_factory, config, dialect, max_shard_bytes):
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), abstract_params(config))
    model_type = "multi_modality" if dialect == "original" else "janus"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "language_config": {}}))
    write_sharded(folder, tensors_to_write(in_memory(params), {}, config, dialect), max_shard_bytes)
    assert_same_trees(read_params(folder, config, as_numpy=True)[0], params)


def test_orientation_of_what_is_square(tiny):
    """Shapes cannot tell a square matrix from its transpose, or q from k: the oracle's tensors can."""
    state = {name: tensor.numpy() for name, tensor in tiny.torch_model.state_dict().items()}
    params = jax.tree.map(np.asarray, tiny.params)
    t, v = tiny.config.language, tiny.config.vision
    for i in range(t.layers):
        layer = f"model.language_model.layers.{i}.self_attn"
        attention = params["language_model"]["layers"]["self_attn"]
        for name in ("q_proj", "k_proj", "v_proj"):
            expected = state[f"{layer}.{name}.weight"].reshape(-1, t.head_dim, t.width)
            np.testing.assert_array_equal(attention[name]["kernel"][i], expected)
        expected = state[f"{layer}.o_proj.weight"].reshape(t.width, t.heads, t.head_dim)
        np.testing.assert_array_equal(attention["o_proj"]["kernel"][i], expected)
    for i in range(v.layers):
        layer = f"model.vision_model.encoder.layers.{i}.self_attn"
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
            attention = params["vision_model"]["blocks"]["attn"][ours]
            expected = state[f"{layer}.{theirs}.weight"].reshape(v.heads, v.head_dim, v.width)
            np.testing.assert_array_equal(attention["kernel"][i], expected)
            np.testing.assert_array_equal(attention["bias"][i].reshape(-1), state[f"{layer}.{theirs}.bias"])


# ---------------------------------------------------------------- layouts, dtypes, devices


def test_unstacked_layers_are_the_stacked_ones_apart(config, golden):
    apart = read_params(GOLDEN, config, scan_layers=False, as_numpy=True)[0]["language_model"]
    stacked = golden["language_model"]["layers"]
    assert "layers" not in apart
    for i in range(config.language.layers):
        assert_same_trees(apart[f"layers_{i}"], jax.tree.map(lambda a, i=i: a[i], stacked))


@pytest.mark.parametrize("dtype", ["float32", "float16", np.float32, ml_dtypes.bfloat16])
def test_dtype_is_cast_to(config, golden, dtype):
    cast, _ = read_params(GOLDEN, config, dtype=dtype)
    assert_same_trees(cast, jax.tree.map(lambda a: a.astype(dtype), golden))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cast))


def test_dtypes_that_cannot_be(config):
    with pytest.raises(ValueError, match="int8 are not supported"):
        read_params(GOLDEN, config, dtype="int8")


def test_float16_overflow_is_an_error(config, folder, state):
    large = state["aligner.layers.0.bias"].clone()
    large[3] = 1e30
    save_file(state | {"aligner.layers.0.bias": large}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="aligner/layers_0/bias has values beyond float16's range"):
        read_params(folder, config, dtype="float16")


def test_one_float32_layer_keeps_its_digits(config, folder, state):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    precise = torch.rand(state[name].shape)
    save_file(state | {name: precise}, folder / "model.safetensors")
    params, _ = read_params(folder, config, as_numpy=True)
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel[1], precise.numpy())
    assert params["language_model"]["layers"]["mlp"]["down_proj"]["kernel"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("scan_layers", [True, False])
def test_sharded_reading_equals_reading_whole(config, scan_layers):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        for name in ("fsdp", "tensor"):
            free = [i for i, size in enumerate(leaf.shape) if spec[i] is None and size % mesh.shape[name] == 0]
            if free:
                spec[free[-1]] = name
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, abstract_params(config, scan_layers))
    sharded, _ = read_params(GOLDEN, config, shardings=shardings, scan_layers=scan_layers)
    whole, _ = read_params(GOLDEN, config, scan_layers=scan_layers)
    assert_same_trees(sharded, whole)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, sharded, shardings))
    replicated, _ = read_params(GOLDEN, config, shardings=NamedSharding(mesh, PartitionSpec()))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(replicated))


def test_a_device_reads_its_own_part_only():
    asked = []
    array = np.arange(8 * 6 * 4, dtype=np.float32).reshape(8, 6, 4)

    def read(index):
        asked.append(array[index].shape)
        return array[index]

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "b", "a"))
    placed = place({("x",): LazyArray(array.shape, array.dtype, read)}, shardings={"x": sharding})
    np.testing.assert_array_equal(placed["x"], array)
    assert asked == [(8, 3, 1)] * 8
    asked.clear()
    place({("x",): LazyArray(array.shape, array.dtype, read)}, shardings=NamedSharding(mesh, PartitionSpec("b")))
    assert asked == [(4, 6, 4)] * 2


def test_shardings_of_another_tree_are_refused(config):
    mesh = jax.make_mesh((8,), ("x",))
    with pytest.raises(ValueError, match=r"they differ in .*vision_model/norm/scale"):
        read_params(GOLDEN, config, shardings={"aligner": NamedSharding(mesh, PartitionSpec())})


# ---------------------------------------------------------------- tensors that do not fit


def test_every_misfit_is_listed(config, folder, state):
    del state["aligner.layers.0.bias"], state["language_model.model.layers.2.mlp.up_proj.weight"]
    state["gen_embed.weight"] = torch.zeros(7, 8)
    state["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(2)
    state["gen_head.vision_head.bias"] = torch.zeros(256, dtype=torch.int32)
    state["language_model.model.layers.3.mlp.up_proj.weight"] = torch.zeros(256, 96)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        read_params(folder, config)
    first, told = str(caught.value).split(" dialect): ")
    assert first == f"{folder}: the tensors do not match config.json (original"
    assert sorted(told.split("; ")) == [
        "misshapen: gen_embed.weight is [7, 8], expected [256, 8]",
        "misshapen: vision_model.vision_tower.attn_pool.latent is [2], expected [1, 1, 64]",
        "missing: aligner.layers.0.bias [96]",
        "missing: language_model.model.layers.2.mlp.up_proj.weight [256, 96]",
        "unexpected: language_model.model.layers.3.mlp.up_proj.weight [256, 96]",
        "unsupported: gen_head.vision_head.bias is int32, expected bfloat16, float16, float32",
    ]


def test_misfits_of_all_layers_are_told_as_one(config, folder, state):
    lost = {name: t for name, t in state.items() if ".q_proj." not in name and ".norm1.weight" not in name}
    odd = {f"odd\n\x1b[31m.{i}": torch.zeros(2) for i in (0, 2, 5)}
    odd |= {chr(97 + i) * 5000: torch.zeros(2) for i in range(20)}
    save_file(lost | odd, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        read_params(folder, config)
    message = str(caught.value)
    assert "missing: language_model.model.layers.{0..2}.self_attn.q_proj.weight [96, 96] (3)" in message
    assert "missing: vision_model.vision_tower.blocks.{0..2}.norm1.weight [64] (3)" in message
    assert "; and " in message and len(message) < 4000 and message.isprintable()


def test_harmless_buffers_are_let_pass(config, folder, state, golden):
    buffers = {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(12) for i in range(3)}
    buffers["vision_model.vision_tower.position_ids"] = torch.arange(16)
    save_file(state | buffers, folder / "model.safetensors")
    assert_same_trees(read_params(folder, config, as_numpy=True)[0], golden)


def test_unused_tensors_may_be_absent(config, folder, state, golden):
    save_file(
        {name: t for name, t in state.items() if name not in carried_shapes(config)}, folder / "model.safetensors"
    )
    params, carried = read_params(folder, config, as_numpy=True)
    assert carried == {}
    assert_same_trees(params, golden)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_absent_head_is_the_embedding_only_where_config_ties_it(dialect, config, folder, state, tiny, tmp_path):
    if dialect == "original":
        head, block = "language_model.lm_head.weight", "language_config"
        raw, sizes = json.loads((GOLDEN / "config.json").read_text()), config
    else:
        head, block = "lm_head.weight", None
        raw, sizes = json.loads((tiny.folder / "config.json").read_text()), tiny.config
        state = load_file(tiny.folder / "model.safetensors")
    state = dict(state)
    del state[head]
    save_file(state, folder / "model.safetensors")
    for tied in (True, False):
        (raw[block] if block else raw)["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(json.dumps(raw))
        if tied:
            language = read_params(folder, sizes, as_numpy=True)[0]["language_model"]
            np.testing.assert_array_equal(language["lm_head"]["kernel"], language["embed_tokens"]["embedding"])
        else:
            with pytest.raises(ValueError, match=f"missing: {head}"):
                read_params(folder, sizes)


def test_transformers_ties_what_it_saves_tied(tiny, tmp_path):
    """The oracle itself writes no head when it ties, and says so in its config.json."""
    from transformers import JanusForConditionalGeneration

    raw = json.loads((tiny.folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied" / "config.json").write_text(json.dumps(raw))
    shutil.copyfile(tiny.folder / "model.safetensors", tmp_path / "tied" / "model.safetensors")
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "tied")
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    language = read_params(tmp_path / "again", tiny.config, as_numpy=True)[0]["language_model"]
    np.testing.assert_array_equal(language["lm_head"]["kernel"], language["embed_tokens"]["embedding"])
