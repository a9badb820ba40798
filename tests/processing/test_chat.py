"""Templates, messages and prompts: the reference's goldens, and what bad input gets."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples.tiny.tokenizer import BOS, edit_json, write_tokenizer
from janus_jax.config import get_preset, read_config
from janus_jax.processing import chat as processing
from janus_jax.processing import images
from janus_jax.processing.chat import (
    SYSTEM_PROMPT,
    Processor,
    format_conversation,
    normalize_messages,
)
from janus_jax.processing.images import ImageSettings

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny"
TEMPLATES = json.loads((GOLDEN / "templates.json").read_text(encoding="utf-8"))
CONFIG = read_config(GOLDEN)
SLOTS = CONFIG.vision.num_patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("pro"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_folder(folder, CONFIG)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy of the tokenizer folder that a test may spoil."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def one_line(error):
    return "\n" not in str(error.value)


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_equals_the_reference(name):
    golden = TEMPLATES[name]
    assert format_conversation(golden["messages"], golden["system"]) == golden["text"]


@pytest.mark.parametrize(("prefix", "roles"), [("deepseek/", "pro"), ("deepseek_old/", "old")])
def test_processor_writes_its_own_roles(processor, prefix, roles):
    processor = dataclasses.replace(processor, roles=roles)
    for name, golden in TEMPLATES.items():
        if name.startswith(prefix):
            # The roles are given by the other model's names on purpose.
            messages = [("User" if i % 2 == 0 else "<|Assistant|>", t) for i, (_, t) in enumerate(golden["messages"])]
            assert processor.format(messages, golden["system"]) == golden["text"]


def test_template_eos_is_the_tokenizers():
    messages = [("User", "a"), ("Assistant", "b"), ("User", "c"), ("Assistant", "")]
    assert format_conversation(messages, eos="</s>") == "User: a\n\nAssistant: b</s>User: c\n\nAssistant:"


def test_system_prompt_is_the_goldens():
    assert TEMPLATES["deepseek/one/sys"]["system"] == SYSTEM_PROMPT


# ---------------------------------------------------------------- messages


def test_a_question():
    assert normalize_messages("Why?") == ([("user", "Why?"), ("assistant", "")], [])


def test_a_question_with_images():
    turns, found = normalize_messages("Which?", ["a.png", "b.png"])
    assert turns[0] == ("user", "<image_placeholder>\n<image_placeholder>\nWhich?")
    assert found == ["a.png", "b.png"]


def test_placeholders_of_the_text_stay_where_they_are():
    turns, _ = normalize_messages("A <image_placeholder> B", ["a.png"])
    assert turns[0] == ("user", "A <image_placeholder> B")
    turns, _ = normalize_messages("A <img> B", ["a.png"], image_tag="<img>")
    assert turns[0] == ("user", "A <img> B")


@pytest.mark.parametrize("image", ["a.png", pathlib.Path("a.png"), b"\x89PNG", Image.new("L", (2, 2))])
def test_one_image_needs_no_list(image):
    turns, found = normalize_messages("What?", image)
    assert turns[0][1].count("<image_placeholder>") == 1
    assert found == [image]
    assert normalize_messages([{"role": "user", "content": "What?", "images": image}])[1] == [image]


def test_one_array_is_one_image_and_a_stack_is_several():
    stack = np.zeros((3, 8, 8, 3), np.uint8)
    assert len(normalize_messages("What?", stack[0])[1]) == 1
    assert len(normalize_messages("What?", stack)[1]) == 3


def test_messages_of_the_reference():
    turns, found = normalize_messages(
        [
            {"role": "<|User|>", "content": "<image_placeholder>\nWhat?", "images": ["a.png"]},
            {"role": "Assistant", "content": "A cat."},
            {"role": "USER", "content": "And these?", "images": ["b.png", "c.png"]},
            {"role": "<|Assistant|>", "content": ""},
        ]
    )
    assert turns == [
        ("user", "<image_placeholder>\nWhat?"),
        ("assistant", "A cat."),
        ("user", "<image_placeholder>\n<image_placeholder>\nAnd these?"),
        ("assistant", ""),
    ]
    assert found == ["a.png", "b.png", "c.png"]


def test_images_beside_a_conversation_go_to_its_start():
    messages = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    turns, found = normalize_messages(messages, ["a.png"])
    assert turns == [("user", "<image_placeholder>\na"), ("assistant", "b"), ("user", "c"), ("assistant", "")]
    assert found == ["a.png"]


def user(content="Hi", **more):
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "given_images", "pattern"),
    [
        ([], [], "no messages"),
        ("", [], r"message 0 \(user\) is empty"),
        (" \n", [], r"message 0 \(user\) is empty"),
        ([{"role": "bot", "content": "Hi"}], [], r"message 0: unknown role 'bot'; known: user, assistant, <\|User\|>"),
        ([{"role": "system", "content": "Hi"}], [], "system_prompt"),
        ([{"role": 3, "content": "Hi"}], [], "unknown role 3"),
        ([{"content": "Hi"}], [], "message 0: unknown role None"),
        ([user(image="a.png")], [], "unknown keys image; known: role, content, images"),
        ([user(), user()], [], "message 1 is by 'user'"),
        ([{"role": "assistant", "content": "Hi"}], [], "message 0 is by 'assistant'"),
        ([user(), {"role": "assistant", "content": "Hello"}], [], "message 1 is already an answer"),
        ([user(), {"role": "assistant", "content": ""}, user()], [], r"message 1 \(assistant\) is empty"),
        ([user(images=["a.png"])], ["b.png"], "both in the messages and as `images`"),
    ],
)
def test_bad_messages(messages, given_images, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        normalize_messages(messages, given_images)
    assert one_line(error)


@pytest.mark.parametrize("messages", [["Hi"], [("user", "Hi")], [user(3)], [user([{"type": "text"}])]])
def test_messages_of_wrong_types(messages):
    with pytest.raises(ValueError, match="message 0"):
        normalize_messages(messages)


# ---------------------------------------------------------------- prompts


def test_understanding_prompt_expands_each_placeholder(processor):
    tokenizer = processor.tokenizer
    turns, _ = normalize_messages("A <image_placeholder>\nB <image_placeholder> which?", ["a", "b"])
    ids = processor.understanding_prompt(turns, 2)
    image = [tokenizer.begin_of_image_id, *[tokenizer.image_placeholder_id] * SLOTS, tokenizer.end_of_image_id]
    # The text is tokenized whole; only then do placeholders grow (reference: add_image_token).
    text = tokenizer.encode(processor.format(turns, SYSTEM_PROMPT))
    first, second = (i for i, token in enumerate(text) if token == tokenizer.image_placeholder_id)
    assert ids == text[:first] + image + text[first + 1 : second] + image + text[second + 1 :]
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids).startswith(SYSTEM_PROMPT + "\n\n")


def test_understanding_prompt_without_images_or_system(processor):
    ids = processor.understanding_prompt([("user", "Hi"), ("assistant", "")], 0, system_prompt="")
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}<|User|>: Hi\n\n<|Assistant|>:"


@pytest.mark.parametrize(("text", "count", "held"), [("no tag", 1, 0), ("<image_placeholder>", 0, 1), ("none", 3, 0)])
def test_placeholder_mismatch_states_both_numbers(processor, text, count, held):
    with pytest.raises(ValueError, match=f"hold {held} <image_placeholder> but there are {count} images") as error:
        processor.understanding_prompt([("user", text), ("assistant", "")], count)
    assert one_line(error)


def test_too_long_prompt_states_both_numbers(processor):
    limit = CONFIG.language.max_positions
    turns = [("user", "z" * 600), ("assistant", "")]
    with pytest.raises(ValueError, match=rf"prompt of \d+ tokens exceeds the model's {limit} positions"):
        processor.understanding_prompt(turns, 0, "")
    ids = processor.understanding_prompt([("user", "Hi"), ("assistant", "")], 0, "", max_new_tokens=limit - 30)
    room = limit - len(ids)
    assert processor.understanding_prompt([("user", "Hi"), ("assistant", "")], 0, "", max_new_tokens=room) == ids
    with pytest.raises(ValueError, match=f"prompt of {len(ids)} tokens and {room + 1} new tokens exceeds .* {limit}"):
        processor.understanding_prompt([("user", "Hi"), ("assistant", "")], 0, "", max_new_tokens=room + 1)


def test_text_to_image_prompt(processor):
    tokenizer = processor.tokenizer
    ids = processor.text_to_image_prompt(" A red house ")
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == f"{BOS}<|User|>: A red house\n\n<|Assistant|>:<begin_of_image>"
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.begin_of_image_id
    partner = processor.unconditional(ids)
    assert partner == [ids[0], *[tokenizer.pad_id] * (len(ids) - 2), ids[-1]]
    assert len(partner) == len(ids)


@pytest.mark.parametrize("ids", [[], [7], [7, 8]])
def test_unconditional_of_short_prompts(processor, ids):
    assert processor.unconditional(ids) == ids


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_empty_prompt(processor, prompt):
    with pytest.raises(ValueError, match="the prompt must be text that says what to draw, got"):
        processor.text_to_image_prompt(prompt)


def test_text_to_image_leaves_room_for_the_image(processor):
    new, limit = CONFIG.gen_vision.num_tokens, CONFIG.language.max_positions
    base = len(processor.text_to_image_prompt("z"))
    longest = "z" * (limit - new - base + 1)
    assert len(processor.text_to_image_prompt(longest)) == limit - new
    with pytest.raises(ValueError, match=f"prompt of {limit - new + 1} tokens and {new} new tokens"):
        processor.text_to_image_prompt(longest + "z")


@given(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 4))
def test_left_pad(processor, rows, extra):
    longest = max(map(len, rows))
    ids, mask = processor.left_pad(rows, longest + extra)
    assert ids.shape == mask.shape == (len(rows), longest + extra)
    assert ids.dtype == mask.dtype == np.int32
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        pads = longest + extra - len(row)
        assert row_ids.tolist() == [processor.tokenizer.pad_id] * pads + row
        assert row_mask.tolist() == [0] * pads + [1] * len(row)
    np.testing.assert_array_equal(processor.left_pad(rows)[0], ids[:, extra:])


def test_left_pad_takes_arrays(processor):
    assert processor.left_pad(np.array([[1, 2], [3, 4]]))[0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("rows", "length", "pattern"),
    [
        ([], None, "at least one row"),
        ([[1], []], None, "one id in every row"),
        ([[1, 2, 3]], 2, "row of 3 .* length 2"),
    ],
)
def test_left_pad_refuses(processor, rows, length, pattern):
    with pytest.raises(ValueError, match=pattern):
        processor.left_pad(rows, length)


# ---------------------------------------------------------------- the processor's folder


def test_roles_are_detected(tmp_path, own_folder):
    assert Processor.from_folder(own_folder, CONFIG).roles == "pro"
    assert Processor.from_folder(own_folder, CONFIG, roles="old").roles == "old"
    edit_json(own_folder / "processor_config.json", sft_format="deepseek_old")
    assert Processor.from_folder(own_folder, CONFIG).roles == "old"
    assert Processor.from_folder(own_folder, CONFIG, roles="pro").roles == "pro"
    assert Processor.from_folder(write_tokenizer(tmp_path / "old", roles="old"), CONFIG).roles == "old"


def test_unknown_roles(folder):
    with pytest.raises(ValueError, match="unknown roles 'new'; known: pro, old"):
        Processor.from_folder(folder, CONFIG, roles="new")


def test_settings_of_the_folder(own_folder, processor):
    assert processor.settings == ImageSettings(image_size=64)
    edit_json(own_folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.4], background_color=None, min_size=20)
    settings = Processor.from_folder(own_folder, CONFIG).settings
    assert (settings.mean, settings.min_size, settings.std) == ((0.1, 0.2, 0.4), 20, (0.5, 0.5, 0.5))
    assert settings.background_color == (25, 51, 102)
    (own_folder / "preprocessor_config.json").unlink()
    assert Processor.from_folder(own_folder, CONFIG).settings == ImageSettings(image_size=64)


def test_settings_as_transformers_writes_them(own_folder):
    (own_folder / "preprocessor_config.json").unlink()
    nested = {"size": {"height": 64, "width": 64}, "min_size": 16, "image_mean": [0.5, 0.5, 0.5]}
    edit_json(own_folder / "processor_config.json", image_processor=nested)
    assert Processor.from_folder(own_folder, CONFIG).settings == ImageSettings(image_size=64, min_size=16)


@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [
        ("preprocessor_config.json", {"image_size": 384}, "image_size 384 but the model's encoder expects 64"),
        ("preprocessor_config.json", {"image_size": "64"}, "image_size must be an integer from 1 to .*, got '64'"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, r"image_mean must be 3 numbers .*, got \[0\.5\]"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "image_mean must be 3 numbers .*, got 0.5"),
        (
            "preprocessor_config.json",
            {"image_std": [0.5, 0, 0.5]},
            r"image_std must be 3 .*, got \[0\.5, 0, 0\.5\]",
        ),
        ("preprocessor_config.json", {"background_color": [1.5, 2, 3]}, "background_color must be 3 integers"),
        ("preprocessor_config.json", {"background_color": [1, 2, 300]}, "must be 3 integers from 0 to 255"),
        ("preprocessor_config.json", {"image_mean": [1e300, 0, 0]}, "image_mean must be 3 numbers"),
        ("preprocessor_config.json", {"image_std": [1e-300, 1, 1]}, "image_std must be 3 numbers"),
        ("preprocessor_config.json", {"rescale_factor": 0}, "rescale_factor must be a number from .*, got 0"),
        ("preprocessor_config.json", {"do_normalize": "no"}, "do_normalize must be true or false, got 'no'"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is false; images without that step"),
        ("preprocessor_config.json", {"do_pad": False}, "do_pad is false; images without that step"),
        ("preprocessor_config.json", {"resample": 2}, r"resample is 2; only 3 \(bicubic\) is supported"),
        (
            "preprocessor_config.json",
            {"image_size": 10**9},
            "image_size must be an integer .*, got 1000000000",
        ),
        ("preprocessor_config.json", {"min_size": 0}, "min_size must be an integer from 1 to .*, got 0"),
        (
            "processor_config.json",
            {"num_image_tokens": 576},
            "must be the model's 16 patches, got 576",
        ),
    ],
)
def test_files_that_contradict_the_model(own_folder, name, changes, pattern):
    edit_json(own_folder / name, **changes)
    with pytest.raises(ValueError, match=pattern) as error:
        Processor.from_folder(own_folder, CONFIG)
    assert str(own_folder) in str(error.value) and one_line(error)


def test_tokenizer_larger_than_the_model(folder):
    small = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=399))
    with pytest.raises(ValueError, match="tokenizer has 400 ids but the model only 399"):
        Processor.from_folder(folder, small)


def test_full_size_prompt_has_576_slots(tmp_path):
    write_tokenizer(tmp_path, image_size=384, num_image_tokens=576)
    processor = Processor.from_folder(tmp_path, get_preset("janus_pro_1b"))
    ids = processor.understanding_prompt(normalize_messages("What?", "a.png")[0], 1)
    assert ids.count(processor.tokenizer.image_placeholder_id) == 576


def test_processor_pixels(processor):
    pictures = [np.zeros((64, 64, 3), np.uint8), Image.new("L", (10, 90), 255)]
    pixels = processor.understanding_pixels(pictures)
    assert pixels.shape == (2, 64, 64, 3) and pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[0], -1)
    assert processor.understanding_pixels([]).shape == (0, 64, 64, 3)


def test_only_light_dependencies():
    for module in (processing, images):
        names = {getattr(value, "__name__", "").split(".")[0] for value in vars(module).values()}
        assert not names & {"jax", "flax", "torch", "transformers"}
