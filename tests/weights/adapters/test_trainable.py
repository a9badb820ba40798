"""Gradients of an adapter against PEFT's on transformers' port, through the whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model.janus import place_images
from janus_jax.sharding import flatten, unflatten
from janus_jax.weights.adapters.peft_files import read_adapter
from janus_jax.weights.adapters.trainable import trainable, trained_adapter
from tests.library.tiny_janus import raises_one_line
from tests.weights.adapters.random_adapters import random_adapter
from tests.weights.adapters.torch_adapters import inputs, peft_model, saved


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, trained, fixed, given, weights):
    def loss(trained):
        def work(model):
            where = given["ids"] == model.config.language.vocab_size - 1
            x = place_images(model.embed_text(given["ids"]), where, model.embed_images(given["pixels"]))
            x = jnp.concatenate([x, model.embed_codes(given["codes"])], axis=1)
            positions = jnp.arange(x.shape[1])[None]
            hidden = model.hidden(x, positions, jnp.ones_like(positions))
            return (model.text_logits(hidden) * weights[0]).sum() + (model.image_logits(hidden) * weights[1]).sum()

        return model.apply({"params": unflatten(flatten(fixed) | flatten(trained))}, method=work)

    return jax.grad(loss)(trained)


@pytest.mark.parametrize(
    ("size", "kind"), [pytest.param("tiny", "dora", marks=pytest.mark.slow), ("grouped", "patterns")]
)
def test_gradients(size, kind, get_case, oracle, tmp_path, close):
    torch, case = pytest.importorskip("torch"), get_case(size)
    wrapped, given, c = peft_model(case.torch_model, kind), inputs(case.config), case.config
    adapter = read_adapter(saved(wrapped, tmp_path / "adapter"), c)
    trained, beside = trainable(case.params, adapter)
    rng, length = np.random.default_rng(5), given["ids"].shape[1] + given["codes"].shape[1]
    weights = [rng.standard_normal((1, length, n)) for n in (c.language.vocab_size, c.gen_vision.codebook_size)]
    weights = [w.astype(np.float32) for w in weights]
    fixed = unflatten(flatten(case.params) | flatten(beside))
    ours = trained_adapter(adapter, gradients(case.model, trained, fixed, given, weights))

    model = wrapped.base_model.model
    x = model.get_input_embeddings()(torch.tensor(given["ids"]))
    where = torch.tensor(given["ids"] == c.language.vocab_size - 1)
    x = torch.index_put(x, (where,), oracle._image_embeddings(model, given["pixels"]).flatten(0, 1))
    drawn = model.model.generation_aligner(model.model.generation_embeddings(torch.tensor(given["codes"])))
    hidden = model.model.language_model(inputs_embeds=torch.cat([x, drawn], 1), use_cache=False).last_hidden_state
    loss = (model.lm_head(hidden) * torch.tensor(weights[0])).sum()
    loss = loss + (model.model.generation_head(hidden) * torch.tensor(weights[1])).sum()
    loss.backward()

    # As files, in which PEFT's gradients take the places of its parameters.
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.grad)
    theirs = read_adapter(saved(wrapped, tmp_path / "gradients"), c)
    assert ours.deltas.keys() == theirs.deltas.keys()
    for place, wanted in theirs.deltas.items():
        for part in ("a", "b", "magnitude"):
            if getattr(wanted, part) is not None:
                close(getattr(ours.deltas[place], part), getattr(wanted, part), f"{place} {part}")


def test_dora_of_some_layers_is_refused(tiny):
    adapter = random_adapter(tiny.config, targets=(r"layers\.0\.mlp\.up_proj",), dora=True)
    with raises_one_line("a DoRA of .*up_proj must change all 3 layers, got 1"):
        trainable(tiny.params, adapter)
