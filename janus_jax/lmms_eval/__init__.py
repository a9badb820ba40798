"""Janus as a model of lmms-eval: `lmms-eval --model janus_jax --model_args pretrained=DIR --tasks mme`."""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """What lmms-eval's registry takes from an installed package's entry points, by the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("janus_jax", chat_class_path="janus_jax.lmms_eval.model.JanusJax")
