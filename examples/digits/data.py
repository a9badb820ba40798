"""Handwritten digits as training data: files in formats of `train.raw.sources`, and a tokenizer for their texts.

The images are scikit-learn's `load_digits`: 1797 of 8 x 8 pixels in 17 gray levels. Here they are RGB, and 16 x 16
unless said otherwise.
"""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.tiny.tokenizer import image_settings
from janus_jax.processing.chat import (
    BEGIN_OF_IMAGE,
    BOS,
    END_OF_IMAGE,
    EOS,
    IMAGE_PLACEHOLDER,
    PAD,
    ROLES,
    SYSTEM_PROMPT,
)
from janus_jax.weights.checkpoint import write_json

IMAGE_SIZE = 16
SPLITS = ("train", "validation", "held_out")
_HELD_OUT, _VALIDATION = 360, 180  # images
SHIFTS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))  # of the 8 x 8 pixels

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a handwritten {digit}",
    "the digit {word}",
    "draw the number {digit}",
    "a {word} written by hand",
    "number {digit}",
    "a picture of the digit {digit}",
)
# Each has one right answer, so that answers can be compared as they are.
QUESTIONS = (
    ("Which digit is this?", "{digit}"),
    ("What number is written here?", "It is a {digit}."),
    ("Name the digit in one word.", "{word}"),
    ("Describe the picture.", "A handwritten {digit}."),
)


# ---------------------------------------------------------------- images


def load_split(*names: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 8, 8] and labels [N] of some of `SPLITS`, which are the same in every run: 1257, 180, 360."""
    for name in names:
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; known: {', '.join(SPLITS)}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError("the handwritten digits need scikit-learn: pip install -e '.[digits]'") from None

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rest, held_out = train_test_split(np.arange(len(labels)), test_size=_HELD_OUT, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=_VALIDATION, stratify=labels[rest], random_state=0)
    splits = {"train": train, "validation": validation, "held_out": held_out}
    chosen = np.sort(np.concatenate([splits[name] for name in names]))
    return images[chosen], labels[chosen]


def shifted(images: np.ndarray, shifts: Iterable[tuple[int, int]] = SHIFTS) -> np.ndarray:
    """`images` [N, 8, 8] moved by each (down, right) of at most one pixel, [shifts * N, 8, 8]; black moves in."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return np.concatenate([padded[:, 1 - down : 9 - down, 1 - right : 9 - right] for down, right in shifts])


def to_rgb(images: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """uint8 images [N, 8, 8] as [N, size, size, 3], by Pillow's bicubic filter."""
    large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1)


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images as the VQ encoder takes them, float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def _varied(images: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 images [N, size, size, 3], each moved by up to a pixel, with noise."""
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, right = rng.integers(0, 3, (2, len(images)))
    moved = [p[d : d + size, r : r + size] for p, d, r in zip(padded, down, right, strict=True)]
    gray = rng.normal(0, noise, (*images.shape[:3], 1))
    return np.clip(np.rint(np.stack(moved) + gray), 0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """A uint8 image [h, w, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---------------------------------------------------------------- texts


def _filled(template: str, label: int) -> str:
    return template.format(digit=label, word=WORDS[label])


def captions(label: int) -> list[str]:
    """What asks for an image of the digit `label`, in every phrasing."""
    return [_filled(caption, label) for caption in CAPTIONS]


def questions(label: int) -> list[tuple[str, str]]:
    """Questions about an image of the digit `label`, each with its one right answer."""
    return [(question, _filled(answer, label)) for question, answer in QUESTIONS]


def sentences() -> list[str]:
    """Plain text about digits: sums, successors, comparisons, counting."""
    texts = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10 - a)]
    texts += [f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]}." for a in range(10) for b in range(10 - a)]
    texts += [f"After {WORDS[a]} comes {WORDS[a + 1]}." for a in range(9)]
    texts += [f"{a} is {'odd' if a % 2 else 'even'}." for a in range(10)]
    texts += [f"{a} is {'less' if a < b else 'more'} than {b}." for a in range(10) for b in range(10) if a != b]
    texts += [
        f"Counting from {a} to {b}: {' '.join(map(str, range(a, b + 1)))}." for a in range(8) for b in range(a + 2, 10)
    ]
    return texts


