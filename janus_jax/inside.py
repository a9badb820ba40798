"""What happens inside a model while it draws and answers: logits, attention, and pictures that are not yet complete.

Everything here looks at codes or an answer that exist already, whoever made them: the decoder runs over them once,
without a cache, and gives for each what it gave when it drew them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from janus_jax.config import JanusConfig
from janus_jax.model.janus import Janus, run
from janus_jax.pipeline import Conversation, JanusPipeline
from janus_jax.processing.chat import SYSTEM_PROMPT
from janus_jax.sampling.batches import put, using
from janus_jax.sampling.finite import on_host
from janus_jax.sampling.images import checked_codes
from janus_jax.sampling.text import embed_prompt

Params = dict[str, Any]


# ---------------------------------------------------------------- logits


def code_logits(janus: JanusPipeline, prompts: str | Sequence[str], codes: np.ndarray) -> np.ndarray:
    """What the model expects of each code of an image, with the prompt and without it.

    Args:
      prompts: a prompt for each image, or one for all.
      codes: [B, num_tokens], from `generate_codes`, or `encode_images` for any picture.
    Returns: float32 logits [B, 2, num_tokens, codebook_size], each code's given the codes before it; at index 0 with
      the prompt, at 1 without it. `sampling.images.guide` combines the two as in drawing.
    Raises: ValueError for codes of another shape, a blank or too long prompt, or other numbers of prompts and images.
    """
    codes = checked_codes(janus.config.gen_vision, codes)
    x, mask, length = _drawing(janus, prompts, codes)
    with using(janus.mesh):
        logits = on_host(_image_logits(janus.model, janus.params, x, put(mask, janus.mesh), length))
    return logits.reshape(len(codes), 2, *logits.shape[1:])


def entropy(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Bits of entropy of what logits [..., V] say at a temperature: 0 is certain, log2(V) a guess."""
    logs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32) / temperature, axis=-1))
    return -(np.exp(logs) * logs).sum(-1) / np.log(2, dtype=np.float32)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _image_logits(model: Janus, params: Params, x: jax.Array, mask: jax.Array, length: int) -> jax.Array:
    hidden = run(model, params, "hidden", x, _positions(mask), mask.astype(jnp.int32))
    return run(model, params, "image_logits", hidden[:, length - 1 :])


