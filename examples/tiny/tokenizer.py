"""A small real tokenizer folder for tests: byte-level BPE with Janus's special tokens, at most 500 ids."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
PRO_TOKENS = ("<|User|>", "<|Assistant|>")
SENTENCES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.",
    "User: What is it?\n\nAssistant: A red circle above a blue square, on the left of the picture.",
    "Describe the picture. Which of the two is brighter? Draw a small green house beside a tall tree at night.",
    "The quick brown fox jumps over the lazy dog, again and again, while ten white cats are watching from the wall.",
    "Every morning somebody walks along the river, counting boats, bridges and birds, and photographs the mountains; "
    "in spring yellow flowers cover the meadow, in winter heavy snow lies upon every roof of our village.",
    "这幅图里有什么？一只红色的猫坐在蓝色的椅子上。 Ein großer Hund läuft über die grüne Wiese. 🙂🎨",
)


def image_settings(image_size: int) -> dict[str, Any]:
    """Content of the original's preprocessor_config.json for images of `image_size` pixels a side."""
    return {
        "image_processor_type": "VLMImageProcessor",
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_size": image_size,
        "min_size": 14,
        "rescale_factor": 1 / 255,
    }


def write_tokenizer(
    folder: str | os.PathLike,
    roles: str = "pro",
    vocab_size: int = 400,
    image_size: int = 64,
    num_image_tokens: int = 16,
    post_processor_bos: bool = False,
    without: tuple[str, ...] = (),
) -> pathlib.Path:
    """Writes tokenizer and processor files into `folder` (made if absent) and returns it.

    `vocab_size` counts everything. The sizes default to those of golden/janus_tiny. `roles` "old" leaves out the role
    tokens, `without` any token named; `post_processor_bos` makes tokenizer.json add a BOS by itself.
    """
    specials = [token for token in SPECIAL_TOKENS + (PRO_TOKENS if roles == "pro" else ()) if token not in without]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials), initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if not size == vocab_size <= 500:
        raise ValueError(f"vocab_size must lie between {len(alphabet) + len(specials)} and 500, not be {vocab_size}")
    if post_processor_bos:
        bos_id = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos = {"__type": "AddedToken", "content": BOS, "lstrip": False, "normalized": True, "rstrip": False}
    files = {
        "tokenizer_config.json": {"bos_token": bos, "eos_token": EOS, "pad_token": EOS, "add_bos_token": True},
        "special_tokens_map.json": {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        "preprocessor_config.json": image_settings(image_size),
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": "<image_placeholder>",
            "num_image_tokens": num_image_tokens,
            "sft_format": "deepseek",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def edit_json(path: pathlib.Path, **changes):
    """Rewrites the JSON object in `path` with `changes`; a value of None drops the key."""
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8")
