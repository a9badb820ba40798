"""The high-level interface for notebooks and command lines: prompts and images in, images and text out."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from janus_jax.config import JanusConfig
from janus_jax.model.janus import Janus
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor, bucket
from janus_jax.processing.images import generation_pixels
from janus_jax.processing.tokenizer import Tokenizer
from janus_jax.sampling import batches
from janus_jax.sampling.batches import Batch, fitting, in_batches
from janus_jax.sampling.finite import on_host, refuse_codes, refuse_pixels
from janus_jax.sampling.images import (
    checked_codes,
    compile_codes,
    compile_decoding,
    decode_images,
    encode_codes,
    generate_codes,
)
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import Options, check_count, image_keys, seed_key
from janus_jax.sampling.speculative import Speculate, check_speculate
from janus_jax.sampling.text import Asked, compile_tokens, embed_prompt, stream_tokens
from janus_jax.sharding import batch_shards
from janus_jax.weights.adapters.loaded import Adapters

Conversation = str | Sequence[dict[str, Any]]


@dataclasses.dataclass(eq=False)
class JanusPipeline:
    """A loaded Janus, as returned by `janus_jax.load`.

    Attributes:
      config, params, model: the frozen sizes, the plain nested dict of arrays, and the flax.linen module.
      processor: templates, tokenizer and image transforms; None if the checkpoint has no tokenizer.
      mesh: the mesh of the parameters, or None for one device.
      source: path or hub id of the checkpoint, for messages.
      adapters: those that were loaded, and which is in use.
    """

    config: JanusConfig
    params: dict[str, Any] = dataclasses.field(repr=False)  # a notebook would fetch and print gigabytes
    model: Janus
    processor: Processor | None = None
    mesh: Mesh | None = None
    source: str = ""
    adapters: Adapters = dataclasses.field(init=False)

    def __post_init__(self):
        self.adapters = Adapters(self.config, self.model.dtype, self.mesh, self.source)

    # ------------------------------------------------------------ text to image

    def generate_images(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        cfg_weight: float = 5.0,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool | None = None,
        speculate: Speculate = "auto",
    ) -> list[Image.Image]:
        """Draws `n` images for each prompt.

        An image depends only on its prompt, its seed and its index among the n, not on what else is drawn.

        Args:
          prompts: one prompt or several.
          n: images per prompt.
          cfg_weight: weight of classifier-free guidance, from 0; 1 is the conditional model alone, in half the time.
          temperature: 0 takes the likeliest code, 1 is the reference.
          top_k, top_p: draw among the likeliest codes only; None and 1 keep all, as the reference does.
          seed: one seed for the call, or one for each image (len(prompts) * n of them), each then as with n = 1.
          batch_size: images drawn at a time; default as many as fit in the device's memory.
          progress: show a bar; default in a terminal or a notebook.
          speculate: codes of an image that a pass of the model is given, most of them guesses: the same images, sooner.
            "auto" takes what pays on the platform for so many images at a time; False is one code after the other.
        Returns: PIL images, n for each prompt, in order.
        Raises: ValueError for a blank or too long prompt, or a setting out of range; its subclass `finite.NotFinite` if
          the model's outputs are not finite, which ends the whole call.
        """
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, cfg_weight=cfg_weight)
        drawing = self._drawing(prompts, n, options)
        how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "speculate": speculate}
        codes = self.sample_codes(*drawing, options, **how)
        return [Image.fromarray(image) for image in self.decode_codes(codes)]

    def generate_codes(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        cfg_weight: float = 5.0,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool | None = None,
        speculate: Speculate = "auto",
    ) -> np.ndarray:
        """Image codes [len(prompts) * n, num_tokens] int32; arguments as for `generate_images`."""
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, cfg_weight=cfg_weight)
        how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "speculate": speculate}
        return self.sample_codes(*self._drawing(prompts, n, options), options, **how)

    def compile_images(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        cfg_weight: float = 5.0,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        speculate: Speculate = "auto",
    ) -> None:
        """Compiles the programs of `generate_images` for the same arguments; `params` may be shapes, see `load`.

        Raises: ValueError as `generate_images` does, and for a pipeline on a mesh, since shapes have no shardings.
        """
        self._refuse_mesh("compile_images")
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, cfg_weight=cfg_weight)
        ids, mask, keys = self._drawing(prompts, n, options)
        total = len(keys)
        batch = batches.first(total, batches.images_at_a_time(self.model, self.params, None, ids, total, batch_size))
        given = (*map(batch.put_prompts, (ids, mask)), batch.put(keys))
        how: dict[str, Any] = {"guidance": cfg_weight, "sampler": options.sampler, "speculate": speculate}
        try:
            compile_codes(self.model, self.params, *given, **how)
            size = batches.first(total, batches.pictures_at_a_time(self.model, self.params, self.mesh, total)).size
            compile_decoding(self.model, self.params, size)
        except jax.errors.JaxRuntimeError as error:
            if not OutOfMemory.says(error):  # in which case drawing will use smaller batches
                raise

    def _drawing(self, prompts: str | Sequence[str], n: int, options: Options) -> tuple[Any, Any, jax.Array]:
        """Ids, mask and keys for `images.generate_codes`."""
        processor = self._need_processor("draw from a prompt")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("nothing to draw: the list of prompts is empty")
        check_count("n", n)
        keys = image_keys(options.seed, len(prompts), n)
        copies = n if len(prompts) > 1 else 1  # one prompt is prefilled once, for all its images
        return *processor.drawing_batch(prompts, copies, guided=options.cfg_weight != 1), keys

    def sample_codes(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        keys: jax.Array,
        options: Options,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        speculate: Speculate = "auto",
    ) -> np.ndarray:
        """`images.generate_codes` in batches that fit in memory: ids, mask and keys as there, on the host."""
        total, steps = len(keys), self.config.gen_vision.num_tokens
        check_speculate(speculate, steps)
        how: dict[str, Any] = {"guidance": options.cfg_weight, "sampler": options.sampler, "speculate": speculate}

        def draw(batch: Batch) -> np.ndarray:
            given = (*map(batch.put_prompts, (ids, mask)), batch.put(keys))
            return on_host(generate_codes(self.model, self.params, *given, progress=batch.progress, **how)[0])

        size = batches.images_at_a_time(self.model, self.params, self.mesh, ids, total, batch_size)
        return in_batches(draw, total, size, self.mesh, name="drawing", steps=steps, progress=progress)

    def decode_codes(self, codes: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """uint8 images [B, h, w, 3] of codes [B, num_tokens], decoded in batches that fit in memory.

        Raises: ValueError for an array of another shape, or values that are not codes.
        """
        codes = checked_codes(self.config.gen_vision, codes)

        def decode(batch: Batch) -> np.ndarray:
            images, finite = decode_images(self.model, self.params, batch.put(codes))
            refuse_pixels(self.model, self.params, finite)
            return on_host(images)

        size = batches.pictures_at_a_time(self.model, self.params, self.mesh, len(codes), batch_size)
        return in_batches(decode, len(codes), size, self.mesh, name="decoding")

    def encode_images(self, images: Sequence[Any], batch_size: int | None = None) -> np.ndarray:
        """Codes [B, num_tokens] int32 of images (anything that `images.open_image` accepts), cropped to a square.

        Encoded in float32, whatever the model's dtype, in batches that fit in memory.
        """
        vq, images = self.config.gen_vision, list(images)
        if not images:
            raise ValueError("there are no images to encode: the list is empty")

        def encode(batch: Batch) -> np.ndarray:
            pixels = np.stack([generation_pixels(image, vq.image_size) for image in images[batch.rows]])
            codes = on_host(encode_codes(self.model, self.params, batch.put_own(pixels)))
            refuse_codes(self.model, self.params, codes)
            return codes

        size = batches.pictures_at_a_time(self.model, self.params, self.mesh, len(images), batch_size, jnp.float32)
        return in_batches(encode, len(images), size, self.mesh, name="encoding")

    # ------------------------------------------------------------ understanding

    def chat(
        self,
        messages: Conversation,
        images: Any = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> str:
        """The model's answer to a question, or to a conversation of several turns.

        Args:
          messages: a question, or dicts {"role": "user" | "assistant", "content", optional "images"}.
          images: paths, PIL images or arrays, in the order of the `<image_placeholder>`s; without placeholders they
            come before the first message.
          max_new_tokens: the most tokens of the answer.
          temperature: 0 is greedy, the reference's default.
          top_k, top_p: draw among the likeliest tokens only; None and 1 keep all.
          seed: random seed.
          system_prompt: put in front; empty for none.
        Raises: ValueError for an empty or too long conversation, different numbers of placeholders and images, a
          setting out of range, or outputs that are not finite (`finite.NotFinite`); OSError for an image that cannot
          be read.
        """
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return self._answers(self._asking([messages], [images], max_new_tokens, options, system_prompt))[0]

    def stream_chat(
        self,
        messages: Conversation,
        images: Any = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> Iterator[str]:
        """`chat` as an iterator over pieces of the answer; joined and stripped, they are what `chat` returns.

        Bad input is refused by the call itself, before the first piece; outputs that are not finite end the iteration
        before the piece concerned.
        """
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        asked = self._asking([messages], [images], max_new_tokens, options, system_prompt)
        pieces = self._stream(asked, batches.first(1, 1, self.mesh), piece=4)
        return self._tokenizer.stream_answer(piece[0] for piece in pieces)

    def chat_batch(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Any] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> list[str]:
        """Answers to several conversations of any lengths at once; `images` has the images of each.

        Other arguments as for `chat`. An answer depends only on its conversation and the seed, not on how many fit in
        memory at a time.
        """
        if isinstance(conversations, str):
            raise ValueError("chat_batch takes a list of conversations; ask a single question with chat")
        images = [()] * len(conversations) if images is None else images
        if not conversations or len(conversations) != len(images):
            raise ValueError(f"{len(conversations)} conversations came with {len(images)} lists of images")
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return self._answers(self._asking(conversations, images, max_new_tokens, options, system_prompt))

    def compile_chat(
        self,
        messages: Conversation,
        images: Any = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> None:
        """Compiles the programs of `chat` and `stream_chat` for the same arguments; otherwise as `compile_images`."""
        self._refuse_mesh("compile_chat")
        options = Options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        asked = self._asking([messages], [images], max_new_tokens, options, system_prompt)
        given = map(batches.first(1, 1).put, asked.arrays)
        compile_tokens(self.model, self.params, *given, sampler=asked.sampler, room=bucket(max_new_tokens))

    def _asking(
        self, conversations: Sequence[Conversation], images: Any, max_new_tokens: int, options: Options, system: str
    ) -> Asked:
        processor = self._need_processor("chat")
        check_count("max_new_tokens", max_new_tokens)
        given = processor.understanding_batch(conversations, images, system, max_new_tokens)
        keys = jnp.broadcast_to(seed_key(options.seed), (len(conversations),))
        return Asked((*given, keys), max_new_tokens, options.sampler)

    def _answers(self, asked: Asked) -> list[str]:
        return [self._tokenizer.answer(row) for row in self.sample_tokens(asked).tolist()]

    def sample_tokens(self, asked: Asked, batch_size: int | None = None) -> np.ndarray:
        """Tokens [B, max_new_tokens] int32 of answers, EOS from their ends on, in batches that fit in memory."""
        (ids, _, pixels, *_), eos_id = asked.arrays, self._tokenizer.eos_id

        def answer(batch: Batch) -> np.ndarray:
            tokens = np.concatenate(list(self._stream(asked, batch, piece=64)), axis=1)
            return np.pad(tokens, ((0, 0), (0, asked.max_new_tokens - tokens.shape[1])), constant_values=eos_id)

        total, images = len(ids), 0 if pixels is None else pixels.shape[1]
        per_row = batches.bytes_to_answer(self.model, ids.shape[1], images, bucket(asked.max_new_tokens))
        size = batch_size or fitting(total, per_row, self.mesh, coming=self.params)
        multiple = 1 if total < batch_shards(self.mesh) else None  # fewer rows than shards are not split
        return in_batches(answer, total, size, self.mesh, name="answering", unit="conversation", multiple=multiple)

    def _stream(self, asked: Asked, batch: Batch, piece: int) -> Iterator[np.ndarray]:
        with batches.using(batch.mesh):
            ids, where, pixels, mask, keys = map(batch.put, asked.arrays)
            x = embed_prompt(self.model, self.params, ids, where, pixels)
        stream = functools.partial(stream_tokens, self.model, self.params, x, mask, keys)
        eos_id, most = self._tokenizer.eos_id, asked.max_new_tokens
        tokens = stream(eos_id=eos_id, max_new_tokens=most, sampler=asked.sampler, piece=piece, room=bucket(most))
        yield from batches.each_using(batch.mesh, tokens)

    # ------------------------------------------------------------ adapters

    def load_adapter(self, path: str | os.PathLike, scale: float = 1.0, name: str | None = None) -> str:
        """Reads a low-rank adapter in PEFT's files and uses it; returns its name.

        Adapters of the same ranks and layers run the same compiled programs, so switching compiles nothing.

        Args:
          path: the folder of adapter_config.json.
          scale: factor of its changes; 1 is as trained.
          name: for `use_adapter` and `unload_adapter`; default the folder's.
        Raises: OSError for absent files, ValueError for an adapter that does not fit or needs what is not implemented.
        """
        name = self.adapters.load(self.params, path, scale, name)
        self.use_adapter(name)
        return name

    def use_adapter(self, name: str | None) -> None:
        """Switches to a loaded adapter; None is the model without any, bit for bit as it was."""
        self.params = self.adapters.use(self.params, name)

    def unload_adapter(self, name: str | None = None) -> None:
        """Forgets a loaded adapter, or all of them."""
        self.params = self.adapters.unload(self.params, name)

    def merge_adapter(self) -> None:
        """Adds the adapter in use to the kernels for good, and forgets all; refused for quantized kernels."""
        self.params = self.adapters.merge(self.params)

    # ------------------------------------------------------------ plumbing

    def _need_processor(self, purpose: str) -> Processor:
        if self.processor is None:
            raise ValueError(f"{self.source or 'this checkpoint'} has no tokenizer.json, which is needed to {purpose}")
        return self.processor

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._need_processor("chat").tokenizer

    def _refuse_mesh(self, name: str):
        if self.mesh is not None:
            raise ValueError(f"{name} works on one device; leave it out with a mesh")
