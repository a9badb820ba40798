"""What the engine is asked: a job is one answer, or one image, with its prompt and how its tokens are drawn.

The prompts are those of `JanusPipeline.chat` and `generate_images`. A request for n answers or images is n jobs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from janus_jax.pipeline import Conversation, JanusPipeline
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor, normalize_messages
from janus_jax.sampling.sampler import Options, check_count

# A prompt is prefilled in pieces of these numbers of tokens, each of them one program.
PIECES = (16, 32, 128, 512)
_MOST_PADDING = 1 / 3  # of a piece; with more of it, smaller pieces are faster where computing takes the time


@dataclasses.dataclass(frozen=True)
class Token:
    """A text token or a code was drawn, with this log probability among all (after guidance, before temperature)."""

    token: int
    logprob: float


@dataclasses.dataclass(frozen=True)
class Ended:
    """The job is over: 'stop' at the end of the sentence or image, 'length' at its limit, or 'cancelled'."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The job is over, and failed."""

    error: Exception


Event = Token | Ended | Failed


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture in a prompt: the slot of its first patch, its pixels [S, S, 3], and the digest that tells it apart."""

    start: int
    pixels: np.ndarray = dataclasses.field(repr=False)

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """The prompt of one row: ids [T] int32, and its pictures of `patches` slots each."""

    ids: np.ndarray
    pictures: tuple[Picture, ...] = ()
    patches: int = 0

    @functools.cached_property
    def content(self) -> np.ndarray:
        """int64 [T], equal where two prompts are: ids, and negative numbers made of digests at the pictures' slots."""
        content = self.ids.astype(np.int64)
        for picture in self.pictures:
            mark = int.from_bytes(picture.digest[:7], "big")
            content[picture.start : picture.start + self.patches] = -1 - mark
        return content

    def pieces(self, start: int, slots: int) -> Iterator[tuple[int, np.ndarray | Picture, int]]:
        """The prompt from slot `start` on, but its last token: (slot, padded ids [1, size] or a picture, tokens).

        Padding stays within `slots`, of which there are at least the prompt's and the smallest of PIECES.
        """
        slot, end = start, len(self.ids) - 1
        for picture in self.pictures:
            if picture.start < slot:
                continue
            yield from self._text(slot, picture.start, slots)
            yield picture.start, picture, self.patches
            slot = picture.start + self.patches
        yield from self._text(slot, end, slots)

    def _text(self, slot: int, end: int, slots: int) -> Iterator[tuple[int, np.ndarray, int]]:
        while slot < end:
            fitting = [size for size in PIECES if slot + size <= slots]
            size = next((size for size in fitting if (1 - _MOST_PADDING) * size <= end - slot <= size), None)
            size = size or max((size for size in fitting if size <= end - slot), default=fitting[0])
            count = min(end - slot, size)
            # The last id stands for padding too.
            yield slot, self.ids[None, np.minimum(slot + np.arange(size), slot + count - 1)], count
            slot += count


