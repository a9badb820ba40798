"""Compiling while the weights are read."""

import threading

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import write_checkpoint
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.processing.processor_files import TOKENIZER_FILES, copy_files
from janus_jax.sampling import batches, memory
from janus_jax.sampling.sampler import Options
from tests.conftest import SIZES

CONFIG = SIZES["tiny"]
PROGRAMS = ("start_image", "continue_image", "decode_images")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("start") / "model", CONFIG)
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(tokenizer, image_size=CONFIG.vision.image_size, num_image_tokens=CONFIG.vision.num_patches)
    copy_files(tokenizer, folder, TOKENIZER_FILES)
    return folder


@pytest.mark.parametrize(
    ("loading", "prompts", "settings", "sizes"),
    [
        pytest.param({}, "a red house", {"n": 2}, 4, marks=pytest.mark.slow),
        ({"weights": "int8"}, ["a cat", "a dog"], {"cfg_weight": 1.0, "top_k": 5}, 1),
    ],
)
def test_what_was_compiled_is_not_compiled_again(folder, caplog, monkeypatch, loading, prompts, settings, sizes):
    monkeypatch.setattr("janus_jax.sampling.cache._is_large", lambda cache, weights: sizes > 1)
    threads = []

    def ahead(janus):
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(janus.params))
        threads.append(threading.current_thread())
        with jax.log_compiles():  # which is of this thread alone
            janus.compile_images(prompts, **settings)

    jax.clear_caches()
    janus = janus_jax.load(folder, progress=False, ahead=ahead, **loading)
    before = compiled(caplog)
    with jax.log_compiles():
        images = janus.generate_images(prompts, **settings)
    assert threads[0] is not threading.main_thread()
    assert before == compiled(caplog) == dict.fromkeys(PROGRAMS, 1) | {"continue_image": sizes}
    assert len(images) == 2


@pytest.mark.slow
def test_windows_are_compiled_ahead(folder, caplog):
    def ahead(janus):
        with jax.log_compiles():
            janus.compile_images("a red house", speculate=4)

    jax.clear_caches()
    janus = janus_jax.load(folder, progress=False, ahead=ahead)
    programs = ("start_image", "continue_windows", "continue_image")
    with jax.log_compiles():
        images = janus.generate_images("a red house", speculate=4)
    assert compiled(caplog, programs) == {"start_image": 1, "continue_windows": 1, "continue_image": 0}
    plain = janus.generate_images("a red house", speculate=False)
    assert images[0].tobytes() == plain[0].tobytes()
    with pytest.raises(ValueError, match="a window from 2 to 16, an image's codes, got 17"):
        janus.generate_images("a red house", speculate=17)


def compiled(caplog, programs=PROGRAMS) -> dict[str, int]:
    """How often each of `programs` was compiled."""
    told = [record.getMessage() for record in caplog.records]
    return {name: sum(f"Finished XLA compilation of jit({name})" in line for line in told) for name in programs}


@pytest.mark.slow
@pytest.mark.parametrize(("images", "sizes"), [(0, 4), (2, 1)])
def test_an_answer_is_not_compiled_again(folder, caplog, monkeypatch, images, sizes):
    monkeypatch.setattr("janus_jax.sampling.cache._is_large", lambda cache, weights: sizes > 1)
    pixels = [np.full((30, 40, 3), 40 * i, np.uint8) for i in range(images)]
    asked, settings = ("what is this?", pixels, 40), {"top_k": 5, "temperature": 1.0, "system_prompt": "Be brief."}

    def ahead(janus):
        with jax.log_compiles():
            janus.compile_chat(*asked, **settings)

    jax.clear_caches()
    janus = janus_jax.load(folder, progress=False, ahead=ahead)
    programs = ("embed_prompt", "start_text", "continue_text")
    before = compiled(caplog, programs)
    with jax.log_compiles():
        list(janus.stream_chat(*asked, **settings))
    assert before == compiled(caplog, programs) == dict.fromkeys(programs, 1) | {"continue_text": sizes}


def test_what_goes_wrong_ahead_is_told(folder):
    with pytest.raises(ValueError, match=r"n must be .*, got 0"):
        janus_jax.load(folder, progress=False, ahead=lambda janus: janus.compile_images("a cat", n=0))


@pytest.mark.parametrize("name", ["compile_images", "compile_chat"])
def test_a_mesh_is_refused(folder, name):
    with pytest.raises(ValueError, match=f"{name} works on one device; leave it out with a mesh"):
        janus_jax.load(folder, mesh={"data": 8}, progress=False, ahead=lambda janus: getattr(janus, name)("a cat"))


@pytest.mark.slow
def test_parts_are_compiled_where_not_all_images_fit(folder, caplog, monkeypatch):
    janus = janus_jax.load(folder, progress=False)
    per_image = batches.bytes_to_draw(janus.model, *janus._drawing("a cat", 1, Options(cfg_weight=5.0))[0].shape[1:])
    shapes = sum(x.nbytes for x in jax.tree.leaves(janus.params))
    free = 2.5 * per_image
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(free + shapes))
    jax.clear_caches()
    janus = janus_jax.load(folder, progress=False, ahead=lambda janus: janus.compile_images("a cat", n=4))
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(free))
    with jax.log_compiles():
        assert janus.generate_images("a cat", n=4)
    assert set(compiled(caplog).values()) == {0}


@pytest.mark.slow
def test_no_memory_ahead_is_left_to_drawing(folder, monkeypatch):
    def compile_codes(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("janus_jax.pipeline.compile_codes", compile_codes)
    janus = janus_jax.load(folder, progress=False, ahead=lambda janus: janus.compile_images("a cat"))
    assert len(janus.generate_images("a cat")) == 1
