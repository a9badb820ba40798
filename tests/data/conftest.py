"""A processor, and captions with their pictures, to prepare data from."""

import pytest

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import get_preset
from janus_jax.processing.chat import Processor
from tests.raw.test_sources import lines, png

CONFIG = get_preset("janus_tiny")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), image_size=CONFIG.vision.image_size)
    return Processor.from_folder(folder, CONFIG)


@pytest.fixture
def captions(tmp_path):
    """Twenty captions with images of different colors, the fourth damaged, the tenth absent."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.png").write_bytes(png((i * 12, 255 - i * 12, 90), (20 + i, 30)) if i != 3 else b"damaged")
    (folder / "9.png").unlink()
    return lines(folder / "c.jsonl", *({"image": f"{i}.png", "caption": f"Cat {i}. Tall."} for i in range(20)))
