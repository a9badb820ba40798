"""The oracle: transformers' port of Janus in float32 with random weights, on numpy arrays.

Images are NHWC here, as in janus_jax. Where the port is known to differ from the original, the original's way is
written out: VQ encode normalizes before it looks for the nearest code, and text to image takes rows in adjacent
(conditional, unconditional) pairs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import initialization

from janus_jax.config import JanusConfig, transformers_config
from janus_jax.weights.torch_names import slots
from janus_jax.weights.torch_weights import leaves_of, place

torch.set_num_threads(2)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TorchJanus = transformers.JanusForConditionalGeneration


def build(config: JanusConfig, seed: int = 0) -> TorchJanus:
    """A port of the sizes of `config`; the image placeholder is the vocabulary's last id.

    Every parameter is random, norms and biases too, so that one which is forgotten or swapped shows; kernels keep the
    variance of what goes through them.
    """
    raw = transformers_config(config, image_token_id=config.language.vocab_size - 1)
    raw |= {"dtype": "float32", "torch_dtype": "float32"}
    with initialization.no_init_weights():
        model = TorchJanus(transformers.JanusConfig.from_dict(raw)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = 0.0, 1.0
            if name.endswith(".bias"):
                std = 0.2
            elif parameter.dim() == 1:
                mean, std = 1.0, 0.3
            elif "embed" not in name or "patch_embedding" in name:
                std = parameter[0].numel() ** -0.5
            parameter.normal_(mean, std, generator=generator)
        # Heads a little sharper, so that greedy choices are clear, and codebook rows of unequal norms.
        model.lm_head.weight.mul_(2)
        model.model.generation_head.vision_head.weight.mul_(2)
        codebook = model.model.vqmodel.quantize.embedding.weight
        codebook.mul_(torch.empty(len(codebook), 1).uniform_(0.3, 3, generator=generator))
    return model


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.asarray(images, np.float32)).permute(0, 3, 1, 2)


def _ids(ids: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.asarray(ids, np.int64))


@torch.inference_mode()
def image_features(model: TorchJanus, pixels: np.ndarray) -> np.ndarray:
    return model.model.vision_model(_channels_first(pixels)).last_hidden_state.numpy()


@torch.inference_mode()
def embed_images(model: TorchJanus, pixels: np.ndarray) -> np.ndarray:
    return model.model.get_image_features(_channels_first(pixels)).pooler_output.numpy()


@torch.inference_mode()
def vq_features(model: TorchJanus, images: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Encoder and quant_conv: [B, grid, grid, codebook_dim]."""
    vq = model.model.vqmodel
    vq = vq if dtype == torch.float32 else copy.deepcopy(vq).to(dtype)
    return vq.quant_conv(vq.encoder(_channels_first(images).to(dtype))).permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def encode_codes(model: TorchJanus, images: np.ndarray) -> np.ndarray:
    """Codes [B, grid * grid] of the nearest normalized codebook rows."""
    z = torch.nn.functional.normalize(torch.tensor(vq_features(model, images)), dim=-1)
    codebook = torch.nn.functional.normalize(model.model.vqmodel.quantize.embedding.weight, dim=-1)
    distances = (z**2).sum(-1, keepdim=True) + (codebook**2).sum(-1) - 2 * z @ codebook.T
    return distances.argmin(-1).flatten(1).numpy()


@torch.inference_mode()
def decode_codes(model: TorchJanus, codes: np.ndarray) -> np.ndarray:
    return model.model.vqmodel.decode(_ids(codes)).permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def embed_codes(model: TorchJanus, codes: np.ndarray) -> np.ndarray:
    return model.prepare_embeddings_for_image_generation(_ids(codes)).numpy()


@torch.inference_mode()
def embed_text(model: TorchJanus, ids: np.ndarray) -> np.ndarray:
    return model.get_input_embeddings()(_ids(ids)).numpy()


@torch.inference_mode()
def hidden(model: TorchJanus, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hidden states of embeddings x [B, T, D]; positions count from the first token that is not padding."""
    mask = _ids(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    run = model.model.language_model
    return run(inputs_embeds=torch.tensor(x), attention_mask=mask, position_ids=positions).last_hidden_state.numpy()


@torch.inference_mode()
def attention_weights(model: TorchJanus, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention weights [layers, B, heads, T, T] of embeddings x [B, T, D], see `hidden`."""
    mask = _ids(mask)
    run = copy.deepcopy(model.model.language_model)
    run.set_attn_implementation("eager")  # the one that returns them
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "output_attentions": True}
    return torch.stack(run(inputs_embeds=torch.tensor(x), **given).attentions).numpy()


