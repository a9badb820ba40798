"""The JSON files of a checkpoint folder, and overrides of a run: mutated bytes, and wrong values by key."""

import copy
import functools
import json
import pathlib
import shutil
import tempfile

from hypothesis import strategies as st

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import get_preset, original_config, parse_config, read_config, transformers_config
from janus_jax.processing.chat import Processor
from tests.fuzz.bounded import given, mutated
from train.overrides import load_config
from train.validate import validate

FILES = ["preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "special_tokens_map.json"]
TINY = get_preset("janus_tiny")
CONFIGS = [original_config(TINY), transformers_config(TINY, 7)]
_PLAIN = [None, True, False, 0, -1, 1, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, "", "5", "\ud800"]
_HELD = [[], [1], [1.5, 2, 3], [0.5] * 3, [10**9] * 3, {}, {"a": 1}, {"content": 3}, {"height": "x"}]
ODD = st.sampled_from([*_PLAIN, *_HELD, "a\n\x1b[31m", "x" * 100_000])


@functools.cache
def folder_of_files() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp())
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[0]))
    for name in FILES:
        if not (folder / name).exists():
            (folder / name).write_text('{"sft_format": "deepseek", "image_tag": "<image_placeholder>"}')
    return folder


def read(folder):
    processor = Processor.from_folder(folder, read_config(folder))
    ids = processor.text_to_image_prompt("a red boat, été 猫")
    assert isinstance(processor.tokenizer.decode(ids), str)


def read_file(data, folder):
    """`data` is a name, a null, and the file's bytes."""
    name, _, content = data.partition(b"\0")
    shutil.copytree(folder_of_files(), folder, dirs_exist_ok=True)
    (folder / name.decode()).write_bytes(content)
    read(folder)


def read_config_alone(data, folder):
    (folder / "config.json").write_bytes(data)
    read_config(folder)


def override(data, folder):
    config = load_config("debug", data.decode("utf-8", "surrogateescape").split("\0"))
    validate(config)


def paths(raw, prefix=()):
    for key, value in raw.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@st.composite
def configs(draw):
    """One of the two dialects with some of its values replaced, taken away, or added under names that exist."""
    raw = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(paths(raw))))
        block = raw
        for key in path[:-1]:
            block = block[key]
        if draw(st.booleans()) or path[-1] not in block:
            block[path[-1]] = draw(ODD)
        else:
            del block[path[-1]]
    return raw


@given(configs())
def test_values_of_a_config(bounded, raw):
    line = bounded(read_config_alone, json.dumps(raw).encode())
    assert not line or "config.json" in line
    try:
        config = parse_config(raw)
    except ValueError:
        return
    assert parse_config(original_config(config) if raw["model_type"] == "multi_modality" else raw) == config


@given(mutated([json.dumps(raw).encode() for raw in CONFIGS]))
def test_bytes_of_a_config(bounded, data):
    line = bounded(read_config_alone, data)
    assert not line or "config.json" in line


_SEEDS = [f"{name}\0".encode() + (folder_of_files() / name).read_bytes() for name in FILES]


@given(st.sampled_from(FILES), st.data())
def test_bytes_of_side_files(bounded, name, data):
    content = data.draw(mutated([seed.partition(b"\0")[2] for seed in _SEEDS]))
    bounded(read_file, f"{name}\0".encode() + content)


_KEYS = ["image_size", "size", "min_size", "image_mean", "image_std", "rescale_factor", "do_normalize", "sft_format"]
_KEYS += ["background_color", "image_tag", "image_start_tag", "image_end_tag", "pad_tag", "num_image_tokens"]
_KEYS += ["image_processor", "bos_token", "eos_token", "pad_token", "chat_template"]


@given(st.sampled_from(FILES), st.dictionaries(st.sampled_from(_KEYS), ODD, min_size=1, max_size=3))
def test_values_of_side_files(bounded, name, values):
    raw = json.loads((folder_of_files() / name).read_text()) | values
    bounded(read_file, f"{name}\0".encode() + json.dumps(raw).encode())


_TOKENIZER = json.loads((folder_of_files() / "tokenizer.json").read_text())
_PARTS = st.sampled_from(
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        {"type": "Replace", "pattern": {"String": ""}, "content": "a"},
        {"type": "Truncate"},
        {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "Unigram", "vocab": [], "unk_id": 5},
        {"type": "Unigram", "vocab": [["a", -1e300]], "unk_id": 0},
        {"type": "WordPiece", "vocab": {"a": 4294967295}, "unk_token": "b", "continuing_subword_prefix": "##"},
        {"type": "WordLevel", "vocab": {"a": 4294967296}, "unk_token": "b"},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"},
        {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "Fuse"},
    ]
)


@st.composite
def tokenizers(draw):
    raw = copy.deepcopy(_TOKENIZER)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(
            st.sampled_from(["model", "normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens"])
        )
        raw[path] = draw(_PARTS | ODD)
    return json.dumps(raw).encode()


@given(tokenizers() | mutated([json.dumps(_TOKENIZER).encode()]))
def test_tokenizers(bounded, content):
    bounded(read_file, b"tokenizer.json\0" + content)


_OVERRIDES = ["steps=5", "data.ratio=5,1,4", "optimizer.learning_rate=2e-5", "mesh.tensor=2", "model.language.layers=3"]
_OVERRIDES += ['data.text=["a,b"]', "batch_size=1e3", "data.images_per_row=3", "samples.prompts=a cat", "seed=-1"]
_FIELDS = st.sampled_from(sorted({item.partition("=")[0] for item in _OVERRIDES} | {"", "a.b", "model", "data.0"}))
_VALUES = st.sampled_from(
    ["1e308", "9" * 400, "-1", "0", "nan", "1e999", "none", "[1, NaN]", "[" * 3000, "{", "1,2", "x" * 9000]
)


@given(
    mutated(["\0".join(_OVERRIDES[i : i + 3]).encode() for i in range(8)])
    | st.tuples(_FIELDS, _VALUES).map(lambda x: "=".join(x).encode())
)
def test_overrides(bounded, data):
    bounded(override, data)
