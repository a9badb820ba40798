"""Fixtures to import: a checkpoint of janus_tiny with one layer of each stack and a tokenizer, and what it draws."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from examples.tiny.tokenizer import write_tokenizer
from janus_jax import JanusPipeline, load
from janus_jax.weights import checkpoint, conversion

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"
QUESTION = "What is it?"
SETTINGS = {"max_new_tokens": 20, "system_prompt": ""}  # a prompt without system part is padded to 32
# Prompts of 17, 18 and 58 ids: the first two are padded to 32, the third to 64.
SHORT, OTHER = "A red circle.", "A blue square."
LONG = "Draw a small green house beside a tall tree at night, with ten white cats watching from the wall"
MESHES = ({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})


def write_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """janus_tiny in the original dialect with one layer of each stack, which compile sooner, and a tokenizer."""
    opened = checkpoint.open_checkpoint(GOLDEN)
    params = checkpoint.load_params(GOLDEN, as_numpy=True)
    for part, layers in (("vision_model", "blocks"), ("language_model", "layers")):
        params[part][layers] = jax.tree.map(lambda x: x[:1], params[part][layers])
    # Louder, so that answers depend on what the images show.
    params["aligner"]["layers_2"]["kernel"] = params["aligner"]["layers_2"]["kernel"] * 16
    config = dataclasses.replace(
        opened.config,
        vision=dataclasses.replace(opened.config.vision, layers=1),
        language=dataclasses.replace(opened.config.language, layers=1),
    )
    converted = folder.with_name(folder.name + "_converted")
    checkpoint.save(converted, config, params)
    conversion.to_torch(converted, folder, "original", note=lambda text: None)
    shutil.rmtree(converted)
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("pipeline") / "janus")


@pytest.fixture(scope="module")
def janus(folder) -> JanusPipeline:
    return load(folder)


@pytest.fixture(scope="module")
def codes(janus) -> np.ndarray:
    """Five images of SHORT, drawn together, which many tests compare with."""
    return janus.generate_codes(SHORT, n=5)


def raises_one_line(match: str, error: type[Exception] = ValueError):
    """pytest.raises for a message of one line that matches."""
    return pytest.raises(error, match=r"(?s)\A(?!.*\n).*" + match)


def nearly_equal(images, others) -> bool:
    """Whether uint8 images agree to one level, which another program's rounding may cost, and mostly exactly."""
    difference = np.abs(np.asarray(images, np.int32) - np.asarray(others, np.int32))
    return difference.max() <= 1 and difference.mean() < 0.01
