"""Adapters in a loaded model: several by name, switched, merged, and gone without a trace; what is refused."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from janus_jax import __main__, load
from janus_jax.sharding import flatten
from janus_jax.weights.adapters.peft_files import CONFIG
from tests.library.tiny_janus import SHORT, folder, raises_one_line  # noqa: F401
from tests.weights.adapters.random_adapters import written

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):  # noqa: F811
    """Two of the same layers and ranks, and a DoRA."""
    config, place = load(folder).config, tmp_path_factory.mktemp("adapters")
    made = {name: written(place / name, config, seed=seed) for seed, name in enumerate(("one", "two"))}
    return made | {"dora": written(place / "dora", config, targets=("attention", "heads"), dora=True, rank=2)}


@functools.cache
def compilations() -> list[str]:
    """Collects the programs that are compiled, from the first call on: not every JAX can forget a listener."""
    seen: list[str] = []

    def listen(event: str, _: float, **__):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


@pytest.mark.slow
def test_several_by_name(folder, adapters, capsys):  # noqa: F811
    seen = compilations()
    janus = load(folder, adapter=adapters["one"])
    capsys.readouterr()
    assert janus.adapters.names == ("one",) and janus.adapters.active == "one"
    with_one = janus.generate_codes(SHORT)
    janus.use_adapter(None)
    before = flatten(janus.params)
    plain = janus.generate_codes(SHORT)
    assert not np.array_equal(plain, with_one)

    assert janus.load_adapter(adapters["two"], name="other") == "other"
    before_switching = len(seen)
    assert before_switching, "compilations are seen"
    with_other = janus.generate_codes(SHORT)
    janus.use_adapter("one")
    np.testing.assert_array_equal(janus.generate_codes(SHORT), with_one)
    janus.use_adapter(None)
    np.testing.assert_array_equal(janus.generate_codes(SHORT), plain)
    assert seen[before_switching:] == [] and not np.array_equal(with_other, with_one)
    after = flatten(janus.params)
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)

    janus.use_adapter("other")
    janus.unload_adapter("one")
    assert janus.adapters.names == ("other",) and janus.adapters.active == "other"
    janus.unload_adapter()
    assert janus.adapters.names == () and flatten(janus.params).keys() == before.keys()
    assert all(x is before[path] for path, x in flatten(janus.params).items())


def test_scale_and_merge(folder, adapters):  # noqa: F811
    janus = load(folder)
    before = flatten(janus.params)
    janus.load_adapter(adapters["one"], scale=0.0, name="nothing")
    janus.merge_adapter()
    for path, x in flatten(janus.params).items():
        np.testing.assert_array_equal(x, before[path])
    janus.load_adapter(adapters["dora"])
    codes = janus.generate_codes(SHORT)
    janus.merge_adapter()
    assert flatten(janus.params).keys() == before.keys() and janus.adapters.names == ()
    np.testing.assert_array_equal(janus.generate_codes(SHORT), codes)
    with raises_one_line("there is no adapter in use to merge"):
        janus.merge_adapter()


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 0.02), ("int4", 0.2)])
def test_over_quantized_kernels(folder, adapters, weights, tolerance):  # noqa: F811
    """The same change of a kernel that is stored in another form; it cannot be merged into that."""
    janus = load(folder, weights=weights, adapter=adapters["dora"])
    if weights == "int8":
        assert janus.generate_codes(SHORT).shape == (1, janus.config.gen_vision.num_tokens)
    gains = [x for path, x in flatten(janus.params).items() if path.endswith("lora_gain")]
    plain = load(folder, adapter=adapters["dora"])
    others = [x for path, x in flatten(plain.params).items() if path.endswith("lora_gain")]
    for gain, other in zip(gains, others, strict=True):
        np.testing.assert_allclose(gain, other, rtol=tolerance)
    with raises_one_line("is quantized, and would lose the adapter to rounding; merge into the checkpoint"):
        janus.merge_adapter()


@pytest.mark.slow
def test_on_a_mesh(folder, adapters):  # noqa: F811
    one, several = load(folder), load(folder, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    for janus in (one, several):
        janus.load_adapter(adapters["dora"])
    for path, x in flatten(several.params).items():
        if "/lora_" in path:
            np.testing.assert_allclose(np.asarray(x), flatten(one.params)[path], rtol=1e-5, atol=1e-6)
            assert path.endswith("lora_a") or len(x.sharding.device_set) == 8


def test_a_base_of_another_name_is_noted(folder, adapters, tmp_path, capsys):  # noqa: F811
    janus = load(folder)
    janus.load_adapter(adapters["one"])  # over somewhere/janus, as this folder is called
    assert capsys.readouterr().err == ""
    settings = json.loads((adapters["one"] / CONFIG).read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "deepseek-ai/Janus-Pro-7B"}))
    (other / "adapter_model.safetensors").write_bytes((adapters["one"] / "adapter_model.safetensors").read_bytes())
    janus.load_adapter(other)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "deepseek-ai/Janus-Pro-7B" in told and str(folder) in told


def test_refused(folder, adapters, tmp_path):  # noqa: F811
    janus = load(folder)
    janus.load_adapter(adapters["one"])
    with raises_one_line("an adapter named 'one' is loaded"):
        janus.load_adapter(adapters["one"])
    with raises_one_line("there is no adapter named 'onee'; did you mean one?"):
        janus.use_adapter("onee")
    with raises_one_line("scale must be a finite number, got nan"):
        janus.load_adapter(adapters["two"], scale=float("nan"))
    with raises_one_line("expected the folder of a PEFT adapter", FileNotFoundError):
        janus.load_adapter(tmp_path)
    assert janus.adapters.names == ("one",) and janus.adapters.active == "one"


@pytest.mark.slow
def test_commands(folder, adapters, tmp_path, capsys):  # noqa: F811
    """`--adapter` of info, and of to_torch, which writes what loading with the adapter computes with."""
    assert __main__.main(["info", "--model", str(folder), "--adapter", str(adapters["dora"])]) == 0
    assert "DoRA of rank 2 on 7 layers" in capsys.readouterr().out
    assert __main__.main(["chat", "Hi", "--model", str(folder), "--adapter", str(tmp_path)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err

    script, env = ROOT / "convert" / "to_torch.py", os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, "--src", folder, "--dialect", "transformers"]
    wrong = subprocess.run([*command, "--out", tmp_path / "no", "--merge"], capture_output=True, text=True, env=env)
    assert wrong.returncode == 2 and "--adapter DIR and --merge go together" in wrong.stderr
    given = ["--out", tmp_path / "merged", "--adapter", adapters["dora"], "--merge"]
    subprocess.run([*command, *given], check=True, capture_output=True, env=env)
    janus, merged = load(folder, adapter=adapters["dora"]), load(tmp_path / "merged")
    janus.merge_adapter()
    found = flatten(merged.params)  # in the bfloat16 of the checkpoint
    for path, x in flatten(janus.params).items():
        np.testing.assert_allclose(found[path], x, rtol=2**-8, atol=1e-6, err_msg=path)
