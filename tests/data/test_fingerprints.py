"""Codes of another VQ model are refused, on any mesh and in either dtype of the frozen parameters."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from examples.tiny import run as tiny_run
from examples.tiny.run import MODEL, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import make_mesh, param_shardings
from janus_jax.weights.torch_weights import abstract_params
from tests.library.tiny_janus import raises_one_line
from train.data.fingerprints import VQ, check_codes, params_fingerprint
from train.data.prepared import open_prepared
from train.prepare import prepare, vq_encoder
from train.raw.sources import RawSample
from train.run.loop import train


@dataclasses.dataclass
class Folder:
    vq: str
    kind: str = "generation"
    version: int = 2
    folder: str = "some/codes"
    precision: str | None = "float32"

    @property
    def meta(self):
        encoded_on = {"encoded_on": {"platform": "tpu", "precision": self.precision}} if self.precision else {}
        return {"version": self.version, "settings": {"vq": self.vq} | encoded_on}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(MODEL)[VQ])


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_run_s_own_codes_are_taken_on_any_mesh(params, sizes, dtype):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    frozen = {VQ: jax.tree.map(lambda x: jnp.asarray(x, dtype), params)}
    frozen = jax.device_put(frozen, {VQ: param_shardings(abstract_params(MODEL), mesh)[VQ]})
    ours = params_fingerprint({VQ: params})
    assert check_codes([Folder(ours), Folder("", kind="text")], frozen, mesh) == []
    with pytest.raises(ValueError, match=rf"some/codes was encoded by another VQ model \(ab\).*\({ours}\)") as caught:
        check_codes([Folder(ours), Folder("ab")], frozen, mesh)
    assert "\n" not in str(caught.value)
    told = check_codes([Folder(""), Folder("0123456789abcdef", version=1)], frozen, mesh)
    assert len(told) == 2 and all("some/codes does not say which VQ model" in line for line in told)


def test_codes_of_another_precision_are_refused(params):
    frozen = jax.device_put({VQ: params}, NamedSharding(make_mesh({"fsdp": 8}), PartitionSpec()))
    ours = params_fingerprint({VQ: params})
    with raises_one_line("some/codes has codes computed in bfloat16, not in float32, .*prepare it again"):
        check_codes([Folder(ours, precision="bfloat16")], frozen, make_mesh({"fsdp": 8}))
    (told,) = check_codes([Folder(ours, precision=None)], frozen, make_mesh({"fsdp": 8}))
    assert told == "some/codes does not say how exactly its codes were computed, so this is not checked"


def test_a_little_training_is_another_model(params):
    changed = jax.tree.map(lambda x: x * 1.02, params)
    assert params_fingerprint({VQ: changed}) != params_fingerprint({VQ: params})
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    frozen = jax.device_put({VQ: changed}, NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match="another VQ model"):
        check_codes([Folder(params_fingerprint({VQ: params}))], frozen, mesh)


@pytest.mark.slow
def test_a_run_refuses_codes_of_another_model_before_its_first_step(tmp_path):
    folders = write_data(tmp_path / "data", count=12)
    ours, other = write_checkpoint(tmp_path / "ours", seed=0), write_checkpoint(tmp_path / "other", seed=1)
    fingerprint = vq_encoder(other)[1]
    assert fingerprint != vq_encoder(ours)[1]
    processor = Processor.from_folder(folders["tokenizer"], MODEL)
    image = tiny_run.some_image(np.random.default_rng(0))
    prepare(
        [RawSample(f"{i}", caption=f"cat {i}", images=(image,)) for i in range(12)], tmp_path / "codes", "generation",
        processor, encode=functools.partial(tiny_run.encode, model=MODEL), vq_fingerprint=fingerprint, context=128,
        batch_size=4, progress=False,
    )  # fmt: skip
    assert open_prepared(tmp_path / "codes").meta["settings"]["vq"] == fingerprint
    config = tiny_config(folders | {"generation": str(tmp_path / "codes")}, tmp_path / "run", init_from=str(ours))
    with pytest.raises(ValueError, match="codes was encoded by another VQ model"):
        train(config)
    assert not list((tmp_path / "run").glob("checkpoints/*")), "refused before the first step"


def test_pictures_resized_for_other_settings_are_refused(tmp_path):
    folders = write_data(tmp_path / "data", count=4)
    path = tmp_path / "data" / "understanding" / "prepared.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"settings": meta["settings"] | {"resized": [32, 14, 0, 0, 0]}}))
    with pytest.raises(ValueError, match=r"resized for other image settings \(\[32, 14, 0, 0, 0\], the model's are"):
        train(tiny_config(folders, tmp_path / "run"))