@dataclasses.dataclass(eq=False)
class Job:
    """One answer or one image to draw.

    Attributes:
      prompts: of its row, or of the two rows of an image with guidance.
      options: how tokens are drawn; an image's seed is one number.
      limit: the most tokens to draw.
      end_id: the token that ends it; None for an image.
      index: of an image, among those of its seed; -1 for an answer.
      adapter: the name of the adapter to use; None for none.
      notify: called with every Event, from the engine's thread; it must be quick, and must not raise.
      sampler: the fields of the options' Sampler, on the host.
    The engine's own:
      rows: the rows that it has; tokens: those drawn so far; dispatched: how many tokens it will have when all steps
        are read whose outcome is known: of images that are guessed, those that were read.
      reused: tokens of its prompts that were there already. over: whether Ended or Failed was told.
      submitted, seated, first, ended: when, by the monotonic clock.
    """

    prompts: tuple[Prompt, ...]
    options: Options
    limit: int
    end_id: int | None
    index: int = -1
    adapter: str | None = None
    notify: Callable[[Event], None] = lambda event: None

    sampler: dict[str, Any] = dataclasses.field(init=False)
    rows: tuple[int, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    dispatched: int = 0
    reused: int = 0
    cancelled: bool = False
    over: bool = False
    submitted: float = 0.0
    seated: float | None = None
    first: float | None = None
    ended: float | None = None

    def __post_init__(self):
        sampler = self.options.sampler
        self.sampler = {field.name: np.asarray(getattr(sampler, field.name)) for field in dataclasses.fields(sampler)}

    @property
    def image(self) -> bool:
        return self.end_id is None

    @property
    def prompt_tokens(self) -> int:
        """Of the conditional row, which is what the user wrote."""
        return len(self.prompts[0].ids)

    def tell(self, event: Event):
        """Passes `event` on, unless the job is over."""
        if self.over:
            return
        if isinstance(event, Token):
            self.first = self.first or time.monotonic()
            self.tokens.append(event.token)
        else:
            self.over, self.ended = True, time.monotonic()
        self.notify(event)


def question(
    janus: JanusPipeline,
    messages: Conversation,
    images: Any = (),
    max_new_tokens: int = 512,
    options: Options | None = None,
    *,
    system_prompt: str = SYSTEM_PROMPT,
    adapter: str | None = None,
) -> Job:
    """The job whose tokens are those of `JanusPipeline.chat`'s answer; arguments and errors as there."""
    processor = _processor(janus)
    check_count("max_new_tokens", max_new_tokens)
    tokenizer = processor.tokenizer
    turns, sources = normalize_messages(messages, images, tokenizer.image_placeholder)
    ids = processor.understanding_prompt(turns, len(sources), system_prompt, max_new_tokens)
    pixels = processor.understanding_pixels(sources)
    prompt = _with_pictures(np.array(ids, np.int32), tokenizer.image_placeholder_id, pixels, processor)
    options = Options(temperature=0.0) if options is None else options
    return Job((prompt,), options, max_new_tokens, tokenizer.eos_id, adapter=adapter)


def drawings(
    janus: JanusPipeline, prompt: str, n: int = 1, options: Options | None = None, *, adapter: str | None = None
) -> list[Job]:
    """The jobs whose tokens are the codes of `JanusPipeline.generate_images(prompt, n, ...)`; errors as there.

    `options.seed` may be a sequence with a seed for each image, which is then the first one of its seed.
    """
    processor = _processor(janus)
    check_count("n", n)
    options = Options(cfg_weight=5.0) if options is None else options
    ids = processor.text_to_image_prompt(prompt)
    pair = [ids, processor.unconditional(ids)] if options.cfg_weight != 1 else [ids]
    prompts = tuple(Prompt(np.array(row, np.int32)) for row in pair)
    limit = janus.config.gen_vision.num_tokens
    if not isinstance(options.seed, Sequence):
        return [Job(prompts, options, limit, None, index, adapter) for index in range(n)]
    if len(options.seed) != n:
        raise ValueError(f"{len(options.seed)} seeds for {n} images; give one seed, or one for each image")
    each = [dataclasses.replace(options, seed=seed) for seed in options.seed]
    return [Job(prompts, own, limit, None, 0, adapter) for own in each]


def _processor(janus: JanusPipeline) -> Processor:
    if janus.processor is None:
        raise ValueError(f"{janus.source or 'this checkpoint'} has no tokenizer.json, which is needed to serve it")
    return janus.processor


def _with_pictures(ids: np.ndarray, placeholder: int, pixels: np.ndarray, processor: Processor) -> Prompt:
    patches = processor.config.vision.num_patches
    starts = np.flatnonzero(ids == placeholder)[::patches].tolist()
    return Prompt(ids, tuple(map(Picture, starts, pixels)), patches)
