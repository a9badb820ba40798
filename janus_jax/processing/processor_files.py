"""The small files next to the weights, in either dialect: tokenizer, processor, image settings, chat template.

The reference builds a `VLChatProcessor` from them (original dialect), transformers a `JanusProcessor`. A file that is
already in the requested dialect is copied; the others are written from what `Processor` reads in the folder.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers
from tokenizers import processors

from janus_jax.config import JanusConfig
from janus_jax.io.files import read_json_object, read_text
from janus_jax.io.messages import one_line
from janus_jax.io.stores import copy_file
from janus_jax.processing.chat import Processor
from janus_jax.processing.roles import ROLES

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_IMAGE_TOKENS = ("image_token", "boi_token", "eoi_token")
# Keys of tokenizer_config.json that only one of the tokenizer classes reads.
_LLAMA_KEYS = ("legacy", "sp_model_kwargs", "use_default_system_prompt", "chat_template", "auto_map")
_PORT_KEYS = ("backend", "is_local", "local_files_only", "extra_special_tokens", "model_specific_special_tokens")
_BICUBIC = 3  # Pillow's value

# `USER` and the like are replaced. Formats as `format_conversation` does.
_CHAT_TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}
{%- if not loop.first -%}
{{ '\\n' if 'image' in (item['type'], content[loop.index0 - 1]['type']) else ' ' }}
{%- endif -%}
{%- if item['type'] == 'image' -%}{{ 'IMAGE' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] }}
{%- else -%}{{ raise_exception('Janus accepts text and images, not ' ~ item['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set text = words(message['content']) | trim -%}
{%- set role = message['role'] | lower -%}
{%- if role == 'system' -%}{{ text ~ '\\n\\n' }}
{%- elif role == 'user' -%}{{ 'USER: ' ~ text }}
{%- if not loop.last or add_generation_prompt -%}{{ '\\n\\n' }}{%- endif -%}
{%- elif role == 'assistant' -%}{{ 'ASSISTANT: ' ~ text ~ 'END' if text else 'ASSISTANT:' }}
{%- else -%}{{ raise_exception('Janus knows the roles user, assistant and system, not ' ~ role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def copy_files(src: pathlib.Path, out: pathlib.Path, names: tuple[str, ...]) -> None:
    """Copies the files `names` that exist in `src`."""
    for name in names:
        if (src / name).is_file():
            copy_file(src / name, out / name)


def write_processor_files(
    src: pathlib.Path, out: pathlib.Path, config: JanusConfig, dialect: str, note: Callable[[str], Any]
) -> None:
    """Writes the files of `dialect` into `out`, for a model of `config` whose files of either dialect are in `src`.

    `out` already has copies of the tokenizer's files. `note` is called with one sentence for each thing that is missing
    or that the dialect cannot express. OSError if a file cannot be read or written.
    """
    try:
        files = _Files.read(src, config)
    except (FileNotFoundError, ValueError) as error:
        kept = [name for name in PROCESSOR_FILES if _is_of(src, name, dialect)]
        copy_files(src, out, tuple(kept))
        missing = [name for name in _WANTED[dialect] if not (out / name).is_file()]
        if missing:
            note(f"{', '.join(missing)}: not written, since there is no usable tokenizer ({one_line(error, 400)})")
        return
    for name, value in files.of(dialect, note):
        if _is_of(src, name, dialect):
            copy_file(src / name, out / name)
        elif isinstance(value, str):
            (out / name).write_text(value, encoding="utf-8")
        elif value is not None:
            text = json.dumps(value, indent=2, ensure_ascii=False)
            (out / name).write_text(text + "\n", encoding="utf-8")
    dropped = [name for name in _TEMPLATES if (src / name).is_file() and not (out / name).is_file()]
    if dropped and dialect == "original":
        note(f"{', '.join(dropped)}: left out, since the reference builds its prompts in code")


def token_ids(src: pathlib.Path, config: JanusConfig) -> dict[str, int]:
    """The ids that transformers wants in config.json, by key; {} if the tokenizer in `src` cannot be read."""
    try:
        return _Files.read(src, config).special_ids
    except (FileNotFoundError, ValueError):
        return {}


# ---------------------------------------------------------------- which dialect a file is in

_WANTED = {
    "original": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "processor_config.json",
    ),
    "transformers": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ),
}


def _is_of(src: pathlib.Path, name: str, dialect: str) -> bool:
    """Whether `src` has a file `name` in `dialect`; the library of the other dialect could not read it."""
    if not (src / name).is_file():
        return False
    if name in _TEMPLATES:
        return dialect == _dialect(src)
    if name == "tokenizer.json":
        return dialect == "original"  # whether the port needs another one depends on the tokenizer itself
    raw = read_json_object(src / name)
    if name == "preprocessor_config.json":
        return ("Janus" in str(raw.get("image_processor_type"))) == (dialect == "transformers")
    if name == "processor_config.json":
        return (raw.get("processor_class") == "JanusProcessor") == (dialect == "transformers")
    if name in ("tokenizer_config.json", "special_tokens_map.json"):
        return _names_image_tokens(raw) == (dialect == "transformers")
    if name == "generation_config.json":
        return dialect == "original" or "boi_token_id" in (raw.get("generation_kwargs") or {})
    return True


def _dialect(src: pathlib.Path) -> str:
    """The dialect of the processor in `src`."""
    raw = read_json_object(src / "processor_config.json", missing_ok=True)
    return "transformers" if raw.get("processor_class") == "JanusProcessor" else "original"


def _names_image_tokens(raw: dict[str, Any]) -> bool:
    blocks = (raw, raw.get("extra_special_tokens"), raw.get("model_specific_special_tokens"))
    return any(isinstance(block, dict) and "image_token" in block for block in blocks)


# ---------------------------------------------------------------- contents


@dataclasses.dataclass(frozen=True)
class _Files:
    """What the files of a checkpoint say, ready to be written in either dialect."""

    src: pathlib.Path
    processor: Processor
    tokenizer: tokenizers.Tokenizer

    @classmethod
    def read(cls, src: pathlib.Path, config: JanusConfig) -> _Files:
        processor = Processor.from_folder(src, config)
        return cls(src, processor, tokenizers.Tokenizer.from_str(read_text(src / "tokenizer.json")))

    @property
    def special_ids(self) -> dict[str, int]:
        known = self.processor.tokenizer
        return {"bos_token_id": known.bos_id, "eos_token_id": known.eos_id, "pad_token_id": known.pad_id}

    @property
    def special_tokens(self) -> dict[str, str]:
        return {
            key.removesuffix("_id"): self.tokenizer.id_to_token(token_id) for key, token_id in self.special_ids.items()
        }

    @property
    def image_tokens(self) -> dict[str, str]:
        known = self.processor.tokenizer
        ids = (known.image_placeholder_id, known.begin_of_image_id, known.end_of_image_id)
        return dict(zip(_IMAGE_TOKENS, map(self.tokenizer.id_to_token, ids), strict=True))

    @property
    def num_image_tokens(self) -> int:
        return self.processor.config.vision.num_patches

    def of(self, dialect: str, note: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
        """Names and contents of the files of `dialect`: a JSON object, a string, or None for no file."""
        return self._original() if dialect == "original" else self._transformers(note)

    def _json(self, name: str) -> dict[str, Any]:
        return read_json_object(self.src / name, missing_ok=True)

    def _without(self, name: str, *keys: str) -> dict[str, Any]:
        """The object in the file `name` without `keys`; a list of extra special tokens gets the key's older name."""
        raw = self._json(name)
        further = raw.get("extra_special_tokens")
        kept = {key: value for key, value in raw.items() if key not in keys}
        return {"additional_special_tokens": further, **kept} if isinstance(further, list) and further else kept

    # ------------------------------------------------------------ the reference's

    def _original(self) -> Iterator[tuple[str, Any]]:
        settings, tokens = self.processor.settings, self.image_tokens
        yield (
            "preprocessor_config.json",
            {
                "background_color": list(settings.background_color),
                "do_normalize": settings.do_normalize,
                "image_mean": list(settings.mean),
                "image_processor_type": "VLMImageProcessor",
                "image_size": settings.image_size,
                "image_std": list(settings.std),
                "min_size": settings.min_size,
                "processor_class": "VLChatProcessor",
                "rescale_factor": settings.rescale_factor,
            },
        )
        yield (
            "processor_config.json",
            {
                "add_special_token": False,
                "ignore_id": -100,
                "image_end_tag": tokens["eoi_token"],
                "image_start_tag": tokens["boi_token"],
                "image_tag": tokens["image_token"],
                "mask_prompt": True,
                "num_image_tokens": self.num_image_tokens,
                "pad_tag": self.special_tokens["pad_token"],
                "processor_class": "VLChatProcessor",
                "sft_format": "deepseek_old" if self.processor.roles == "old" else "deepseek",
            },
        )
        kept = self._without("tokenizer_config.json", *_IMAGE_TOKENS, *_PORT_KEYS, "chat_template")
        own = {
            "legacy": True,
            "processor_class": "VLChatProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
            "use_default_system_prompt": False,
        }
        yield "tokenizer_config.json", self._tokenizer_config(kept, own)
        kept = self._without("special_tokens_map.json", *_IMAGE_TOKENS, "extra_special_tokens")
        yield "special_tokens_map.json", {**kept, **self.special_tokens}
        yield "generation_config.json", None

    def _tokenizer_config(self, kept: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """tokenizer_config.json of a dialect: the keys `kept` from the source, those both share, and its `own`."""
        return {
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.processor.config.language.max_positions,
            **kept,
            **self.special_tokens,
            "add_bos_token": True,
            "add_eos_token": False,
            **own,
        }

    # ------------------------------------------------------------ transformers'

    def _transformers(self, note: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
        processor = self._json("processor_config.json")
        if _dialect(self.src) != "transformers" or "image_processor" not in processor:
            yield "preprocessor_config.json", self._image_processor(note)
        yield (
            "processor_config.json",
            {
                "num_image_tokens": self.num_image_tokens,
                "processor_class": "JanusProcessor",
                "use_default_system_prompt": True,
            },
        )
        yield "tokenizer.json", self._with_bos()
        kept = self._without("tokenizer_config.json", *_LLAMA_KEYS, "extra_special_tokens")
        own = {
            **self.image_tokens,
            "extra_special_tokens": self.image_tokens,
            "processor_class": "JanusProcessor",
            # Reads tokenizer.json unchanged; LlamaTokenizer would build a different one.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        yield "tokenizer_config.json", self._tokenizer_config(kept, own)
        kept = self._without("special_tokens_map.json", "extra_special_tokens")
        yield "special_tokens_map.json", {**kept, **self.special_tokens, **self.image_tokens}
        if not any(_is_of(self.src, name, "transformers") for name in _TEMPLATES):
            yield "chat_template.jinja", self._chat_template()
        yield from ((name, None) for name in _TEMPLATES if _is_of(self.src, name, "transformers"))
        # With `_from_model_config`, transformers would ignore the file.
        raw = self._without("generation_config.json", "_from_model_config", "transformers_version")
        drawing = {**(raw.get("generation_kwargs") or {}), "boi_token_id": self.processor.tokenizer.begin_of_image_id}
        yield (
            "generation_config.json",
            {"guidance_scale": 5.0, "temperature": 1.0, **raw, **self.special_ids, "generation_kwargs": drawing},
        )

    def _image_processor(self, note: Callable[[str], Any]) -> dict[str, Any]:
        settings = self.processor.settings
        background = [int(mean * 255) for mean in settings.mean]
        if list(settings.background_color) != background:
            note(
                f"transformers uses the background color {background}, derived from the mean; "
                f"its files cannot express {list(settings.background_color)}"
            )
        return {
            "do_normalize": settings.do_normalize,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(settings.mean),
            "image_processor_type": "JanusImageProcessor",
            "image_std": list(settings.std),
            "min_size": settings.min_size,
            "processor_class": "JanusProcessor",
            "resample": _BICUBIC,
            "rescale_factor": settings.rescale_factor,
            "size": {"height": settings.image_size, "width": settings.image_size},
        }

    def _with_bos(self) -> str | None:
        """tokenizer.json with a step that prepends BOS, as the reference's class does itself; None to leave it."""
        bos = self.special_tokens["bos_token"]
        if self.tokenizer.encode("a").ids[:1] == [self.special_ids["bos_token_id"]]:
            return None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, self.special_ids["bos_token_id"])],
        )
        return self.tokenizer.to_str(pretty=True)

    def _chat_template(self) -> str:
        user, assistant = ROLES[self.processor.roles]
        words = {"USER": user, "ASSISTANT": assistant, "IMAGE": self.image_tokens["image_token"]}
        template = _CHAT_TEMPLATE
        for word, text in {**words, "END": self.special_tokens["eos_token"]}.items():
            template = template.replace(word, text.replace("\\", "\\\\").replace("'", "\\'"))
        return template