def _positions(mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def _drawing(
    janus: JanusPipeline, prompts: str | Sequence[str], codes: np.ndarray
) -> tuple[jax.Array, np.ndarray, int]:
    """Embeddings of pairs of prompts, each with its codes but the last, their mask, and the length of the prompts."""
    prompts = [prompts] * len(codes) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(codes):
        raise ValueError(f"{len(prompts)} prompts came with the codes of {len(codes)} images; give one for each")
    if janus.processor is None:
        raise ValueError(f"{janus.source or 'this checkpoint'} has no tokenizer.json, which is needed for a prompt")
    ids, mask = (x.reshape(2 * len(codes), -1) for x in janus.processor.drawing_batch(prompts, 1, guided=True))
    drawn = np.repeat(codes[:, :-1], 2, axis=0)
    with using(janus.mesh):
        x = _embed_drawing(janus.model, janus.params, put(ids, janus.mesh), put(drawn, janus.mesh))
    return x, np.pad(mask, ((0, 0), (0, drawn.shape[1])), constant_values=True), ids.shape[1]


@functools.partial(jax.jit, static_argnames=("model",))
def _embed_drawing(model: Janus, params: Params, ids: jax.Array, codes: jax.Array) -> jax.Array:
    text, drawn = run(model, params, "embed_text", ids), run(model, params, "embed_codes", codes)
    return jnp.concatenate([text, drawn.astype(text.dtype)], axis=1)


# ---------------------------------------------------------------- attention


@dataclasses.dataclass(frozen=True)
class Attention:
    """Who attends to what in the decoder.

    Attributes:
      weights: float32 [layers, heads, rows, T]; each row sums to 1. A row belongs to the token or code that is drawn
        from it, and attends to what came before.
      drawn: the text of each row's token; for an image its code.
      tokens: the text of the T tokens that are attended to, '' for those of an image.
      image: [T] bool, which of these are the image's.
    """

    weights: np.ndarray = dataclasses.field(repr=False)
    drawn: list[str]
    tokens: list[str] = dataclasses.field(repr=False)
    image: np.ndarray = dataclasses.field(repr=False)

    @property
    def maps(self) -> np.ndarray:
        """Attention to the patches of the only image of a question, [layers, heads, rows, grid, grid]."""
        patches = self.weights[..., self.image]
        grid = round(patches.shape[-1] ** 0.5)
        return patches.reshape(*patches.shape[:-1], grid, grid)


def answering_attention(
    janus: JanusPipeline, messages: Conversation, images: Any, answer: str, system_prompt: str = SYSTEM_PROMPT
) -> Attention:
    """What each token of an answer attends to, in the question and its images; arguments as for `JanusPipeline.chat`.

    The answer may be the model's own or any other. Raises: ValueError as `chat`, and for an empty answer.
    """
    if janus.processor is None:
        raise ValueError(f"{janus.source or 'this checkpoint'} has no tokenizer.json, which is needed for a question")
    tokenizer = janus.processor.tokenizer
    said = tokenizer.encode(" " + answer.strip(), add_bos=False) if answer.strip() else []
    if not said:
        raise ValueError("the answer is empty; give the text whose attention you ask for")
    ids, where, pixels, mask = janus.processor.understanding_batch([messages], [images], system_prompt, len(said))
    length = ids.shape[1]
    more = ((0, 0), (0, len(said) - 1))
    ids = np.concatenate([ids, np.array([said[:-1]], np.int32)], axis=1)
    where, mask = np.pad(where, more), np.pad(mask, more, constant_values=True)
    with using(janus.mesh):
        given = (None if x is None else put(x, janus.mesh) for x in (ids, where, pixels))
        x = embed_prompt(janus.model, janus.params, *given)
    weights = _weights(janus, x, mask, length)
    kept = mask[0]
    texts = ["" if image else _text(janus, i) for i, image in zip(ids[0][kept], where[0][kept], strict=True)]
    return Attention(weights[0][..., kept], [_text(janus, i) for i in said], texts, where[0][kept])


def drawing_attention(janus: JanusPipeline, prompt: str, codes: np.ndarray) -> Attention:
    """What each code of one image attends to: the prompt's tokens, and the codes before it.

    `codes` [num_tokens] or [1, num_tokens]; the T tokens are the prompt's and all codes but the last.
    """
    codes = checked_codes(janus.config.gen_vision, np.atleast_2d(codes))
    if len(codes) != 1:
        raise ValueError(f"attention is of one image at a time, got codes of {len(codes)}")
    x, mask, length = _drawing(janus, prompt, codes)
    weights = _weights(janus, x[:1], mask[:1], length)[0]
    prompt_ids = janus.processor.text_to_image_prompt(prompt)
    texts = [_text(janus, i) for i in prompt_ids] + [""] * (codes.shape[1] - 1)
    image = np.arange(len(texts)) >= len(prompt_ids)
    return Attention(weights[..., mask[0]], [str(code) for code in codes[0]], texts, image)


def _text(janus: JanusPipeline, token: int) -> str:
    return janus.processor.tokenizer.decode([token], skip_special_tokens=False)


def _weights(janus: JanusPipeline, x: jax.Array, mask: np.ndarray, length: int) -> np.ndarray:
    """Weights [B, layers, heads, rows, T], where the first row is the last token of a prompt of `length`."""
    with using(janus.mesh):
        weights = on_host(_all_weights(janus.model, janus.params, x, put(mask, janus.mesh), length))
    return weights.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _all_weights(model: Janus, params: Params, x: jax.Array, mask: jax.Array, length: int) -> jax.Array:
    """[layers, B, heads, rows, T]"""
    given = (x, _positions(mask), mask.astype(jnp.int32))
    _, seen = model.apply({"params": params}, *given, method="hidden", mutable=["intermediates"])
    seen = seen["intermediates"]["language_model"]
    if model.scan_layers:
        (weights,) = seen["layers"]["self_attn"]["weights"]
    else:
        layers = range(model.config.language.layers)
        weights = jnp.stack([seen[f"layers_{i}"]["self_attn"]["weights"][0] for i in layers])
    layers, batch, _, _, rows, keys = weights.shape
    return weights.reshape(layers, batch, -1, rows, keys)[..., length - 1 :, :]


# ---------------------------------------------------------------- pictures on the way


def growing(
    janus: JanusPipeline,
    codes: np.ndarray,
    counts: Sequence[int],
    background: tuple[int, int, int] = (127, 127, 127),
) -> np.ndarray:
    """An image as it grows code by code.

    Args:
      codes: [num_tokens] or [1, num_tokens] of one image.
      counts: how many of them to show, for each picture, from 0.
      background: color in 0 to 255 of what is not drawn yet: those codes are the ones of a picture of this color.
    Returns: uint8 [len(counts), h, w, 3]. Raises: ValueError for codes of another shape, or a count out of range.
    """
    config: JanusConfig = janus.config
    codes = checked_codes(config.gen_vision, np.atleast_2d(codes))
    most, counts = codes.shape[1], np.asarray(counts)
    if len(codes) != 1 or not counts.size or counts.min() < 0 or counts.max() > most:
        raise ValueError(f"growing takes the codes of one image and counts from 0 to {most}")
    size = config.gen_vision.image_size
    empty = janus.encode_images([Image.new("RGB", (size, size), background)])
    return janus.decode_codes(np.where(np.arange(most) < counts[:, None], codes, empty))
