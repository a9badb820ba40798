"""The files beside the weights: what transformers and the reference make of them is what we make of the source's."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import janus_jax
from examples.tiny.tokenizer import BOS, EOS, PAD, edit_json, write_tokenizer
from janus_jax.io.whole.ownership import MARK
from janus_jax.processing.chat import Processor, normalize_messages
from janus_jax.processing.images import ImageSettings
from janus_jax.processing.processor_files import PROCESSOR_FILES, TOKENIZER_FILES, copy_files
from janus_jax.weights import checkpoint
from janus_jax.weights.conversion import from_torch, to_torch
from tests.conftest import SIZES
from tests.torch_oracle import load_file, torch

REFERENCE_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
}
PORT_FILES = REFERENCE_FILES | {"chat_template.jinja", "generation_config.json"}
FURTHER = ["<|ref|>", "<|User|>"]


def silent(text: str) -> None:
    pass


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARK, "config.json", "params"} - {"model.safetensors"}


def read(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def original(case, folder: pathlib.Path, **how) -> pathlib.Path:
    """`case` as the original dialect has it, with a tokenizer of ours."""
    config = dataclasses.replace(case.config, vision=dataclasses.replace(case.config.vision, norm_eps=1e-6))
    source = folder.with_name(f"{folder.name}-weights")
    shutil.copytree(case.folder, source)
    raw = read(source, "config.json")
    raw["vision_config"]["layer_norm_eps"] = 1e-6  # the original dialect has no word for another
    (source / "config.json").write_text(json.dumps(raw))
    to_torch(source, folder, "original", note=silent)
    vision = config.vision
    sizes = {"image_size": vision.image_size, "num_image_tokens": vision.num_patches}
    write_tokenizer(folder, vocab_size=min(400, config.language.vocab_size), **sizes, **how)
    return folder


@pytest.fixture(scope="module")
def sources(get_case, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The tiny model in every layout, with the files that lie there in that layout."""
    root = tmp_path_factory.mktemp("sources")
    source = original(get_case("tiny"), root / "original")
    layouts = {name: root / name for name in ("bin", "converted", "transformers", "port_converted", "export")}
    layouts["bin"].mkdir()
    copy_files(source, layouts["bin"], (*TOKENIZER_FILES, *PROCESSOR_FILES, "config.json"))
    torch.save(load_file(source / "model.safetensors"), layouts["bin"] / "pytorch_model.bin")
    from_torch(source, layouts["converted"])
    to_torch(source, layouts["transformers"], "transformers", note=silent)
    from_torch(layouts["transformers"], layouts["port_converted"])
    params = checkpoint.load_params(source, as_numpy=True)
    checkpoint.save(layouts["export"], checkpoint.open_checkpoint(source).config, params)
    copy_files(source, layouts["export"], TOKENIZER_FILES + PROCESSOR_FILES)
    return {"original": source, **layouts}


def picture(seed: int = 0, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8))


# ---------------------------------------------------------------- every layout


@pytest.mark.parametrize("layout", ["original", "bin", "converted", "transformers", "port_converted", "export"])
def test_every_layout_gives_the_same_files(sources, layout, tmp_path):
    to_torch(sources[layout], tmp_path / "port", "transformers", note=silent)
    assert names(tmp_path / "port") == PORT_FILES
    for name in PORT_FILES | {"config.json"}:
        assert (tmp_path / "port" / name).read_bytes() == (sources["transformers"] / name).read_bytes(), name
    notes = []
    to_torch(sources[layout], tmp_path / "ours", "original", note=notes.append)
    assert names(tmp_path / "ours") - {"generation_config.json"} == REFERENCE_FILES
    of_port = layout in ("transformers", "port_converted")
    left_out = "chat_template.jinja: left out, since the reference builds its prompts in code"
    assert notes == ([left_out] if of_port else [])
    if not of_port:  # what is there already is not touched
        for name in REFERENCE_FILES:
            assert (tmp_path / "ours" / name).read_bytes() == (sources["original"] / name).read_bytes()
    assert_reference_files(tmp_path / "ours")


def assert_reference_files(folder: pathlib.Path, **changed):
    """What `VLChatProcessor`, `VLMImageProcessor` and the tokenizer's class of the reference ask their files for."""
    image = {
        "image_processor_type": "VLMImageProcessor",
        "image_size": 64,
        "min_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "background_color": [127, 127, 127],
    }
    processor = {
        "processor_class": "VLChatProcessor",
        "image_tag": "<image_placeholder>",
        "num_image_tokens": 16,
        "sft_format": "deepseek",
    } | changed
    assert image.items() <= read(folder, "preprocessor_config.json").items()
    assert processor.items() <= read(folder, "processor_config.json").items()
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    assert tokens.items() <= read(folder, "special_tokens_map.json").items()
    assert read(folder, "tokenizer_config.json")["add_bos_token"] is True
    assert json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


