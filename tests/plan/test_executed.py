"""FLOPs of compiled programs, counted from their HLO text."""

import math

import jax
import jax.numpy as jnp
import pytest

from train.plan.executed import executed_flops

X = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)


def text_of(function, *shapes) -> str:
    return jax.jit(function).lower(*shapes).compile().as_text()


def test_products_and_loops():
    w = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert executed_flops(text_of(lambda x, w: x @ w, X, w)) == 2 * 3 * 8 * 16 * 32
    assert executed_flops(text_of(lambda x: x @ x.swapaxes(1, 2), X)) == 2 * 3 * 8 * 8 * 16

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w @ w.T), None), x, None, length=5)[0]

    assert executed_flops(text_of(loop, X, w)) == 5 * 2 * 2 * 3 * 8 * 16 * 32


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable"])
def test_what_is_recomputed_counts(policy):
    """Of each layer: the product, and the gradients of both of its operands; and the product again."""
    w = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32)
    once = 2 * 3 * 8 * 16 * 16

    def loss(w, x):
        layer = jax.checkpoint(
            lambda x, w: jnp.sin(jnp.sin(x @ w) @ w), policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False
        )
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum()

    again = {"nothing_saveable": 2, "everything_saveable": 0}[policy]
    found = executed_flops(text_of(jax.grad(loss, argnums=(0, 1)), w, X))
    assert found / (4 * once) == pytest.approx(6 + again)


# As TPU's compiler writes them: a product of which rows and heads are spatial axes; one without a shared axis; patches
# of 16 x 16 pixels; a kernel that is not known.
_FORMS = """
HloModule step

ENTRY %main (q: f32[4,4,16,16], k: f32[4,4,16,16]) -> f32[4,4,16,16] {{
  %q = f32[{left}]{{3,2,1,0}} parameter(0)
  %k = f32[{right}]{{3,2,1,0}} parameter(1)
  ROOT %it = f32[{result}]{{3,2,1,0}} {what}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "result", "what", "flops"),
    [
        (
            "4,4,16,8", "4,4,32,8", "4,4,16,32",
            "convolution(%q, %k), window={size=4x4 stride=3x3 lhs_dilate=4x4}, dim_labels=01bf_01oi->01bf",
            2 * 16 * 16 * 32 * 8,
        ),
        (
            "4,16,64,1", "4,16,64,1", "4,16,4,16",
            "convolution(%q, %k), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 4 * 16 * 64 * 64,
        ),
        (
            "2,32,32,3", "16,16,3,8", "2,2,2,8",
            "convolution(%q, %k), window={size=16x16 stride=16x16}, dim_labels=b01f_01io->b01f",
            2 * 2 * 4 * 8 * 16 * 16 * 3,
        ),
        ("2,3,256,128", "2,3,256,128", "2,3,256,128",
         'custom-call(%q, %k), custom_call_target="tpu_custom_call"', 0),
    ],
)  # fmt: skip
def test_forms_of_a_tpu(left, right, result, what, flops):
    text = _FORMS.format(left=left, right=right, result=result, what=what)
    assert executed_flops(text) == pytest.approx(flops)


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4), ("dkv with dq", 5)])
def test_splash_attention(kernel, products):
    kernel, *with_dq = kernel.split(" ", 1)
    text = _FORMS.format(
        left="2,3,256,128", right="2,3,256,128", result="2,8,3,256,128" if with_dq else "2,3,256,128",
        what='custom-call(%q, %k), custom_call_target="tpu_custom_call"',
    ).replace("%it", f"%splash_mha_{kernel}_segmented_residuals.9")  # fmt: skip
    assert executed_flops(text) == products * 2 * 2 * 3 * 256 * 256 * 128 / 2


@pytest.mark.parametrize(("opcode", "target"), [("convolution", ""), ("custom-call", "__cudnn$convForward")])
@pytest.mark.parametrize(("stride", "result"), [("", "2,32,32,16"), (" stride=2x2", "2,16,16,16")])
def test_windows_that_overlap(opcode, target, stride, result):
    """Each value of the result is a product of a window of 3 x 3 x 8 values."""
    text = _FORMS.format(
        left="2,32,32,8", right="3,3,8,16", result=result,
        what=f"{opcode}(%q, %k), window={{size=3x3{stride} pad=1_1x1_1}}, dim_labels=b01f_01io->b01f"
        f', custom_call_target="{target}"',
    )  # fmt: skip
    assert executed_flops(text) == 2 * math.prod(map(int, result.split(","))) * 3 * 3 * 8


@pytest.mark.parametrize(("target", "products"), [
    ("__cudnn$fmhaScaleBiasSoftmax", 2), ("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaScaleBiasSoftmaxBackward", 5),
])  # fmt: skip
def test_attention_of_cudnn(target, products):
    what = f'custom-call(%q, %k), custom_call_target="{target}", backend_config={{"mask_type": "MASK"}}'
    for mask, seen in (("CAUSAL", 0.5), ("NO_MASK", 1)):
        text = _FORMS.format(left="2,256,3,128", right="2,64,3,128", result="2,256,3,128", what=what)
        assert executed_flops(text.replace("MASK", mask, 1)) == products * 2 * 2 * 3 * 256 * 64 * 128 * seen
