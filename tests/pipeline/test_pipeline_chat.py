"""The pipeline: answering, alone, streamed and together, and what it says of bad input."""

# ruff: noqa: F811  (fixtures are imported)

import jax
import numpy as np
import pytest
from PIL import Image

from janus_jax.sampling import text
from janus_jax.sampling.text import continue_text, embed_prompt, start_text
from tests.library.tiny_janus import (  # noqa: F401
    LONG,
    QUESTION,
    SETTINGS,
    folder,
    janus,
    raises_one_line,
)

# ---------------------------------------------------------------- chat


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


@pytest.mark.slow
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


@pytest.mark.slow
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
        (QUESTION, (), {"max_new_tokens": 0}, "max_new_tokens must be .*, got 0"),
        (QUESTION, (), {"max_new_tokens": float("nan")}, "max_new_tokens must be .*, got nan"),
        (QUESTION, (), {"max_new_tokens": 2.5}, "max_new_tokens must be .*, got 2.5"),
        (QUESTION, (), {"temperature": -1}, "temperature must be .*, got -1"),
        (QUESTION, (), {"temperature": float("nan")}, "temperature must be .*, got nan"),
        (QUESTION, (), {"top_p": 0}, "top_p must be .*, got 0"),
        (QUESTION, (), {"top_p": float("nan")}, "top_p must be .*, got nan"),
        (QUESTION, (), {"top_k": 0}, "top_k must be .*, got 0"),
        (QUESTION, (), {"seed": -1}, "seed must be .*, got -1"),
        (QUESTION, (), {"seed": 2**40}, "seed must be .*, got 1099511627776"),
        (QUESTION, (), {"seed": float("nan")}, "seed must be .*, got nan"),
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
