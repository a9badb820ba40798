"""The convenience object for notebooks and command lines: prompts and images in, images and text out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tqdm import tqdm

from janus_jax.config import JanusConfig
from janus_jax.model.janus import Janus
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor, normalize_messages
from janus_jax.sampling.cache import bucket
from janus_jax.sampling.finite import NotFinite, on_host, refuse_codes, refuse_pixels
from janus_jax.sampling.footprint import bytes_of_pixels, bytes_to_answer, bytes_to_draw
from janus_jax.sampling.images import compile_codes, compile_decoding, decode_images, encode_codes, generate_codes
from janus_jax.sampling.memory import OutOfMemory, fitting, fitting_parts, in_parts
from janus_jax.sampling.sampler import Sampler, check_guidance, make_sampler
from janus_jax.sampling.text import compile_tokens, embed_prompt, stream_tokens
from janus_jax.sharding import activation_spec, batch_shards

Conversation = str | Sequence[dict[str, Any]]


@dataclasses.dataclass(eq=False)
class JanusPipeline:
    """A loaded Janus: what `janus_jax.load` returns.

    Attributes:
      config, params, model: the frozen sizes, the plain nested dict of arrays, and the flax.linen module.
      processor: templates, tokenizer and image transforms; None when the checkpoint came without a tokenizer.
      mesh: the mesh that the parameters lie on, or None for one device.
      source: where the checkpoint was read from, for messages.
    """

    config: JanusConfig
    params: dict[str, Any] = dataclasses.field(repr=False)  # gigabytes, which a notebook would fetch and print
    model: Janus
    processor: Processor | None = None
    mesh: Mesh | None = None
    source: str = ""

    # ------------------------------------------------------------ text to image

    def generate_images(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        cfg_weight: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        top_p: float = 1.0,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[Image.Image]:
        """Draws `n` images of each prompt.

        An image depends on its prompt, its seed and its index among the n alone, not on what else is drawn.

        Args:
          prompts: one prompt or several.
          n: images a prompt.
          cfg_weight: classifier-free guidance, from 0; 1 is the conditional model alone, at half the work.
          temperature: 0 takes the likeliest code, 1 is the reference.
          top_k, top_p: draw among the likeliest codes only; None and 1 keep all, as the reference does.
          seed: one seed for the call, or one for each image (len(prompts) * n of them), each then as with n = 1.
          batch_size: images drawn at a time; default as many as fit the device's memory.
          progress: show a bar; default in a terminal or a notebook.
        Returns: PIL images, n a prompt, in order.
        Raises: ValueError for a blank or too long prompt, or a setting out of range; its kind `finite.NotFinite` where
          the model's numbers are not finite, which ends the whole call.
        """
        codes = self.generate_codes(
            prompts, n, cfg_weight, temperature, top_k, seed, top_p=top_p, batch_size=batch_size, progress=progress
        )
        return [Image.fromarray(image) for image in self.decode_codes(codes)]

    def generate_codes(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        cfg_weight: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        top_p: float = 1.0,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Image codes [len(prompts) * n, num_tokens] int32; arguments as for `generate_images`."""
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        sampler = make_sampler(temperature, top_k, top_p)
        ids, mask, keys = self._drawing(prompts, n, cfg_weight, seed)
        return self.sample_codes(
            ids, mask, keys, guidance=cfg_weight, sampler=sampler, batch_size=batch_size, progress=progress
        )

    def compile_images(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        cfg_weight: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float = 1.0,
        batch_size: int | None = None,
    ):
        """Compiles what `generate_images` runs for the same arguments; `params` may be shapes, see `load`'s `ahead`.

        Raises: ValueError as `generate_images` does, and for a pipeline on a mesh: shapes do not say where they lie.
        """
        self._refuse_mesh("compile_images")
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        sampler = make_sampler(temperature, top_k, top_p)
        ids, mask, keys = self._drawing(prompts, n, cfg_weight, 0)
        total = len(keys)
        (part, *_), size = fitting_parts(total, batch_size or self._fitting(total, self._bytes_to_draw(ids)))
        if len(ids) > 1:
            ids, mask = (_pad_rows(x, part, size) for x in (ids, mask))
        given = (self._put(x) for x in (ids, mask, _pad_rows(keys, part, size)))
        try:
            compile_codes(self.model, self.params, *given, guidance=cfg_weight, sampler=sampler)
            _, size = fitting_parts(total, self._pictures_at_a_time(total, self.model.dtype))
            compile_decoding(self.model, self.params, size)
        except jax.errors.JaxRuntimeError as error:
            if not OutOfMemory.says(error):  # which drawing answers with smaller parts
                raise

    def _drawing(
        self, prompts: str | Sequence[str], n: int, cfg_weight: float, seed: int | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, jax.Array]:
        """Ids, mask and keys of `images.generate_codes`."""
        processor = self._need_processor("draw from a prompt")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("nothing to draw: the list of prompts is empty")
        _check_count("n", n)
        check_guidance(cfg_weight)
        keys = image_keys(seed, len(prompts), n)

        rows = [processor.text_to_image_prompt(prompt) for prompt in prompts]
        length = bucket(max(len(row) for row in rows))
        guided = cfg_weight != 1
        times = n if len(rows) > 1 else 1  # one prompt is prefilled once, for all its images
        pairs = [[row, processor.unconditional(row)] if guided else [row] for row in rows for _ in range(times)]
        ids, mask = processor.left_pad([row for pair in pairs for row in pair], length)
        ids, mask = (x.reshape(len(pairs), -1, length) for x in (ids, mask.astype(bool)))
        return ids, mask, keys

    def sample_codes(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        keys: jax.Array,
        *,
        guidance: float,
        sampler: Sampler,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:
        """`images.generate_codes` in parts that fit the memory; arguments as there, on the host."""
        prompts, steps = len(ids), self.config.gen_vision.num_tokens

        def draw(part: slice, size: int, bar: tqdm) -> np.ndarray:
            padded = (ids, mask) if prompts == 1 else [_pad_rows(x, part, size) for x in (ids, mask)]
            with self._mesh(), _rows_of(part):
                codes, _ = generate_codes(
                    self.model,
                    self.params,
                    *(self._put(x) for x in padded),
                    self._put(_pad_rows(keys, part, size)),
                    guidance=guidance,
                    sampler=sampler,
                    progress=None if bar.disable else bar.update,
                )
                return on_host(codes)[: part.stop - part.start]

        size = batch_size or self._fitting(len(keys), self._bytes_to_draw(ids))
        return in_parts(draw, len(keys), size, batch_shards(self.mesh), "drawing", steps, progress)

    def decode_codes(self, codes: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """uint8 images [B, h, w, 3] of codes [B, num_tokens], decoded in parts that fit the memory.

        Raises: ValueError for an array of another shape, or numbers that are no codes.
        """
        vq = self.config.gen_vision
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != vq.num_tokens or not len(codes):
            raise ValueError(f"codes of shape {list(codes.shape)} are no images: expected [B, {vq.num_tokens}]")
        # XLA clamps an index that is out of range, and another picture would come out.
        if not np.issubdtype(codes.dtype, np.integer) or codes.min() < 0 or codes.max() >= vq.codebook_size:
            raise ValueError(f"codes must be whole numbers from 0 to {vq.codebook_size - 1}")
        if batch_size is not None:
            _check_count("batch_size", batch_size)

        def decode(part: slice, size: int, bar: tqdm) -> np.ndarray:
            with self._mesh(), _rows_of(part):
                images, finite = decode_images(self.model, self.params, self._put(_pad_rows(codes, part, size)))
                refuse_pixels(self.model, self.params, finite)
                bar.update()
                return on_host(images)[: part.stop - part.start]

        size = batch_size or self._pictures_at_a_time(len(codes), self.model.dtype)
        return in_parts(decode, len(codes), size, batch_shards(self.mesh), "decoding", 1, False)

    def encode_images(self, images: Sequence[Any], batch_size: int | None = None) -> np.ndarray:
        """Codes [B, num_tokens] int32 of images (anything that `images.open_image` takes), cropped to a square.

        Encoded in float32, whatever the model's dtype, in parts that fit the memory.
        """
        from janus_jax.processing.images import generation_pixels

        vq, images = self.config.gen_vision, list(images)
        if not images:
            raise ValueError("there are no images to encode: the list is empty")
        if batch_size is not None:
            _check_count("batch_size", batch_size)

        def encode(part: slice, size: int, bar: tqdm) -> np.ndarray:
            pixels = np.stack([generation_pixels(image, vq.image_size) for image in images[part]])
            with self._mesh(), _rows_of(part):
                given = self._put(_pad_rows(pixels, slice(0, len(pixels)), size))
                codes = on_host(encode_codes(self.model, self.params, given))
                refuse_codes(self.model, self.params, codes)
                bar.update()
                return codes[: len(pixels)]

        size = batch_size or self._pictures_at_a_time(len(images), jnp.float32)
        return in_parts(encode, len(images), size, batch_shards(self.mesh), "encoding", 1, False)

    # ------------------------------------------------------------ understanding

    def chat(
        self,
        messages: Conversation,
        images: Any = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        *,
        top_k: int | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        seed: int = 0,
    ) -> str:
        """The model's answer to a question, or to a conversation of several turns.

        Args:
          messages: a question, or dicts {"role": "user" | "assistant", "content", optional "images"}.
          images: paths, PIL images or arrays, in the order of the `<image_placeholder>`s; without placeholders they
            come before the first message.
          max_new_tokens: at most so many tokens.
          temperature: 0 is greedy, the reference's default.
          top_p, top_k: draw among the likeliest tokens only.
          system_prompt: comes first; empty for none.
          seed: of the draw.
        Raises: ValueError for an empty or too long conversation, placeholders and images that differ in number, or a
          setting out of range, or numbers that are not finite (`finite.NotFinite`); OSError for an image that cannot
          be read.
        """
        return self.chat_batch(
            [messages],
            [images],
            max_new_tokens,
            temperature,
            top_p,
            top_k=top_k,
            system_prompt=system_prompt,
            seed=seed,
        )[0]

    def stream_chat(self, messages: Conversation, images: Any = (), *args, **kwargs) -> Iterator[str]:
        """`chat`, in pieces as they come; joined, they are what `chat` returns before stripping.

        Bad input is refused here, before the first piece is asked for; numbers that are not finite end it in front of
        the piece that they would have made.
        """
        pieces = self._answer([messages], [images], *args, piece=4, **kwargs)
        return self._text_pieces(pieces)

    def _text_pieces(self, pieces: Iterator[np.ndarray]) -> Iterator[str]:
        tokenizer = self.processor.tokenizer
        stream = tokenizer.stream()
        for piece in pieces:
            for token in piece[0]:
                if token == tokenizer.eos_id:
                    break
                if text := stream.push(int(token)):
                    yield text
        if text := stream.finish():
            yield text

    def chat_batch(
        self, conversations: Sequence[Conversation], images: Sequence[Any] | None = None, *args, **kwargs
    ) -> list[str]:
        """Answers to several conversations of any lengths at once; `images` holds the images of each.

        Other arguments as for `chat`. An answer depends on its conversation and the seed alone, not on how many fit the
        memory at a time.
        """
        if isinstance(conversations, str):
            raise ValueError("chat_batch takes a list of conversations; ask a single question with chat")
        images = [()] * len(conversations) if images is None else images
        if not conversations or len(conversations) != len(images):
            raise ValueError(f"{len(conversations)} conversations came with {len(images)} lists of images")
        asked, max_new_tokens, sampler = self._asking(conversations, images, *args, **kwargs)
        tokenizer, total = self.processor.tokenizer, len(conversations)

        def answer(part: slice, size: int, bar: tqdm) -> np.ndarray:
            given = [None if x is None else _pad_rows(x, part, size) for x in asked]
            with _rows_of(part):
                tokens = np.concatenate(list(self._stream(given, max_new_tokens, sampler, piece=64)), axis=1)
            bar.update()
            rest = ((0, 0), (0, max_new_tokens - tokens.shape[1]))
            return np.pad(tokens[: part.stop - part.start], rest, constant_values=tokenizer.eos_id)

        shards = batch_shards(self.mesh)
        size = self._fitting(total, self._bytes_to_answer(asked, max_new_tokens))
        # Fewer rows than shards are not split over them.
        multiple = shards if total >= shards else 1
        tokens = in_parts(answer, total, size, multiple, "answering", 1, False, unit="conversation")
        answers = []
        for row in tokens.tolist():
            end = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
            answers.append(tokenizer.decode(row[:end]).strip())
        return answers

    def compile_chat(self, messages: Conversation, images: Any = (), *args, **kwargs):
        """Compiles what `chat` and `stream_chat` run for the same arguments; otherwise as `compile_images`."""
        self._refuse_mesh("compile_chat")
        asked, max_new_tokens, sampler = self._asking([messages], [images], *args, **kwargs)
        room = bucket(max_new_tokens)
        compile_tokens(self.model, self.params, *map(self._put, asked), sampler=sampler, room=room)

    def _asking(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Any],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        *,
        top_k: int | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        seed: int = 0,
    ) -> tuple[tuple[Any, ...], int, Sampler]:
        """Ids, image placeholders, pixels, mask and keys of `sampling`'s functions; max_new_tokens; and the sampler."""
        processor = self._need_processor("chat")
        _check_count("max_new_tokens", max_new_tokens)
        sampler = make_sampler(temperature, top_k, top_p)
        rows, pixels = [], []
        for messages, own in zip(conversations, images, strict=True):
            turns, sources = normalize_messages(messages, own, processor.tokenizer.image_placeholder)
            rows.append(processor.understanding_prompt(turns, len(sources), system_prompt, max_new_tokens))
            pixels.append(processor.understanding_pixels(sources))
        ids, mask = processor.left_pad(rows, bucket(max(len(row) for row in rows)))
        mask = mask.astype(bool)
        where = (ids == processor.tokenizer.image_placeholder_id) & mask
        keys = jnp.broadcast_to(jax.random.key(_checked(seed)), (len(rows),))
        return (ids, where, _stack_images(pixels), mask, keys), max_new_tokens, sampler

    def _answer(self, *args, piece: int, **kwargs) -> Iterator[np.ndarray]:
        # Checked here and not at the first piece: a generator would raise late, out of the caller's sight.
        return self._stream(*self._asking(*args, **kwargs), piece)

    def _stream(self, asked, max_new_tokens, sampler, piece) -> Iterator[np.ndarray]:
        with self._mesh():
            ids, where, pixels, mask, keys = map(self._put, asked)
            x = embed_prompt(self.model, self.params, ids, where, pixels)
        pieces = stream_tokens(
            self.model,
            self.params,
            x,
            mask,
            keys,
            eos_id=self.processor.tokenizer.eos_id,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            piece=piece,
            room=bucket(max_new_tokens),
        )
        while True:
            # The mesh is set only while we compute, never across a yield: it would leak into the caller's code.
            with self._mesh():
                tokens = next(pieces, None)
            if tokens is None:
                return
            yield on_host(tokens)

    # ------------------------------------------------------------ plumbing

    def _need_processor(self, purpose: str) -> Processor:
        if self.processor is None:
            raise ValueError(f"{self.source or 'this checkpoint'} has no tokenizer.json, which it takes to {purpose}")
        return self.processor

    def _mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _refuse_mesh(self, name: str):
        if self.mesh is not None:
            raise ValueError(f"{name} works on one device; leave it out with a mesh")

    def _put(self, x: Any) -> jax.Array | None:
        """`x` on the device, or split over the mesh by its first axis; None stays None."""
        if x is None or self.mesh is None:
            return None if x is None else jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self._put(jax.random.key_data(x)))
        x = np.asarray(x)
        spec = activation_spec(x.shape, ("batch",) + (None,) * (x.ndim - 1), self.mesh.shape)
        # Each process puts what its own devices hold.
        return jax.make_array_from_callback(x.shape, NamedSharding(self.mesh, PartitionSpec(*spec)), x.__getitem__)

    def _bytes_to_draw(self, ids: np.ndarray) -> int:
        return bytes_to_draw(self.model, *ids.shape[1:])

    def _bytes_to_answer(self, asked: tuple[Any, ...], max_new_tokens: int) -> int:
        ids, _, pixels, *_ = asked
        images = 0 if pixels is None else pixels.shape[1]
        return bytes_to_answer(self.model, ids.shape[1], images, bucket(max_new_tokens))

    def _pictures_at_a_time(self, total: int, dtype: Any) -> int:
        # More at a time is no faster, and every other size is one more program to compile.
        per_image = bytes_of_pixels(self.config.gen_vision, dtype)
        return min(16 * batch_shards(self.mesh), self._fitting(total, per_image))

    def _fitting(self, total: int, per_item: int) -> int:
        return fitting(total, per_item, self.mesh, coming=self.params)


