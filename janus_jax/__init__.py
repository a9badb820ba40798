"""Janus and Janus-Pro in JAX: load a checkpoint, draw, answer.

>>> import janus_jax
>>> janus = janus_jax.load("deepseek-ai/Janus-Pro-1B")
>>> janus.generate_images("a red bicycle")[0].save("bicycle.png")
>>> answer = janus.chat("What is this?", images=["bicycle.png"])
"""

from janus_jax.config import PRESETS, JanusConfig
from janus_jax.loading import load
from janus_jax.model.janus import Janus
from janus_jax.pipeline import JanusPipeline
from janus_jax.sharding import make_mesh

__all__ = ["PRESETS", "Janus", "JanusConfig", "JanusPipeline", "load", "make_mesh"]