@pytest.mark.parametrize("roles", ["pro", "old"])
def test_the_reference_finds_every_field(get_case, tmp_path, roles):
    """From a folder that transformers wrote, with nothing of the reference's in it."""
    from transformers import AutoProcessor

    source = original(get_case("tiny"), tmp_path / "source", roles=roles)
    edit_json(source / "processor_config.json", sft_format="deepseek_old" if roles == "old" else "deepseek")
    edit_json(source / "special_tokens_map.json", additional_special_tokens=FURTHER)
    to_torch(source, tmp_path / "port", "transformers", note=silent)
    saved = tmp_path / "saved"
    AutoProcessor.from_pretrained(tmp_path / "port").save_pretrained(saved)
    assert "image_processor" in read(saved, "processor_config.json") and names(saved) < PORT_FILES
    copy_files(tmp_path / "port", saved, ("config.json", "model.safetensors"))
    to_torch(saved, tmp_path / "ours", "original", note=silent)

    assert read(tmp_path / "ours", "processor_config.json") == {
        "add_special_token": False,
        "ignore_id": -100,
        "image_end_tag": "<end_of_image>",
        "image_start_tag": "<begin_of_image>",
        "image_tag": "<image_placeholder>",
        "mask_prompt": True,
        "num_image_tokens": 16,
        "pad_tag": PAD,
        "processor_class": "VLChatProcessor",
        "sft_format": "deepseek_old" if roles == "old" else "deepseek",
    }
    assert read(tmp_path / "ours", "preprocessor_config.json") == {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "VLMImageProcessor",
        "image_size": 64,
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 1 / 255,
    }
    written = read(tmp_path / "ours", "tokenizer_config.json")
    expected = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    assert {**expected, "add_bos_token": True, "add_eos_token": False, "legacy": True}.items() <= written.items()
    assert not {"image_token", "extra_special_tokens", "model_specific_special_tokens", "backend"} & written.keys()
    ours, source_s = (Processor.from_folder(folder, get_case("tiny").config) for folder in (tmp_path / "ours", source))
    assert ours.roles == source_s.roles == roles
    assert ours.settings == source_s.settings
    for processor in (ours, Processor.from_folder(tmp_path / "port", get_case("tiny").config)):
        assert processor.roles == roles
        for text in ("Draw a 猫.", f"What? {EOS}"):
            assert processor.text_to_image_prompt(text) == source_s.text_to_image_prompt(text)

    to_torch(saved, tmp_path / "again", "transformers", note=silent)
    assert names(tmp_path / "again") == PORT_FILES - {"preprocessor_config.json"}  # it is in processor_config.json
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "again").tokenizer
    assert set(FURTHER) <= set(tokenizer.all_special_tokens)


