"""The layers that the encoders and the decoder share, against numpy and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.model.layers import Embed, MlpProjector, RMSNorm, apply_rope, rope


def test_embed():
    table = jnp.arange(12.0).reshape(4, 3)
    x = Embed(4, 3, jnp.bfloat16).apply({"params": {"embedding": table}}, jnp.array([[2, 0]]))
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, [[[6, 7, 8], [0, 1, 2]]])


@pytest.fixture
def modeling_llama(oracle):
    from transformers.models.llama import modeling_llama

    return modeling_llama


def test_rms_norm(rng, oracle, modeling_llama, close):
    x, scale = rng.standard_normal((2, 3, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    norm = modeling_llama.LlamaRMSNorm(8, eps=0.1)
    norm.weight.data = oracle.torch.tensor(scale)
    ours = RMSNorm(0.1).apply({"params": {"scale": scale}}, x)
    close(ours, norm(oracle.torch.tensor(x)).detach(), "RMSNorm", 1e-6)


def test_rope(rng, oracle, modeling_llama, close):
    """Far positions and another theta, against transformers."""
    x = rng.standard_normal((2, 5, 3, 12)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 4000, 16383, 3]])
    config = modeling_llama.LlamaConfig(
        hidden_size=36, num_attention_heads=3, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    theirs = oracle.torch.tensor(x).swapaxes(1, 2)
    cos_sin = modeling_llama.LlamaRotaryEmbedding(config)(theirs, oracle.torch.tensor(positions))
    theirs, _ = modeling_llama.apply_rotary_pos_emb(theirs, theirs, *cos_sin)
    close(apply_rope(x, rope(positions, 12, 500.0)), theirs.swapaxes(1, 2), "rotated", 2e-3)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mlp_projector_names(depth):
    """Layers carry the indices of the reference's nn.Sequential, whose odd entries are the GELUs."""
    shapes = jax.eval_shape(MlpProjector(5, 8, depth).init, jax.random.key(0), jnp.zeros((1, 5)))["params"]
    assert sorted(shapes) == [f"layers_{2 * i}" for i in range(depth)]
    assert [shapes[name]["bias"].shape for name in sorted(shapes)] == [(8,)] * depth
