"""Examples run, of docstrings and (slow) of README.md and docs/, with the files that they name and a tiny model."""

import dataclasses
import doctest
import importlib
import json
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import janus_jax
from janus_jax import load
from tests.library.tiny_janus import write_checkpoint
from tests.weights.adapters.random_adapters import written

ROOT = pathlib.Path(janus_jax.__file__).parents[1]
# Examples of docs/serving.md need a server: tests/serving/api/test_docs.py runs them.
PAGES = ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "serving.md"))


def modules() -> list[str]:
    """Those with examples, found without importing them."""
    paths = [path for path in pathlib.Path(janus_jax.__file__).parent.rglob("*.py") if ">>> " in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(names)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    """A tiny model with room for answers of the default length."""
    folder = write_checkpoint(tmp_path_factory.mktemp("examples") / "janus")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["language_config"]["max_position_embeddings"] = 1024
    path.write_text(json.dumps(raw))
    return load(folder)


@pytest.fixture
def here(janus, tmp_path, monkeypatch):
    """A working directory with what examples name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(janus.source, tmp_path / "deepseek-ai" / "Janus-Pro-1B")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save("bicycle.png")
    pathlib.Path("photos.jsonl").write_text('{"image": "bicycle.png", "caption": "a red bicycle"}\n')
    (tmp_path / "adapters").mkdir()
    for seed, name in enumerate(("watercolor", "photos")):
        written(tmp_path / "adapters" / name, janus.config, seed=seed)


@pytest.mark.parametrize("name", modules())
def test_docstrings(name, here, janus):
    found = [test for test in doctest.DocTestFinder().find(importlib.import_module(name), name) if test.examples]
    assert found
    for test in found:
        test.globs["janus"] = janus
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_pages(page, here, janus):
    """Blocks of a page run one after the other, as a reader would type them."""
    names = {"janus": dataclasses.replace(janus), "janus_jax": janus_jax, "jnp": jnp}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