# ---------------------------------------------------------------- transformers answers as we do


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_transformers_answers_with_our_ids(get_case, tmp_path, name):
    from transformers import AutoProcessor, AutoTokenizer, JanusForConditionalGeneration, pipeline

    source = original(get_case(name), tmp_path / "source")
    folder = tmp_path / "port"
    to_torch(source, folder, "transformers", note=silent)
    ours = janus_jax.load(source, dtype="float32")
    size = ours.config.vision.image_size

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("A cat, 一只猫").input_ids == ours.processor.tokenizer.encode("A cat, 一只猫")
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"type": "image", "image": picture(0, size)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}]
    tokenized = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **tokenized)
    turns, images = normalize_messages("What is it?", [picture(0, size)])
    assert inputs["input_ids"][0].tolist() == ours.processor.understanding_prompt(turns, 1)
    pixels = ours.processor.understanding_pixels(images)
    np.testing.assert_allclose(inputs["pixel_values"].permute(0, 2, 3, 1), pixels, atol=1e-6)

    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    answer = ours.chat("What is it?", images=images, max_new_tokens=12)
    out = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(out, skip_special_tokens=True).strip() == answer.strip() != ""
    pipe = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    (piped,) = pipe(text=messages, max_new_tokens=12, return_full_text=False)
    assert piped["generated_text"].strip() == answer.strip()

    prompt = processor.apply_chat_template([{"role": "user", "content": "a cat"}], add_generation_prompt=True)
    inputs = processor(text=prompt, generation_mode="image", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ours.processor.text_to_image_prompt("a cat")
    codes = model.generate(**inputs, generation_mode="image", do_sample=False)
    assert codes.shape == (1, ours.config.gen_vision.num_tokens)


@pytest.mark.parametrize("roles", ["pro", "old"])
def test_the_chat_template_writes_our_prompts(get_case, tmp_path, roles):
    from transformers import AutoProcessor

    config = get_case("tiny").config
    source = original(get_case("tiny"), tmp_path / "source", roles=roles)
    to_torch(source, tmp_path / "port", "transformers", note=silent)
    ours, port = Processor.from_folder(source, config), AutoProcessor.from_pretrained(tmp_path / "port")
    image, text = {"type": "image"}, {"type": "text", "text": "Which is  brighter? "}
    dialogues = [
        ([("user", [image, image, text])], [("user", "<image_placeholder>\n" * 2 + text["text"]), ("assistant", "")]),
        (
            [("user", [text, image]), ("assistant", "The first.\n"), ("user", "Why?")],
            [
                ("user", f"{text['text']}\n<image_placeholder>"),
                ("assistant", "The first."),
                ("user", "Why?"),
                ("assistant", ""),
            ],
        ),
        ([("user", [image]), ("assistant", "")], [("user", "<image_placeholder>\n"), ("assistant", "")]),
        ([("user", "Hi 'you' \\ {{x}}"), ("assistant", "Yes")], [("user", "Hi 'you' \\ {{x}}"), ("assistant", "Yes")]),
    ]
    for theirs, turns in dialogues:
        messages = [{"role": role, "content": content} for role, content in theirs]
        asked = theirs[-1][0] == "user"
        assert port.apply_chat_template(messages, add_generation_prompt=asked) == ours.format(turns)
    told = port.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert told == ours.format([("user", "Hi")], "Be brief.")
    for message in ({"role": "tool", "content": "4"}, {"role": "user", "content": [{"type": "video"}]}):
        with pytest.raises(Exception, match=r"Janus (knows the roles|accepts text and images)"):
            port.apply_chat_template([message])


# ---------------------------------------------------------------- what is missing, or cannot be said


def test_settings_are_carried_over(get_case, tmp_path):
    source = original(get_case("tiny"), tmp_path / "source")
    changes = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "min_size": 7, "do_normalize": False}
    edit_json(source / "preprocessor_config.json", **changes, background_color=[1, 2, 3], rescale_factor=0.5)
    edit_json(source / "tokenizer_config.json", padding_side="left", model_max_length=77)
    notes = []
    to_torch(source, tmp_path / "port", "transformers", note=notes.append)
    assert (
        len(notes) == 1
        and "the background color [102, 127, 153], derived from the mean; its files cannot express [1, 2, 3]"
        in notes[0]
    )
    written = read(tmp_path / "port", "preprocessor_config.json")
    assert (
        changes | {"rescale_factor": 0.5, "size": {"height": 64, "width": 64}, "resample": 3}
    ).items() <= written.items()
    assert ImageSettings.parse(written).std == (0.2, 0.3, 0.4)
    config = read(tmp_path / "port", "tokenizer_config.json")
    assert (config["padding_side"], config["model_max_length"]) == ("left", 77)
    known = Processor.from_folder(source, get_case("tiny").config).tokenizer
    ids = {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id, "pad_token_id": known.pad_id}
    assert ids.items() <= read(tmp_path / "port", "config.json")["text_config"].items()
    generation = read(tmp_path / "port", "generation_config.json")
    assert ids.items() <= generation.items()
    assert generation["generation_kwargs"] == {"boi_token_id": known.begin_of_image_id}


def test_weights_alone_are_converted_with_a_note(get_case, tmp_path):
    notes = []
    to_torch(get_case("tiny").folder, tmp_path / "out", "original", note=notes.append)
    assert len(notes) == 1 and notes[0].startswith("tokenizer.json, tokenizer_config.json, special_tokens_map.json, ")
    assert "not written, since there is no usable tokenizer" in notes[0]
    assert names(tmp_path / "out") <= {"generation_config.json"}


def test_a_tokenizer_alone_is_enough(get_case, tmp_path):
    source = original(get_case("tiny"), tmp_path / "source")
    for name in REFERENCE_FILES - {"tokenizer.json"}:
        (source / name).unlink()
    to_torch(source, tmp_path / "ours", "original", note=silent)
    assert_reference_files(tmp_path / "ours")
    to_torch(source, tmp_path / "port", "transformers", note=silent)
    assert names(tmp_path / "port") == PORT_FILES