@torch.inference_mode()
def text_logits(model: TorchJanus, ids: np.ndarray, mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of prompts; pixels [N, h, w, 3] are all rows' images in order."""
    return model(input_ids=_ids(ids), attention_mask=_ids(mask), pixel_values=_channels_first(pixels)).logits.numpy()


@torch.inference_mode()
def image_logits(model: TorchJanus, x: np.ndarray) -> np.ndarray:
    return model.model.generation_head(torch.tensor(x)).numpy()


def generate_text(
    model: TorchJanus, ids: np.ndarray, mask: np.ndarray, pixels: np.ndarray | None, max_new_tokens: int, eos_id: int
) -> np.ndarray:
    """The port's own greedy generation: new tokens [B, n], rows that are done filled with eos_id (-1: none)."""
    images = {} if pixels is None else {"pixel_values": _channels_first(pixels)}
    stop = {"eos_token_id": None if eos_id < 0 else eos_id, "pad_token_id": max(eos_id, 0)}
    out = model.generate(
        inputs=_ids(ids), attention_mask=_ids(mask), max_new_tokens=max_new_tokens, do_sample=False, **stop, **images
    )
    return out[:, ids.shape[1] :].numpy()


@torch.inference_mode()
def generate_codes(
    model: TorchJanus, ids: np.ndarray, mask: np.ndarray, guidance: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy text to image, written out as in the original's generation_inference.py.

    Args:
      ids, mask: [B, 2, T], conditional and unconditional rows side by side.
    Returns: codes [B, steps] and guided logits [B, steps, codebook_size].
    """
    x = model.get_input_embeddings()(_ids(ids).flatten(0, 1))
    mask, cache = _ids(mask).flatten(0, 1), None
    codes, kept = [], []
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        out = model.model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        logits = model.model.generation_head(out.last_hidden_state[:, -1])
        conditional, unconditional = logits[0::2], logits[1::2]
        guided = unconditional + guidance * (conditional - unconditional)
        code = guided.argmax(-1)
        codes.append(code)
        kept.append(guided)
        x = model.prepare_embeddings_for_image_generation(code.repeat_interleave(2)[:, None])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(codes, 1).numpy(), torch.stack(kept, 1).numpy()


# ---------------------------------------------------------------- training


def sequence_losses(
    model: TorchJanus, ids: np.ndarray, codes: np.ndarray, pixels: np.ndarray, is_image: np.ndarray
) -> torch.Tensor:
    """-log p [n - 1] of every element but the first of one sample, text ids and then image codes, with gradients.

    Args:
      ids, is_image: [T], the text and its image placeholders; codes [C]; pixels [N, h, w, 3].
    """
    x = model.get_input_embeddings()(_ids(ids))
    if len(pixels):
        x = torch.index_put(x, (torch.tensor(is_image),), _image_embeddings(model, pixels).flatten(0, 1))
    if len(codes):
        drawn = model.model.generation_aligner(model.model.generation_embeddings(_ids(codes)))
        x = torch.cat([x, drawn])
    hidden = model.model.language_model(inputs_embeds=x[None, :-1], use_cache=False).last_hidden_state[0]
    text = -model.lm_head(hidden[: len(ids) - 1]).log_softmax(-1)
    losses = text.gather(-1, _ids(ids[1:])[:, None])[:, 0]
    if len(codes):
        image = -model.model.generation_head(hidden[len(ids) - 1 :]).log_softmax(-1)
        losses = torch.cat([losses, image.gather(-1, _ids(codes)[:, None])[:, 0]])
    return losses


def _image_embeddings(model: TorchJanus, pixels: np.ndarray) -> torch.Tensor:
    return model.model.aligner(model.model.vision_model(_channels_first(pixels)).last_hidden_state)


@dataclasses.dataclass(frozen=True)
class _Held:
    """An array that `leaves_of` reads as it reads a tensor of a file."""

    array: np.ndarray

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def view(self, verify: bool = True) -> np.ndarray:
        return self.array


def gradients(model: TorchJanus, config: JanusConfig, loss: torch.Tensor, parts: Sequence[str]) -> dict[str, Any]:
    """Gradients of `loss` with regard to the parameters of `parts`, in our tree; zeros where it depends on none."""
    wanted = [slot for slot in slots(config, "transformers") if slot.path[0] in parts]
    named = dict(model.named_parameters())
    names = sorted({slot.name for slot in wanted})
    found = torch.autograd.grad(loss, [named[name] for name in names], retain_graph=True, allow_unused=True)
    tensors = {
        name: _Held(np.zeros(named[name].shape, np.float32) if grad is None else grad.numpy())
        for name, grad in zip(names, found, strict=True)
    }
    return place(leaves_of(wanted, tensors), as_numpy=True)
