"""Eight CPU devices, full float32 products, and models shared by the whole session, each beside its oracle."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Hundreds of small programs that run once or twice, here and in the commands that tests start: compiling them is what
# takes time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# So does this, by a quarter; XLA ends a process that names a flag it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
# Compiled programs are shared by the workers of this session and by the commands that tests start, whose tiny models
# are the same; nothing comes from an earlier session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="janus_jax_tests_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Whoever starts tests in the background may have SIGINT ignored, which is inherited; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # An example that takes long says that the machine is busy.
    hypothesis.settings.register_profile("without deadlines", deadline=None)
    hypothesis.settings.load_profile("without deadlines")

# After the settings above, which hold only if no backend has started.
from janus_jax.config import PRESETS, JanusConfig, LlamaConfig, SiglipConfig, VQConfig  # noqa: E402
from janus_jax.model.janus import Janus  # noqa: E402

# Sizes that tell apart what the presets leave equal: heads and key/value heads, head_dim and width / heads, the two
# image sizes, the two adapters' depths, one and four resolutions; and an eps large enough to be felt.
SIZES: dict[str, JanusConfig] = {
    "tiny": PRESETS["janus_tiny"],
    "grouped": JanusConfig(
        vision=SiglipConfig(image_size=48, patch_size=16, width=48, layers=2, heads=3),
        gen_vision=VQConfig(ch=64, ch_mult=(1,), z_channels=24, codebook_size=128, codebook_dim=4, grid=3),
        language=LlamaConfig(
            vocab_size=320, width=64, mlp_dim=96, layers=2, heads=4, kv_heads=2, head_dim=32, rope_theta=500.0,
            norm_eps=0.01, max_positions=256,
        ),
        aligner_depth=1,
        gen_aligner_depth=3,
        gen_head_width=64,
        dtype="float32",
    ),
    "multi_query": JanusConfig(
        vision=SiglipConfig(image_size=45, patch_size=14, width=40, layers=1, heads=2, mlp_ratio=3.7362, norm_eps=0.01),
        gen_vision=VQConfig(ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1, z_channels=16, codebook_size=96, grid=3),
        language=LlamaConfig(
            vocab_size=288, width=72, mlp_dim=80, layers=3, heads=4, kv_heads=1, head_dim=10, max_positions=256
        ),
        aligner_depth=3,
        gen_aligner_depth=1,
        gen_head_width=72,
        dtype="float32",
    ),
}  # fmt: skip


_TORCH = ("torch", "transformers")


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model: Janus, params: dict[str, Any], method: Any, *args):
    return model.apply({"params": params}, *args, method=method)


@dataclasses.dataclass(frozen=True)
class Case:
    """One size: the oracle's torch model, its checkpoint folder, and our model with the parameters read from there."""

    config: JanusConfig
    oracles: Any
    folder: pathlib.Path
    model: Janus
    params: dict[str, Any]

    @property
    def torch_model(self) -> Any:
        """The oracle's model; where torch is not installed, what asks for it is skipped."""
        return self.oracles or pytest.importorskip("torch")

    def run(self, method: Any, *args):
        """`model.apply` of `method`, compiled."""
        return _apply(self.model, self.params, method, *args)

    @functools.cached_property
    def unstacked(self) -> Case:
        """The same case with the decoder's layers apart (`scan_layers=False`)."""
        from janus_jax.weights.torch_weights import read_params

        params, _ = read_params(self.folder, self.config, scan_layers=False)
        return dataclasses.replace(self, model=Janus(self.config, scan_layers=False), params=params)


@pytest.fixture(scope="session")
def oracle():
    """transformers' port of Janus; what compares with it is skipped where torch or transformers is not installed."""
    # Late, since they take seconds to import and not every test needs them.
    for name in _TORCH:
        pytest.importorskip(name)
    from benchmarks.common import oracle

    return oracle


def _write_port(folder: pathlib.Path, config: JanusConfig):
    """A checkpoint in the dialect of transformers' port with random parameters, without torch."""
    from flax import traverse_util

    from examples.tiny.run import random_params
    from janus_jax.config import transformers_config
    from janus_jax.weights.formats.safetensors_files import write_safetensors
    from janus_jax.weights.torch_weights import LazyArray, tensors_to_write

    flat = traverse_util.flatten_dict(random_params(config))
    leaves = {path: LazyArray(array.shape, array.dtype, array.__getitem__) for path, array in flat.items()}
    raw = transformers_config(config, image_token_id=config.language.vocab_size - 1)
    (folder / "config.json").write_text(json.dumps(raw))
    write_safetensors(folder / "model.safetensors", tensors_to_write(leaves, {}, config, "transformers"))


@pytest.fixture(scope="session")
def get_case(tmp_path_factory, request):
    """Case of a key of SIZES, built once. Without torch its checkpoint is ours, in the port's dialect all the same."""
    from janus_jax.weights.torch_weights import read_params

    @functools.cache
    def get(name: str) -> Case:
        config = SIZES[name]
        folder = tmp_path_factory.mktemp(name)
        torch_model = None
        if all(map(importlib.util.find_spec, _TORCH)):
            torch_model = request.getfixturevalue("oracle").build(config)
            torch_model.save_pretrained(folder)
        else:
            _write_port(folder, config)
        params, _ = read_params(folder, config, dtype="float32")
        return Case(config, torch_model, folder, Janus(config), params)

    return get


@pytest.fixture(scope="session", params=["tiny", "grouped", pytest.param("multi_query", marks=pytest.mark.slow)])
def case(request, get_case) -> Case:
    return get_case(request.param)


@pytest.fixture(scope="session")
def tiny(get_case) -> Case:
    return get_case("tiny")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def close():
    """Asserts that an array is within `tolerance` of the oracle's, as a part of the oracle's largest value."""

    def check(ours, oracle, what: str, tolerance: float = 1e-4):
        ours, oracle = np.asarray(ours, np.float64), np.asarray(oracle, np.float64)
        assert ours.shape == oracle.shape, f"{what}: shape {ours.shape}, the oracle's is {oracle.shape}"
        scale = np.abs(oracle).max()
        assert scale > 0, f"{what}: the oracle is all zeros, which proves nothing"
        error = np.abs(ours - oracle).max() / scale
        assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"

    return check
