"""The pipeline: drawing, answering, and what it says of bad input."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from examples.tiny.tokenizer import write_tokenizer
from janus_jax import JanusPipeline, load, make_mesh
from janus_jax.pipeline import encode_codes, image_keys
from janus_jax.sampling import text
from janus_jax.sampling.images import continue_image, start_image
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.text import continue_text, embed_prompt, start_text
from janus_jax.sharding import flatten
from janus_jax.weights import checkpoint, conversion

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"
# Prompts of 17, 18 and 58 ids: the first two are padded to 32, the third to 64.
SHORT, OTHER = "A red circle.", "A blue square."
LONG = "Draw a small green house beside a tall tree at night, with ten white cats watching from the wall"
MESHES = ({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling takes most of the time here, and half of it goes into making the programs fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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


# ---------------------------------------------------------------- text to image


def test_images_come_prompt_by_prompt(janus, codes):
    images = janus.generate_images([SHORT, OTHER], n=5, batch_size=5)
    assert len(images) == 10 and all(isinstance(image, Image.Image) for image in images)
    assert {(image.size, image.mode) for image in images} == {((16, 16), "RGB")}
    expected = janus.decode_codes(np.concatenate([codes, janus.generate_codes(OTHER, n=5)]))
    assert nearly_equal(np.stack(images), expected)
    assert len({image.tobytes() for image in images}) == 10, "the images are alike, which proves nothing"


def test_codes_are_codes(janus, codes):
    assert codes.shape == (5, janus.config.gen_vision.num_tokens) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < janus.config.gen_vision.codebook_size
    assert len({tuple(row) for row in codes}) == 5


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_nothing(janus, codes, batch_size):
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5, batch_size=batch_size), codes)


def test_fewer_images_are_the_first_ones(janus, codes):
    np.testing.assert_array_equal(janus.generate_codes([SHORT], n=2), codes[:2])
    np.testing.assert_array_equal(janus.generate_codes(SHORT), codes[:1])


def test_other_prompts_beside_change_nothing(janus, codes):
    """Longer prompts pad this one further, and parts of four mix the two."""
    mixed = janus.generate_codes([LONG, SHORT], n=5, batch_size=4)
    np.testing.assert_array_equal(mixed[5:], codes)
    assert (mixed[:5] != codes).any(axis=1).all()
    swapped = janus.generate_codes([SHORT, LONG], n=5, batch_size=4)
    np.testing.assert_array_equal(swapped, np.concatenate([mixed[5:], mixed[:5]]))


def test_seeds(janus, codes):
    other = janus.generate_codes(SHORT, n=5, seed=1)
    assert (other != codes).any(axis=1).all()
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5, seed=np.int64(1)), other)
    # One seed for each image: each as the first image of that seed.
    listed = janus.generate_codes(SHORT, n=5, seed=[1, 0, 1, 2**32 - 1, 0])
    np.testing.assert_array_equal(listed[:3], np.stack([other[0], codes[0], other[0]]))
    np.testing.assert_array_equal(listed[4], codes[0])
    assert not any((listed[3] == row).all() for row in (codes[0], other[0]))


def test_seeds_are_given_prompt_by_prompt(janus, codes):
    other = janus.generate_codes(OTHER, seed=9)
    np.testing.assert_array_equal(
        janus.generate_codes([SHORT, OTHER], seed=[0, 9], batch_size=1), np.concatenate([codes[:1], other])
    )


def test_image_keys_belong_to_seed_and_index():
    keys = [jax.random.key_data(image_keys(3, prompts, n)) for prompts, n in ((1, 4), (2, 2))]
    np.testing.assert_array_equal(keys[1], np.concatenate([keys[0][:2]] * 2))
    assert len(np.unique(keys[0], axis=0)) == 4


def test_guidance_of_one_is_the_conditional_model(janus, codes):
    """At half the rows: the result is that of both rows with weight 1, and of the conditional rows alone."""
    ours = janus.generate_codes(SHORT, n=5, cfg_weight=1)
    assert (ours != codes).any()
    row = janus.processor.text_to_image_prompt(SHORT)
    ids, mask = janus.processor.left_pad([row, janus.processor.unconditional(row)] * 5, 32)
    ids, mask = ids.reshape(5, 2, 32), mask.reshape(5, 2, 32).astype(bool)
    settings = {"guidance": 1.0, "sampler": make_sampler(1.0)}
    keys = image_keys(0, 1, 5)
    np.testing.assert_array_equal(janus.sample_codes(ids, mask, keys, **settings), ours)
    np.testing.assert_array_equal(janus.sample_codes(ids[:, :1], mask[:, :1], keys, **settings), ours)


def test_greedy(janus, codes):
    greedy = janus.generate_codes(SHORT, n=2, temperature=0)
    np.testing.assert_array_equal(greedy[0], greedy[1])
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=2, temperature=0, seed=5), greedy)
    assert (greedy != codes[:2]).any()
    # The likeliest code alone, by either truncation.
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=2, top_k=1), greedy)
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=2, top_p=1e-6), greedy)


def test_settings_share_one_program(janus, codes):
    programs = (start_image, continue_image)
    before = [program._cache_size() for program in programs]
    assert min(before) > 0
    janus.generate_codes(OTHER, n=5, cfg_weight=3, temperature=0.7, seed=8)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_meshes_change_nothing(folder, janus, codes, shape):
    """Five images fit neither eight shards nor four."""
    spread = load(folder, mesh=shape)
    kernel = spread.params["gen_head"]["vision_head"]["kernel"]
    assert len(kernel.devices()) == 8
    assert kernel.is_fully_replicated == (shape == {"data": 8})
    np.testing.assert_array_equal(spread.generate_codes(SHORT, n=5), codes)
    assert jax.sharding.get_abstract_mesh().empty, "the mesh leaked out of the call"


def test_mesh_decodes_and_answers(folder, janus, codes):
    spread = load(folder, mesh=make_mesh(MESHES[-1]))
    images = spread.decode_codes(codes)
    assert nearly_equal(images, janus.decode_codes(codes))
    pieces = spread.stream_chat("What is it?", (), 6, system_prompt="")
    first = next(pieces)
    assert jax.sharding.get_abstract_mesh().empty, "the mesh leaked out of the generator"
    assert "".join([first, *pieces]).strip() == janus.chat("What is it?", (), 6, system_prompt="")


# ---------------------------------------------------------------- codes and pixels


def test_decoding_in_parts(janus, codes):
    whole = janus.decode_codes(codes)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8
    assert nearly_equal(janus.decode_codes(codes, batch_size=2), whole)
    assert len({image.tobytes() for image in whole}) == 5


def test_decoding_follows_the_memory(janus, codes, monkeypatch):
    sizes = []

    def decode(model, params, part):
        sizes.append(len(part))
        images = jnp.broadcast_to(jnp.asarray(part)[:, :1, None, None], (len(part), 16, 16, 3)).astype(jnp.uint8)
        return images, jnp.ones(len(part), bool)

    monkeypatch.setattr("janus_jax.pipeline.decode_images", decode)
    many = np.tile(codes, (8, 1))
    for free, size in ((None, 14), (10**12, 14), (1, 1)):
        monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device, free=free: free)
        sizes.clear()
        np.testing.assert_array_equal(janus.decode_codes(many)[:, 0, 0, 0], many[:, 0])
        assert set(sizes) == {size}, f"{free} bytes are free"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((0, 16), np.int32), r"shape \[0, 16\]"),
        (np.zeros((2, 15), np.int32), r"expected \[B, 16\]"),
        (np.zeros(16, np.int32), r"shape \[16\]"),
        (np.full((1, 16), 256), "from 0 to 255"),
        (np.full((1, 16), -1), "from 0 to 255"),
        (np.zeros((1, 16)), "whole numbers"),
    ],
)
def test_what_is_no_code_is_refused(janus, wrong, message):
    with raises_one_line(message):
        janus.decode_codes(wrong)


def test_encoding(janus, codes, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    ours = janus.encode_images([pixels, Image.fromarray(pixels[:, 12:28]), tmp_path / "wide.png"])
    assert ours.shape == (3, 16) and ours.dtype == np.int32
    assert ours.min() >= 0 and ours.max() < 256 and len(np.unique(ours)) > 3
    # The middle of a long side counts, whatever the image comes as.
    np.testing.assert_array_equal(ours[1:], ours[:1].repeat(2, axis=0))
    scaled = jnp.asarray(pixels[None, :, 12:28].repeat(3, axis=0) / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(encode_codes(janus.model, janus.params, scaled), ours)


def test_encoding_in_parts(janus, monkeypatch):
    pictures = list(np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8))
    whole, sizes = janus.encode_images(pictures), []

    def encode(model, params, part):
        sizes.append(len(part))
        return encode_codes(model, params, part)

    monkeypatch.setattr("janus_jax.pipeline.encode_codes", encode)
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: 1)
    np.testing.assert_array_equal(janus.encode_images(pictures), whole)
    np.testing.assert_array_equal(janus.encode_images(pictures, batch_size=2), whole)
    assert sizes == [1] * 5 + [2] * 3
    with raises_one_line("no images to encode"):
        janus.encode_images([])


# ---------------------------------------------------------------- what drawing refuses


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("", {}, "prompt is ''"),
        (" \n", {}, "say what to draw"),
        ([SHORT, ""], {}, "prompt is ''"),
        ([SHORT, None], {}, "prompt is None"),
        ([], {}, "prompts is empty"),
        ("cat " * 600, {}, r"\d{3} tokens and 16 new tokens exceeds the model's 512 positions"),
        (SHORT, {"n": 0}, "n 0 is out of range"),
        (SHORT, {"n": -2}, "n -2 is out of range"),
        (SHORT, {"n": float("nan")}, "n nan is out of range"),
        (SHORT, {"n": 1.5}, "n 1.5 is out of range"),
        (SHORT, {"cfg_weight": -1}, "cfg_weight -1 is out of range"),
        (SHORT, {"cfg_weight": float("nan")}, "cfg_weight nan"),
        (SHORT, {"cfg_weight": float("inf")}, "cfg_weight inf"),
        (SHORT, {"temperature": -0.1}, "temperature -0.1"),
        (SHORT, {"temperature": float("nan")}, "temperature nan"),
        (SHORT, {"temperature": float("inf")}, "temperature inf"),
        (SHORT, {"top_p": 0}, "top_p 0"),
        (SHORT, {"top_p": 1.5}, "top_p 1.5"),
        (SHORT, {"top_p": float("nan")}, "top_p nan"),
        (SHORT, {"top_k": 0}, "top_k 0"),
        (SHORT, {"top_k": 2.5}, "top_k 2.5"),
        (SHORT, {"top_k": float("nan")}, "top_k nan is out of range"),
        (SHORT, {"seed": -1}, "seed -1"),
        (SHORT, {"seed": 2**32}, "seed 4294967296"),
        (SHORT, {"seed": 0.5}, "seed 0.5"),
        (SHORT, {"seed": None}, "seed None"),
        (SHORT, {"seed": [1, 2]}, "2 seeds for 1 images"),
        ([SHORT, OTHER], {"n": 2, "seed": [1, 2, 3]}, "3 seeds for 4 images"),
        (SHORT, {"seed": [float("nan")]}, "seed nan"),
        (SHORT, {"batch_size": 0}, "batch_size 0"),
        (SHORT, {"batch_size": float("nan")}, "batch_size nan"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(janus, monkeypatch, prompts, settings, message):
    monkeypatch.setattr("janus_jax.pipeline.generate_codes", lambda *args, **kwargs: pytest.fail("it was drawn"))
    for draw in (janus.generate_images, janus.generate_codes):
        with raises_one_line(message):
            draw(prompts, **settings)


def test_bad_batch_size_of_decoding(janus, codes):
    with raises_one_line("batch_size 0"):
        janus.decode_codes(codes, batch_size=0)


# ---------------------------------------------------------------- progress


def test_progress(janus, codes, capfd):
    np.testing.assert_array_equal(janus.generate_codes(SHORT, n=5, batch_size=2, progress=True), codes)
    shown = capfd.readouterr()
    assert "drawing" in shown.err and "48/48" in shown.err.splitlines()[-1]  # 3 parts of 16 steps
    assert shown.out == ""


@pytest.mark.parametrize("progress", [False, None])
def test_no_progress(janus, capfd, progress):
    """None asks whether standard error is a terminal, which it is not here."""
    janus.generate_images(SHORT, n=5, progress=progress)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- chat

QUESTION = "What is it?"
SETTINGS = {"max_new_tokens": 20, "system_prompt": ""}  # a prompt without system part is padded to 32


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.integers(low, low + 100, (40, 60, 3), np.uint8) for low in (0, 80, 155)]


@pytest.fixture
def prompts(janus, monkeypatch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """What the model is asked, as it happens: ids, where the images go, pixels."""
    seen = []

    def spied(model, params, ids, where, pixels):
        seen.append((np.asarray(ids), np.asarray(where), None if pixels is None else np.asarray(pixels)))
        return embed_prompt(model, params, ids, where, pixels)

    monkeypatch.setattr("janus_jax.pipeline.embed_prompt", spied)
    return seen


@pytest.fixture
def answers(janus, monkeypatch) -> list[list[int]]:
    """The ids of every answer, as they are decoded."""
    seen = []
    original = janus.processor.tokenizer.decode

    def decode(ids, *args):
        seen.append(list(ids))
        return original(ids, *args)

    monkeypatch.setattr(janus.processor.tokenizer, "decode", decode)
    return seen


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "drawn"])
def test_stream_joins_to_the_answer(janus, draw):
    pieces = list(janus.stream_chat(QUESTION, **SETTINGS, **draw))
    assert len(pieces) > 3 and all(pieces)
    answer = janus.chat(QUESTION, **SETTINGS, **draw)
    assert isinstance(answer, str) and answer == "".join(pieces).strip() != ""
    assert janus.chat(QUESTION, **SETTINGS, **draw) == answer


def test_drawn_answers_depend_on_the_seed(janus):
    drawn = {janus.chat(QUESTION, **SETTINGS, temperature=0.8, top_p=0.9, seed=seed) for seed in (0, 3, 4)}
    assert len(drawn) == 3


def test_new_tokens_at_most(janus, answers):
    for count in (1, 7, 20):
        janus.chat(QUESTION, max_new_tokens=count, system_prompt="")
    assert [len(ids) for ids in answers] == [1, 7, 20]
    assert answers[2][:7] == answers[1] and answers[1][:1] == answers[0]


def test_lengths_of_one_bucket_share_one_program(janus):
    janus.chat(QUESTION, **SETTINGS)
    programs = (embed_prompt, start_text, continue_text)
    before = [program._cache_size() for program in programs]
    assert min(before) > 0
    janus.chat("Which of the two?", max_new_tokens=9, system_prompt="")
    list(janus.stream_chat("Is it?", max_new_tokens=32, system_prompt=""))
    assert [program._cache_size() for program in programs] == before


def test_end_of_sentence_stops(janus, answers, monkeypatch):
    tokenizer = janus.processor.tokenizer
    janus.chat(QUESTION, **SETTINGS)
    full = answers[-1]
    end = next(i for i in range(2, 20) if full[i] not in full[:i])
    monkeypatch.setattr(tokenizer, "eos_id", full[end])
    steps = []
    original = continue_text
    monkeypatch.setattr(text, "continue_text", lambda *args: steps.append(int(args[-1])) or original(*args))

    answer = janus.chat(QUESTION, **SETTINGS)
    assert answers[-1] == full[:end]
    assert answer == tokenizer.decode(full[:end]).strip()
    steps.clear()
    assert "".join(janus.stream_chat(QUESTION, **SETTINGS)).strip() == answer
    assert max(steps, default=1) < end + 5, "it went on after the end of the sentence"


def test_end_of_sentence_at_once(janus, answers, monkeypatch):
    janus.chat(QUESTION, **SETTINGS)
    monkeypatch.setattr(janus.processor.tokenizer, "eos_id", answers[-1][0])
    assert janus.chat(QUESTION, **SETTINGS) == ""
    assert list(janus.stream_chat(QUESTION, **SETTINGS)) == []


def test_batch_equals_each_alone(janus, answers, pictures, monkeypatch):
    """Of any length, with 0, 1 and 2 images, and where one ends before the others."""
    questions = ["Which of the two is brighter? " + LONG, "What is it?", "Describe the picture. Which is brighter?"]
    images = [(), pictures[:1], pictures[1:]]
    alone = [janus.chat(q, i, **SETTINGS) for q, i in zip(questions, images, strict=True)]
    ids = answers[-3:]
    assert len({tuple(row) for row in ids}) == 3, "the answers are alike, which proves nothing"
    assert janus.chat_batch(questions, images, **SETTINGS) == alone
    assert answers[-3:] == ids
    reversed_batch = janus.chat_batch(questions[::-1], images[::-1], **SETTINGS)
    assert reversed_batch == alone[::-1]
    # A token that one answer holds and another does not.
    end = next((row, i) for row in range(3) for i, token in enumerate(ids[row]) if token not in ids[row - 1])
    monkeypatch.setattr(janus.processor.tokenizer, "eos_id", ids[end[0]][end[1]])
    janus.chat_batch(questions, images, **SETTINGS)
    assert answers[-3:][end[0]] == ids[end[0]][: end[1]]
    assert answers[-3:][end[0] - 1] == ids[end[0] - 1]


def test_answers_in_parts(janus, pictures, monkeypatch):
    questions = ["What is it?", "Describe the picture.", "Which is brighter?"]
    images, settings = [(), pictures[:1], pictures[1:]], SETTINGS | {"max_new_tokens": 6}
    whole, rows = janus.chat_batch(questions, images, **settings), []
    original = start_text
    monkeypatch.setattr(text, "start_text", lambda *args: rows.append(len(args[2])) or original(*args))
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: 1)
    assert janus.chat_batch(questions, images, **settings) == whole
    assert rows == [1, 1, 1]
    monkeypatch.setattr("janus_jax.sampling.memory.available_bytes", lambda device: 10**12)
    failures = iter([jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])

    def start(*args):
        for error in failures:
            raise error
        rows.append(len(args[2]))
        return original(*args)

    rows.clear()
    monkeypatch.setattr(text, "start_text", start)
    assert janus.chat_batch(questions, images, **settings) == whole
    assert rows == [1, 1, 1]


def test_answer_depends_on_the_image(janus, answers, pictures):
    for picture in (pictures[0], pictures[2]):
        janus.chat("Describe the picture. Which is brighter?", picture, **SETTINGS)
    assert answers[0] != answers[1]


def test_image_sources(janus, prompts, pictures, tmp_path):
    """A path, a PIL image or an array; in a list or alone; beside the question or in its message."""
    Image.fromarray(pictures[0]).save(tmp_path / "picture.png")
    text = "Describe the picture. Which is brighter?"
    expected = janus.chat(text, [pictures[0]], **SETTINGS)
    for image in (pictures[0], str(tmp_path / "picture.png"), tmp_path / "picture.png", Image.fromarray(pictures[0])):
        assert janus.chat(text, image, **SETTINGS) == expected
    message = {"role": "user", "content": text, "images": [pictures[0]]}
    assert janus.chat([message], **SETTINGS) == expected
    assert janus.chat([message | {"content": f"<image_placeholder>\n{text}"}], **SETTINGS) == expected
    assert len(prompts) == 7
    ids, where, pixels = prompts[0]
    assert where.sum() == 16 and pixels.shape == (1, 1, 64, 64, 3)
    for others in prompts[1:]:
        for ours, other in zip((ids, where, pixels), others, strict=True):
            np.testing.assert_array_equal(ours, other)


def test_images_keep_their_order(janus, prompts, pictures):
    janus.chat("Which of the two is brighter?", pictures[:2], **SETTINGS)
    turns = [
        {"role": "user", "content": "Which of the two is brighter?", "images": pictures[:2]},
    ]
    janus.chat(turns, **SETTINGS)
    janus.chat("Which of the two is brighter?", pictures[1::-1], **SETTINGS)
    for _, where, pixels in prompts:
        assert where.sum() == 32 and pixels.shape == (1, 2, 64, 64, 3)
    np.testing.assert_array_equal(prompts[0][2], prompts[1][2])
    np.testing.assert_array_equal(prompts[0][2], prompts[2][2][:, ::-1])
    assert prompts[0][2][0, 0].mean() < prompts[0][2][0, 1].mean()


def test_conversation_of_several_turns(janus, prompts):
    turns = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Red?"},
    ]
    answer = janus.chat(turns, **SETTINGS)
    assert answer == "".join(janus.stream_chat(turns, **SETTINGS)).strip()
    ids, where, pixels = prompts[0]
    tokenizer = janus.processor.tokenizer
    text = f"<|User|>: Is it?\n\n<|Assistant|>: A cat.{tokenizer.eos}<|User|>: Red?\n\n<|Assistant|>:"
    row = tokenizer.encode(text)
    assert ids[0, -len(row) :].tolist() == row and (ids[0, : -len(row)] == tokenizer.pad_id).all()
    assert not where.any() and pixels is None


def test_system_prompt(janus, prompts, monkeypatch):
    tokenizer = janus.processor.tokenizer
    question = f": {QUESTION}\n\n:"  # the role tags are special tokens
    for system, expected in (("Be brief.", f"Be brief.\n\n{question}"), ("", question)):
        prompts.clear()
        janus.chat(QUESTION, max_new_tokens=20, system_prompt=system)
        ids = prompts[0][0][0]
        assert tokenizer.decode(ids[ids != tokenizer.pad_id]) == expected
    monkeypatch.setattr(janus.processor, "understanding_prompt", lambda turns, images, system, new: pytest.fail(system))
    with pytest.raises(pytest.fail.Exception, match="You are a helpful language and vision assistant"):
        janus.chat(QUESTION)


# ---------------------------------------------------------------- what chat refuses


@pytest.mark.parametrize(
    ("messages", "images", "settings", "message"),
    [
        ("", (), {}, "message 0 .* is empty"),
        ([], (), {}, "no messages"),
        ("<image_placeholder> What?", (), {}, "hold 1 <image_placeholder> but there are 0 images"),
        ("<image_placeholder> What?", "two", {}, "hold 1 <image_placeholder> but there are 2 images"),
        ([{"role": "robot", "content": "Hi"}], (), {}, "unknown role 'robot'"),
        ("cat " * 600, (), {}, r"\d{3} tokens and 20 new tokens exceeds the model's 512 positions"),
        (QUESTION, (), {"max_new_tokens": 512}, "512 new tokens exceeds the model's 512 positions"),
        (QUESTION, (), {"max_new_tokens": 0}, "max_new_tokens 0"),
        (QUESTION, (), {"max_new_tokens": float("nan")}, "max_new_tokens nan"),
        (QUESTION, (), {"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        (QUESTION, (), {"temperature": -1}, "temperature -1"),
        (QUESTION, (), {"temperature": float("nan")}, "temperature nan"),
        (QUESTION, (), {"top_p": 0}, "top_p 0"),
        (QUESTION, (), {"top_p": float("nan")}, "top_p nan"),
        (QUESTION, (), {"top_k": 0}, "top_k 0"),
        (QUESTION, (), {"seed": -1}, "seed -1"),
        (QUESTION, (), {"seed": 2**40}, "seed 1099511627776"),
        (QUESTION, (), {"seed": float("nan")}, "seed nan"),
        (QUESTION, [np.zeros((4, 4, 3))], {}, "uint8"),
        (QUESTION, [b"no image"], {}, "not an image"),
    ],
)
def test_bad_conversations_are_refused_at_the_call(janus, pictures, messages, images, settings, message):
    images = pictures[:2] if images == "two" else images
    settings = SETTINGS | settings
    with raises_one_line(message):
        janus.chat(messages, images, **settings)
    with raises_one_line(message):
        janus.chat_batch([QUESTION, messages], [(), images], **settings)
    # At the call itself, and not when the first piece is asked for.
    with raises_one_line(message):
        janus.stream_chat(messages, images, **settings)


def test_missing_image(janus, tmp_path):
    with raises_one_line(r"absent\.png", FileNotFoundError):
        janus.chat(QUESTION, tmp_path / "absent.png", **SETTINGS)
    with raises_one_line(r"absent\.png", FileNotFoundError):
        janus.stream_chat(QUESTION, tmp_path / "absent.png", **SETTINGS)


@pytest.mark.parametrize(
    ("conversations", "images", "message"),
    [
        ([], None, "0 conversations"),
        ([QUESTION], [(), ()], "1 conversations came with 2 lists of images"),
        (QUESTION, None, "a list of conversations"),
    ],
)
def test_bad_batches(janus, conversations, images, message):
    with raises_one_line(message):
        janus.chat_batch(conversations, images, **SETTINGS)


def test_without_tokenizer(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    janus = load(bare)
    assert janus.processor is None
    for call in (janus.generate_images, janus.generate_codes, janus.chat, janus.stream_chat):
        with raises_one_line(r"bare has no tokenizer\.json"):
            call("A cat.")
    # What needs none of it works.
    assert janus.decode_codes(np.zeros((5, 16), np.int32)).shape == (5, 16, 16, 3)


def test_repr_leaves_out_the_arrays(janus):
    """A notebook shows it: seven billion parameters must not be fetched and printed for that."""
    assert len(repr(janus)) < 4000 and "language=LlamaConfig" in repr(janus)
    assert not any(path in repr(janus) for path in flatten(janus.params))
