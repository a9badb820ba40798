"""The issue's small files (tests/cases), as users have them, each read wrongly once: through to ids and pixels."""

import pathlib

import numpy as np
import pytest

from examples.tiny.tokenizer import EOS, write_tokenizer
from janus_jax.config import get_preset
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import open_image
from train.data.tokenize import SampleTokenizer
from train.raw.sources import BadSample, open_source

CASES = pathlib.Path(__file__).parents[1] / "cases"
CONFIG = get_preset("janus_tiny")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), image_size=CONFIG.vision.image_size)
    return Processor.from_folder(folder, CONFIG)


def decoded(processor, raw, kind="understanding"):
    """What the model reads of a sample, and what of it is trained on."""
    (sample,), _ = SampleTokenizer(processor, kind, 2000)(raw)
    decode = processor.tokenizer.decode
    return decode(sample.ids), decode(sample.ids[sample.answers], skip_special_tokens=False)


def test_utf16(processor):
    source = open_source(CASES / "utf16" / "captions.jsonl")
    assert len(source) == 240 and {sample.caption for sample in source} == {"рыжая кошка спит на окне."}
    assert source[239].place.endswith("captions.jsonl:240")
    assert decoded(processor, source[100])[1] == f"рыжая кошка спит на окне.{EOS}"


@pytest.mark.parametrize("folder", ["sidecar", "sidecar/10_oldboat"])
def test_sidecars(processor, folder):
    source = open_source(CASES / folder)
    assert [sample.caption for sample in source] == ["an old boat on a lake at dawn"]
    assert "is read as captions in sidecar (1 of 1 images have a text file next to them)" in str(source)
    assert decoded(processor, source[0])[1] == f"an old boat on a lake at dawn{EOS}"


def test_system_field(processor):
    text, answer = decoded(processor, open_source(CASES / "system_field.jsonl")[0], "text")
    assert text.startswith("Answer like a pirate.\n\n") and "helpful" not in text and answer == f" Arr.{EOS}"


def test_unknown_media():
    source = open_source(CASES / "unknown_media.jsonl")
    for index, (reason, told) in enumerate([("unsupported_media", "video"), ("media_tag", "<img>")]):
        with pytest.raises(BadSample, match=told) as caught:
            source[index]
        assert caught.value.reason == reason


def test_turns_that_are_not_trained(processor):
    text, answer = decoded(processor, open_source(CASES / "not_trained.jsonl")[0], "text")
    assert ": 5" in text and answer == f" 4{EOS}"


@pytest.mark.parametrize("name", ["macos.tar", "bom.tar"])
def test_tars(processor, name):
    source = open_source(CASES / name)
    assert len(source) == 1 and source[0].caption == "a red boat"
    assert decoded(processor, source[0])[1] == f"a red boat{EOS}"


def test_classes(processor):
    source = open_source(CASES / "classes")
    assert [(sample.images[0].name, sample.caption) for sample in source] == [("a.tif", "cat"), ("b.jpg", "cat")]
    assert [decoded(processor, sample)[1] for sample in source] == [f"cat{EOS}"] * 2
    assert np.asarray(open_image(source[0].images[0])).shape[-1] == 3