# ---------------------------------------------------------------- files


def write_sources(
    folder: pathlib.Path,
    splits: Sequence[str],
    seed: int,
    augment: bool,
    noise: float = 12.0,
    size: int = IMAGE_SIZE,
) -> dict[str, pathlib.Path]:
    """Writes splits as sources for `train.prepare`, in a few seconds.

    understanding/llava.jsonl names PNG files beside it, with one question each; generation/digits.tar is a webdataset
    of images and captions; text/text.jsonl holds `sentences`. Which image comes with which text is drawn by `seed`.

    Args:
      augment: as many copies of every image as there are `SHIFTS`: those to be drawn at each of them, those to be
        understood moved by a pixel of theirs at most, with slight noise (they stand in the middle when they are asked
        about).
      noise: its standard deviation, in 255ths.
      size: of the pictures, in pixels a side.
    Returns: the three files, by kind.
    """
    rng = np.random.default_rng(seed)
    images, labels = load_split(*splits)
    drawn, seen = to_rgb(images, size), to_rgb(images, size)
    if augment:
        copies = len(SHIFTS)
        drawn, labels = to_rgb(shifted(images), size), np.tile(labels, copies)
        seen = _varied(np.tile(seen, (copies, 1, 1, 1)), noise, rng)
    order = rng.permutation(len(labels))
    drawn, seen, labels = drawn[order], seen[order], labels[order]
    paths = {kind: folder / kind / name for kind, name in _FILES.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    _write_understanding(paths["understanding"], seen, labels, rng)
    _write_generation(paths["generation"], drawn, labels, rng)
    _write_lines(paths["text"], ({"text": text} for text in sentences()))
    return paths


_FILES = {"understanding": "llava.jsonl", "text": "text.jsonl", "generation": "digits.tar"}


def _write_understanding(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator):
    (path.parent / "images").mkdir(exist_ok=True)

    def records() -> Iterator[dict[str, Any]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = f"images/{index:05d}.png"
            (path.parent / name).write_bytes(png(image))
            question, answer = questions(label)[rng.integers(len(QUESTIONS))]
            asked = {"from": "human", "value": f"<image>\n{question}"}
            yield {"id": index, "image": name, "conversations": [asked, {"from": "gpt", "value": answer}]}

    _write_lines(path, records())


def _write_generation(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator):
    with tarfile.open(path, "w") as tar:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            caption = captions(label)[rng.integers(len(CAPTIONS))]
            for suffix, content in (("png", png(image)), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_lines(path: pathlib.Path, records: Iterable[dict[str, Any]]):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# ---------------------------------------------------------------- tokenizer


def write_tokenizer(folder: pathlib.Path, vocab_size: int, image_size: int, num_image_tokens: int) -> None:
    """Writes the tokenizer and processor files of a checkpoint: byte-level BPE learned from the digits' texts.

    The system prompt, with which every conversation opens, is one token of its own.

    Args:
      vocab_size: of at most so many ids, Janus's special tokens and the 256 bytes included.
      image_size, num_image_tokens: pixels a side, and patches, of the understanding encoder.
    Raises: ValueError for a vocabulary without room.
    """
    specials = [BOS, EOS, PAD, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_PLACEHOLDER, *ROLES["pro"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet) + len(specials):
        raise ValueError(f"a vocabulary of {vocab_size} has no room for {len(alphabet) + len(specials)} bytes and tags")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # What comes with every digit becomes one token, and what comes with one digit alone is not merged with it.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials) - 1, initial_alphabet=alphabet, show_progress=False, min_frequency=8
    )
    texts = ["\n\n", ": ", ":\n\n"] * 8
    for label in range(10):
        texts += [f": {caption}\n\n" for caption in captions(label)]
        texts += [part for question, answer in questions(label) for part in (f"\n{question}\n\n", f" {answer}")]
    texts += sentences()
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(SYSTEM_PROMPT, normalized=False)])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    files = {
        "tokenizer_config.json": {**names, "tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": names,
        "preprocessor_config.json": image_settings(image_size),
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": IMAGE_PLACEHOLDER,
            "num_image_tokens": num_image_tokens,
            "sft_format": "deepseek",
        },
    }
    for name, content in files.items():
        write_json(folder / name, content)