def image_keys(seed: int | Sequence[int], prompts: int, n: int) -> jax.Array:
    """Random keys [prompts * n]: of an image by its seed and its index among the n of its prompt."""
    if not isinstance(seed, Iterable):
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(_checked(seed))))(jnp.arange(n))
        return jnp.tile(keys, prompts)
    seeds = [_checked(s) for s in seed]
    if len(seeds) != prompts * n:
        raise ValueError(f"{len(seeds)} seeds for {prompts * n} images; give one seed, or one for each image")
    return jnp.stack([jax.random.fold_in(jax.random.key(s), 0) for s in seeds])


def _checked(seed: Any) -> int:
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed!r} is out of range: a whole number from 0 to {2**32 - 1}")
    return int(seed)


def _check_count(name: str, value: Any):
    # Also NaN, which is not below 1 either.
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} {value!r} is out of range: a whole number from 1")


@contextlib.contextmanager
def _rows_of(part: slice) -> Iterator[None]:
    """Says of rows that are not finite which they are of the whole call."""
    try:
        yield
    except NotFinite as error:
        raise error.of_part(part) from None


def _pad_rows(x: Any, part: slice, size: int) -> Any:
    """Rows `part` of x, repeating the last one up to `size` rows."""
    index = np.minimum(np.arange(part.start, part.start + size), part.stop - 1)
    return x[index]


def _stack_images(pixels: Sequence[np.ndarray]) -> np.ndarray | None:
    """Images of each row, [M_i, h, w, 3], as one [B, M, h, w, 3] with blank ones behind; None when there are none."""
    most = max(len(own) for own in pixels)
    if most == 0:
        return None
    stacked = np.zeros((len(pixels), most, *pixels[0].shape[1:]), np.float32)
    for row, own in zip(stacked, pixels, strict=True):
        row[: len(own)] = own
    return stacked
