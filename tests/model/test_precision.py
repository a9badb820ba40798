"""What says float32 computes in float32 on every platform, and narrower models ask for nothing that would cost them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import PRESETS
from janus_jax.model import attention, precision, vq
from janus_jax.model.janus import Janus
from janus_jax.model.vq import VQModel
from janus_jax.sampling.images import continue_image, decode_images, start_image
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.text import continue_text, embed_prompt, start_text
from janus_jax.weights.quantize import quantize
from janus_jax.weights.torch_weights import abstract_params

CONFIG = PRESETS["janus_tiny"]
HIGHEST = jax.lax.Precision.HIGHEST


@pytest.fixture(autouse=True)
def no_default():
    """The tests' own default, which would hide what the model leaves unsaid."""
    with jax.default_matmul_precision(None):
        yield


def products(jaxpr) -> list:
    """All products and convolutions of a jaxpr, in whatever it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(equation)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


def precisions(f, *args) -> dict[str, set]:
    """The precisions that products of each operand dtype ask for."""
    seen: dict[str, set] = {}
    for equation in products(jax.make_jaxpr(f)(*args).jaxpr):
        for x, asked in zip(equation.invars, equation.params["precision"] or (None, None), strict=True):
            seen.setdefault(str(x.aval.dtype), set()).add(asked)
    return seen


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def programs(dtype: str, cpu: bool = False, weights: str | None = None) -> dict[str, tuple]:
    """Everything that runs at inference: name -> (function, its arguments)."""
    model = Janus(CONFIG, jnp.dtype(dtype), jnp.dtype(dtype), scan_layers=False, cpu=cpu)
    params = abstract_params(CONFIG, False, dtype)
    params = jax.eval_shape(quantize, params) if weights else params
    v, g = CONFIG.vision, CONFIG.gen_vision
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    one, sampler = jnp.int32(1), make_sampler()
    drawing = (keys, jnp.float32(5), sampler)
    ids, mask = shape(2, 2, 32, dtype=jnp.int32), shape(2, 2, 32, dtype=bool)
    where, row = shape(2, 32, dtype=bool), shape(2, 32, dtype=jnp.int32)
    image = start_image.eval_shape(model, params, ids, mask, *drawing, g.num_tokens)
    x = embed_prompt.eval_shape(model, params, row, where, None)
    text = start_text.eval_shape(model, params, x, where, keys, one, sampler, 8)
    bind, ones = functools.partial, jnp.ones((2, 8), int)
    return {
        "start_image": (
            lambda params, ids, mask, *rest: start_image(model, params, ids, mask, *rest, g.num_tokens),
            (params, ids, mask, *drawing),
        ),
        "continue_image": (bind(continue_image, model), (params, image, *drawing, one, one)),
        "decode_images": (bind(decode_images, model), (params, shape(2, g.num_tokens, dtype=jnp.int32))),
        "embed_prompt": (
            bind(embed_prompt, model),
            (params, row, where, shape(2, 1, v.image_size, v.image_size, 3)),
        ),
        "start_text": (
            lambda params, *rest: start_text(model, params, *rest, 8),
            (params, x, where, keys, one, sampler),
        ),
        "continue_text": (bind(continue_text, model), (params, text, keys, one, sampler, one, one)),
        "encode_codes": (
            lambda params, images: model.apply({"params": params}, images, method="encode_codes"),
            (params, shape(2, g.image_size, g.image_size, 3)),
        ),
        "hidden": (
            lambda params, x: model.apply({"params": params}, x, ones, ones, method="hidden"),
            (params, shape(2, 8, CONFIG.language.width)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("cpu", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_every_float32_product_is_exact(cpu, weights):
    for name, (f, args) in programs("float32", cpu, weights).items():
        assert precisions(f, *args) == {"float32": {HIGHEST}}, name


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_narrow_models_ask_for_nothing_but_where_codes_are_decided(dtype):
    for name, (f, args) in programs(dtype).items():
        seen = precisions(f, *args)
        if name == "encode_codes":
            assert seen == {"float32": {HIGHEST}}, "a code is an argmin of float32 distances"
        elif name == "decode_images" and dtype == "float16":
            assert seen == {"float32": {HIGHEST}}, "activations of the VQ decoder may leave float16's range"
        else:
            assert seen == {dtype: {None}}, name


@pytest.mark.slow
@pytest.mark.parametrize(("default", "platform"), [("bfloat16", "tpu"), ("tensorfloat32", "cuda")])
def test_a_float32_model_is_the_same_whatever_the_default(default, platform):
    def lowered(f, args) -> str:
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    for name, given in programs("float32").items():
        plain = lowered(*given)
        with jax.default_matmul_precision(default):
            assert lowered(*given) == plain, name


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_published_vq_encoder_is_one_program_whatever_the_default(platform):
    """Of full size, for each kind of accelerator; every product and convolution that decides a code is exact."""
    config = PRESETS["janus_pro_7b"]
    params = {"gen_vision_model": abstract_params(config)["gen_vision_model"]}
    images = shape(1, config.gen_vision.image_size, config.gen_vision.image_size, 3)

    def encode(params, images):
        return Janus(config, jnp.bfloat16).apply({"params": params}, images, method="encode_codes")

    texts = set()
    for default in DEFAULTS:
        with jax.default_matmul_precision(default):
            assert precisions(encode, params, images) == {"float32": {HIGHEST}}
            texts.add(jax.jit(encode).trace(params, images).lower(lowering_platforms=(platform,)).as_text())
    assert len(texts) == 1


DEFAULTS = ("bfloat16", "tensorfloat32", "float32")


def as_on_an_accelerator(f, *args):
    """`f(*args)` with the operands of each product rounded as an accelerator does for the precision it asks for."""
    bits = {jax.lax.Precision.DEFAULT: 7, jax.lax.Precision.HIGH: 10}  # of the mantissa

    def run(jaxpr, consts, args):
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        for equation in jaxpr.eqns:
            given = [x.val if hasattr(x, "val") else values[x] for x in equation.invars]
            if inner := equation.params.get("jaxpr", equation.params.get("call_jaxpr")):
                found = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given)
            else:
                asked = (equation.params.get("precision") or (HIGHEST,))[0]
                if equation.primitive.name in ("dot_general", "conv_general_dilated") and asked in bits:
                    given = [jax.lax.reduce_precision(x, 8, bits[asked]) for x in given]
                found = equation.primitive.bind(*given, **equation.params)
                found = found if equation.primitive.multiple_results else [found]
            values |= dict(zip(equation.outvars, found, strict=True))
        return [values[x] for x in jaxpr.outvars]

    closed = jax.make_jaxpr(f)(*args)
    return jax.jit(lambda *args: run(closed.jaxpr, closed.consts, jax.tree.leaves(args))[0])(*args)


@pytest.mark.slow
def test_codes_are_the_same_whatever_the_default(tiny, rng, monkeypatch):
    """Of 1,000 random pictures; if products followed the default, some would be others."""
    size = tiny.config.gen_vision.image_size
    images = rng.uniform(-1, 1, (1000, size, size, 3)).astype(np.float32)
    params = {"gen_vision_model": tiny.params["gen_vision_model"]}

    def codes(default):
        def encode(params, images):
            return Janus(tiny.config).apply({"params": params}, images, method="encode_codes")

        with jax.default_matmul_precision(default):
            return np.asarray(as_on_an_accelerator(encode, params, images))

    wanted = tiny.run("encode_codes", images)
    for default in DEFAULTS:
        np.testing.assert_array_equal(codes(default), wanted, default)
    monkeypatch.setattr(precision, "precision_of", lambda dtype: None)
    monkeypatch.setattr(vq, "precision_of", lambda dtype: None)
    others = {default: (codes(default) != wanted).any(1).sum() for default in DEFAULTS}
    print(f"pictures of 1,000 with other codes if products follow the default: {others}")
    assert others["bfloat16"] > others["tensorfloat32"] > others["float32"] == 0


def test_gradients_are_exact():
    model = Janus(CONFIG)
    params = abstract_params(CONFIG)

    def loss(params, x):
        ones = jnp.ones(x.shape[:2], int)
        hidden = model.apply({"params": params}, x, ones, ones, method="hidden")
        return sum(model.apply({"params": params}, hidden, method=f"{kind}_logits").sum() for kind in ("text", "image"))

    assert precisions(jax.grad(loss), params, shape(2, 8, CONFIG.language.width)) == {"float32": {HIGHEST}}
    vq = VQModel(CONFIG.gen_vision)

    def vq_loss(params, images):
        return vq.apply({"params": params}, images, method="reconstruct")[0].sum()

    size = CONFIG.gen_vision.image_size
    assert precisions(jax.grad(vq_loss), params["gen_vision_model"], shape(1, size, size, 3)) == {"float32": {HIGHEST}}


@pytest.mark.parametrize(("dtype", "asked"), [("float32", {HIGHEST}), ("bfloat16", {None})])
def test_kernels_of_others_follow_the_dtype(dtype, asked):
    """Their float32 products inside are theirs to choose for bfloat16, and exact both ways for float32."""

    def loss(q, k, v):
        return attention.attend_segments(q, k, v, jnp.ones((1, 128), jnp.int32), "splash").astype(jnp.float32).sum()

    heads = shape(1, 2, 128, 128, dtype=dtype)
    seen = precisions(jax.grad(loss, (0, 1, 2)), shape(1, 128, 2, 128, dtype=dtype), heads, heads)
    assert seen[dtype] == asked


def test_a_model_of_bfloat16_encodes_the_codes_of_float32(tiny, rng):
    size = tiny.config.gen_vision.image_size
    images = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    narrow = tiny.model.clone(dtype=jnp.bfloat16)
    ours = dataclasses.replace(tiny, model=narrow).run("encode_codes", images)
    np.testing.assert_array_equal(ours, tiny.run("encode_codes", images))
