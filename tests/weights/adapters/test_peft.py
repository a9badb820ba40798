"""Adapters against PEFT on transformers' port: its files read here, ours read there."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.model.janus import Janus, place_images
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights.adapters.attach import attach, merge
from janus_jax.weights.adapters.peft_files import CONFIG, WEIGHTS, read_adapter
from janus_jax.weights.adapters.peft_writing import write_adapter
from janus_jax.weights.conversion import to_torch
from janus_jax.weights.fuse import fuse
from tests.weights.adapters.torch_adapters import inputs, peft_model, saved, torch_logits
from train.config import AdapterConfig, OptimizerConfig
from train.run import loop


@functools.partial(jax.jit, static_argnums=0)
def compute(model, params, ids, pixels, codes):
    def work(model):
        where = ids == model.config.language.vocab_size - 1
        x = place_images(model.embed_text(ids), where, model.embed_images(pixels))
        made = []
        for row in (x, model.embed_codes(codes)):
            positions = jnp.broadcast_to(jnp.arange(row.shape[1]), row.shape[:2])
            made.append(model.hidden(row, positions, jnp.ones(row.shape[:2], jnp.int32)))
        return model.text_logits(made[0]), model.image_logits(made[1])

    return model.apply({"params": params}, method=work)


def logits(model, params, given):
    return compute(model, params, **given)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ("tiny", "lora"),
        ("grouped", "dora"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("grouped", "patterns"), ("tiny", "saved"))),
    ],
)
def test_adapters_of_peft(size, get_case, oracle, kind, tmp_path, close):
    """Read here; written here in both dialects and read again; merged; and read by PEFT."""
    sized = get_case(size)
    wrapped, given = peft_model(sized.torch_model, kind), inputs(sized.config)
    expected = torch_logits(oracle, wrapped.base_model.model, given)
    plain = torch_logits(oracle, sized.torch_model, given)
    moved = [np.abs(new - old).max() / np.abs(old).max() for new, old in zip(expected, plain, strict=True)]
    assert min(moved) > 3e-3, moved

    adapter = read_adapter(saved(wrapped, tmp_path / "theirs"), sized.config)
    case = sized.unstacked
    params = attach(case.params, adapter, 1.0, jnp.float32, None)
    ours = logits(case.model, params, given)
    for found, wanted, what in zip(ours, expected, ("text", "image"), strict=True):
        close(found, wanted, what)

    merged = logits(case.model, merge(params), given)
    for found, wanted in zip(merged, ours, strict=True):
        close(found, wanted, "merged", 1e-5)

    for dialect in ("transformers", "original"):
        (tmp_path / dialect).mkdir()
        write_adapter(tmp_path / dialect, adapter, sized.config, dialect)
        again = attach(case.params, read_adapter(tmp_path / dialect, sized.config), 1.0, jnp.float32, None)
        found = flatten(again if dialect == "transformers" else merge(again))  # the original joins SigLIP's q, k and v
        for path, x in flatten(params if dialect == "transformers" else merge(params)).items():
            np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-6, err_msg=path)

    peft, base = pytest.importorskip("peft"), type(sized.torch_model).from_pretrained(sized.folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "transformers").eval()
    found = torch_logits(oracle, theirs.base_model.model, given)
    for one, other in zip(found, ours, strict=True):
        close(other, one, "ours read by PEFT")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_a_trained_adapter_is_read_by_peft(oracle, kind, tmp_path, monkeypatch, close):
    """The export of a run here, on the port with the checkpoint that the run began with, written as torch's."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh({}, jax.devices()[:1]))
    model = dataclasses.replace(MODEL, gen_head_width=MODEL.language.width)  # as the port has it
    start = write_checkpoint(tmp_path / "start", model)
    adapter = AdapterConfig(rank=3, alpha=6, kind=kind, targets=("decoder", "heads", "aligners"), save=("gen_embed",))
    folders = write_data(tmp_path / "data", count=12, model=model)
    config = tiny_config(folders, tmp_path / "run", init_from=str(start), model=model, adapter=adapter)
    exported = loop.train(dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.05)))

    to_torch(start, tmp_path / "torch", "transformers", note=lambda told: None)
    given, placeholder = inputs(model), model.language.vocab_size - 1
    base = oracle.TorchJanus.from_pretrained(tmp_path / "torch", image_token_id=placeholder).eval()
    plain = torch_logits(oracle, base, given)
    wrapped = peft.PeftModel.from_pretrained(base, exported).eval()
    expected = torch_logits(oracle, wrapped.base_model.model, given)
    janus = janus_jax.load(start, adapter=exported, progress=False)
    for found, wanted, without in zip(logits(janus.model, janus.params, given), expected, plain, strict=True):
        close(found, wanted, kind, 1e-4)
        assert np.abs(wanted - without).max() > 1e-2 * np.abs(without).max()


@pytest.mark.slow
def test_layouts(tiny, tmp_path, close):
    """Layers stacked, and kernels fused where they can be: the same numbers."""
    given = inputs(tiny.config)
    for kind in ("patterns", "some"):
        adapter = read_adapter(saved(peft_model(tiny.torch_model, kind), tmp_path / kind), tiny.config)
        apart = tiny.unstacked
        wanted = logits(apart.model, attach(apart.params, adapter, 0.7, jnp.float32, None), given)
        apart_fused = Janus(tiny.config, scan_layers=False, fused=True), fuse(apart.params)
        others = [(tiny.model, tiny.params)] if kind == "patterns" else [apart_fused]
        for model, params in others:
            params = attach(params, adapter, 0.7, jnp.float32, None)
            for tree in (params, merge(params)):
                for found, expected in zip(logits(model, tree, given), wanted, strict=True):
                    close(found, expected, kind, 1e-5)


def test_three_namings(tiny, tmp_path, close):
    """What PEFT writes around the original, and around its language_model alone."""
    own = read_adapter(saved(peft_model(tiny.torch_model, "patterns"), tmp_path / "theirs"), tiny.config)
    (tmp_path / "original").mkdir()
    write_adapter(tmp_path / "original", own, tiny.config, "original")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "original" / WEIGHTS)
    assert all(name.startswith("base_model.model.language_model.model.layers.") for name in tensors)
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file({name.replace(".language_model.model.", ".model."): x for name, x in tensors.items()}, alone / WEIGHTS)
    settings = json.loads((tmp_path / "original" / CONFIG).read_text())
    for key in ("alpha_pattern", "rank_pattern"):
        settings[key] = {name.removeprefix("language_model."): x for name, x in settings[key].items()}
    (alone / CONFIG).write_text(json.dumps(settings))
    for folder in ("original", "alone"):
        read = read_adapter(tmp_path / folder, tiny.config)
        assert read.deltas.keys() == own.deltas.keys()
        for place, delta in own.deltas.items():
            np.testing.assert_array_equal(read.deltas[place].a, delta.a)
            np.testing.assert_array_equal(read.deltas[place].b, delta.b)
            assert read.deltas[place].scale == pytest.approx(delta.scale)
