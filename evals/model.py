"""The model that a command is asked for: its options, what tells it from others, and itself."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from evals.asking.answers import Respondent
from evals.asking.identity import model_identity
from janus_jax import compilation_cache
from janus_jax.__main__ import mesh_of
from janus_jax.hub import resolve
from janus_jax.loading import default_dtype, first_device, load
from janus_jax.pipeline import JanusPipeline
from janus_jax.sharding import MESH_AXES
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.quantize import FORMS
from janus_jax.weights.torch_weights import DTYPES


def add_options(parser: argparse._ActionsContainer) -> None:
    """Options of how the model computes, beside `--model`."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on CPU")
    parser.add_argument("--weights", choices=FORMS, help="quantized weights in the decoder (default: as --dtype)")
    parser.add_argument("--adapter", metavar="DIR", help="a low-rank adapter in PEFT's files")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=f"device mesh over {', '.join(MESH_AXES)}")


def asked_identity(args: argparse.Namespace) -> dict[str, Any]:
    """What tells the model of `--model` and its options from others, see `model_identity`."""
    folder = resolve(args.model)
    weights = args.weights or open_checkpoint(folder, quantized=True).weights
    # A mesh is asked for its first device only when it is made, and its devices are alike.
    dtype = args.dtype or default_dtype(first_device(None))
    return model_identity(args.model, folder, dtype=dtype, weights=weights, adapter=args.adapter)


class Asked:
    """The model of `--model`, loaded when it is needed, and once."""

    def __init__(self, args: argparse.Namespace):
        self._args = args

    @functools.cached_property
    def janus(self) -> JanusPipeline:
        """The model on its mesh."""
        args = self._args
        compilation_cache.enable()
        given = {name: getattr(args, name) for name in ("dtype", "weights", "adapter")}
        return load(args.model, mesh=mesh_of(args.mesh), **given)

    @functools.cached_property
    def respondent(self) -> Respondent:
        """The model as it answers questions."""
        return Respondent(self.janus, self._args.batch_size)
