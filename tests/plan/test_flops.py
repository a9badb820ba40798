"""FLOPs of a step against those of every product that JAX traces for its loss and gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus, place_images
from janus_jax.weights.torch_weights import abstract_params
from tests.conftest import SIZES
from train.config import TRAINED, AdapterConfig
from train.overrides import load_config
from train.plan.flops import parameter_counts, peak_flops, step_flops

ROWS, TOKENS, IMAGES = 2, 288, 20  # so many that no product has a variant for a few tokens


def traced_flops(jaxpr) -> int:
    """2 FLOPs a multiply-add of all products and convolutions in a jaxpr, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
        assert equation.primitive.name not in ("cond", "while")
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
        total += times * sum(traced_flops(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
    return total


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("name", SIZES)
def test_step_flops_are_those_of_the_traced_gradients(name, stage):
    config = dataclasses.replace(load_config("debug"), model=SIZES[name], stage=stage)
    model, params = Janus(config.model), abstract_params(config.model, dtype="float32")
    trained = {part: params[part] for part in TRAINED[stage]}
    frozen = {part: tree for part, tree in params.items() if part not in trained}
    size = config.model.vision.image_size

    def loss(trained, frozen, ids, codes, pixels, segment_ids):
        def apply(method, *args):
            return model.apply({"params": {**frozen, **trained}}, *args, method=method)

        features = apply("embed_images", pixels).reshape(1, -1, config.model.language.width)
        x = place_images(apply("embed_text", ids), ids == 0, jnp.repeat(features, ROWS, 0))
        x = jnp.where((ids == 1)[..., None], apply("embed_codes", codes)[:, :1], x)
        hidden = apply("hidden", x, ids, segment_ids)
        # Half of the places for text, half for images.
        heads = apply("text_logits", hidden[:, ::2]), apply("image_logits", hidden[:, 1::2])
        return sum((head**2).sum() for head in heads)

    half = ROWS * TOKENS // 2
    places = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    # All but the last code of each image go in.
    codes = jax.ShapeDtypeStruct((1, half - half // config.model.gen_vision.num_tokens), jnp.int32)
    pixels = jax.ShapeDtypeStruct((IMAGES, size, size, 3), jnp.float32)
    traced = jax.make_jaxpr(jax.value_and_grad(loss))(trained, frozen, places, codes, pixels, places)
    # The traced attention computes the masked half too, as if samples were twice as long.
    counts = {"tokens": ROWS * TOKENS, "images": IMAGES, "text_targets": half, "image_targets": half}
    assert traced_flops(traced.jaxpr) == step_flops(config, **counts, sample_length=2 * TOKENS - 1)


def test_each_count_matters_and_the_context_is_the_default_length():
    config = load_config("7b_stage3")
    counts = {"tokens": 4096.0, "images": 2.0, "text_targets": 300.0, "image_targets": 1152.0}
    whole = step_flops(config, **counts)
    assert whole == step_flops(config, **counts, sample_length=4096) > step_flops(config, **counts, sample_length=800)
    for name in counts:
        assert 0 < step_flops(config, **{**dict.fromkeys(counts, 0), name: counts[name]}) < whole
        alone = (step_flops(config, **{**dict.fromkeys(counts, 0), n: counts[n]}) for n in counts)
    assert sum(alone) == pytest.approx(whole)


def test_a_full_model_costs_six_flops_a_parameter_and_token():
    config = load_config("7b_stage2")
    decoder = parameter_counts(config.model)["language_model"] - config.model.language.vocab_size * 4096
    flops = step_flops(config, tokens=4096, images=0, text_targets=4096, image_targets=0, sample_length=0)
    assert flops == pytest.approx(6 * 4096 * decoder, rel=1e-3)
    # Frozen, the decoder needs no gradients of its kernels.
    frozen = dataclasses.replace(config, stage=1)
    assert step_flops(frozen, 4096, 0, 4096, 0, sample_length=0) == pytest.approx(4 * 4096 * decoder, rel=1e-3)


def test_an_adapter_costs_its_own_products_and_the_gradients_of_activations():
    full = load_config("1b_stage3")
    tuned = dataclasses.replace(full, init_from="janus", adapter=AdapterConfig(rank=16, targets=("attention", "mlp")))
    c = full.model.language
    factors = c.layers * 16 * (8 * c.width + 3 * (c.width + c.mlp_dim))
    kernels = c.layers * (4 * c.width**2 + 3 * c.width * c.mlp_dim)
    assert step_flops(tuned, 100, 0, 0, 0, sample_length=-1) == 2 * 100 * (2 * kernels + 3 * factors)
    assert step_flops(full, 100, 0, 0, 0, sample_length=-1) == 2 * 100 * 3 * kernels
    # Nothing is trained below the decoder, which needs no gradients of images or codes.
    assert step_flops(tuned, 0, 1, 0, 0) < 0.4 * step_flops(full, 0, 1, 0, 0)


def test_parameter_counts():
    # All elements of the published checkpoints, less what our parameters leave out: SigLIP's attention pool (a query,
    # q, kv, proj, a norm and an MLP of 4 times the width) and the VQ model's `codebook_used`.
    pool, codebook_used = 12 * 1024**2 + 12 * 1024, 65536
    for name, elements in {"janus_pro_1b": 2_089_297_547, "janus_pro_7b": 7_420_434_059}.items():
        counts = parameter_counts(PRESETS[name])
        assert sum(counts.values()) == elements - pool - codebook_used
        assert set(counts) == {
            "vision_model", "aligner", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head", "language_model"
        }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("NVIDIA A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak
