"""Checkpoints, adapters and sources of training that are named by a hub id, against a hub that is not there."""

import json
import pathlib
import shutil

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from examples.tiny.run import tiny_config
from janus_jax import load
from janus_jax.hub import resolve, weight_patterns
from janus_jax.sharding import flatten
from janus_jax.weights.conversion import from_torch, to_torch
from tests.library.tiny_janus import folder, raises_one_line  # noqa: F401
from tests.weights.adapters.random_adapters import written
from train.step.init import open_sources

# ruff: noqa: F811

FOLDERS = dict.fromkeys(("understanding", "text", "generation", "tokenizer"), "unused")


class Hub:
    """Stands for the hub: the files of a repository, or an error, and what was fetched of it."""

    def __init__(self, folder: pathlib.Path, files=(), error=None, broken=None, cached=False):
        self.folder, self.files, self.error, self.broken, self.cached = folder, files, error, broken, cached
        self.calls = []

    def install(self, monkeypatch):
        hub = self

        class Api:
            def model_info(self, repo, revision=None, timeout=None):
                if hub.error is not None:
                    raise hub.error
                names = [type("File", (), {"rfilename": name}) for name in hub.files]
                return type("Info", (), {"siblings": names})

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        return self

    def snapshot_download(self, repo, revision=None, local_files_only=False, allow_patterns=None):
        self.calls.append((repo, revision, local_files_only, allow_patterns))
        if local_files_only and not self.cached:
            raise LocalEntryNotFoundError("nothing there")
        if self.broken is not None and not local_files_only:
            raise self.broken
        return str(self.folder)


def http_error(kind):
    """An error of the hub's client, of several lines as it makes them."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error. (Request ID: 1)\n\nNot found for url: ...")
    return error


def test_loaded_from_the_hub(folder, monkeypatch):
    hub = Hub(folder, ["config.json", "model.safetensors"]).install(monkeypatch)
    janus = load("owner/name", revision="main")
    assert janus.source == "owner/name" and janus.processor is not None
    assert janus.processor.roles == "pro"
    ((repo, revision, offline, patterns),) = hub.calls
    assert (repo, revision, offline) == ("owner/name", "main", False)
    assert set(patterns) == {"*.json", "*.jinja", "*.model", "model*.safetensors"}


def test_the_hub_id_says_the_roles(folder, monkeypatch):
    Hub(folder, ["config.json", "model.safetensors"]).install(monkeypatch)
    for name, roles in (
        ("deepseek-ai/Janus-1.3B", "old"),
        ("me/janus-1.3b-charts", "old"),
        ("me/after-janus-1.3b", "pro"),
    ):
        assert load(name).processor.roles == roles
    assert load("deepseek-ai/Janus-1.3B").processor.roles_from == "the hub id is deepseek-ai/Janus-1.3B"


def test_downloads_need_a_home(monkeypatch):
    """Without HOME and a name for the user, the hub's library would make a folder called ~ here."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with raises_one_line("no home folder for downloads; set HF_HOME to a folder", OSError):
        resolve("owner/name")


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model*.safetensors"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["model*.safetensors"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["pytorch_model*.bin"]),
        (["pytorch_model.bin", "adapter.safetensors"], ["pytorch_model*.bin"]),
        (["pytorch_model.bin", "other/model.safetensors"], ["pytorch_model*.bin"]),
        (["params/state/manifest.ocdbt", "carried.safetensors"], ["params/**", "carried.safetensors"]),
    ],
)
def test_one_kind_of_weights_is_fetched(folder, monkeypatch, files, weights):
    hub = Hub(folder, ["config.json", "README.md", *files]).install(monkeypatch)
    assert resolve("deepseek-ai/Janus-Pro-1B") == folder
    assert weight_patterns(files) == weights
    patterns = hub.calls[0][3]
    assert patterns[-len(weights) :] == weights and len(patterns) == 3 + len(weights)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), TimeoutError(), OSError("offline")], ids=repr)
def test_without_network(folder, monkeypatch, error):
    hub = Hub(folder, error=error).install(monkeypatch)
    reason = str(error).splitlines()[0] if str(error) else "TimeoutError"
    with raises_one_line(rf"owner/name is not a folder here.*cannot be reached \({reason}\)", OSError):
        load("owner/name")
    assert hub.calls == [("owner/name", None, True, None)]
    # With the files in the cache, that is no error.
    hub.cached = True
    assert resolve("owner/name") == folder


def test_without_network_and_with_the_real_cache(tmp_path, monkeypatch):
    class Api:
        def model_info(self, *args, **kwargs):
            raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: original(*a, cache_dir=tmp_path, **k))
    with raises_one_line(r"not in the hub's cache, and the hub cannot be reached \(no network\)", OSError):
        load("owner/name")


def test_unknown_repository_and_revision(folder, monkeypatch):
    Hub(folder, error=http_error(RepositoryNotFoundError)).install(monkeypatch)
    with raises_one_line("owner/name is neither a folder here nor a repository on the hub", FileNotFoundError):
        load("owner/name")
    Hub(folder, error=http_error(RevisionNotFoundError)).install(monkeypatch)
    with raises_one_line("owner/name has no revision 'v9' on the hub", FileNotFoundError):
        load("owner/name", revision="v9")


@pytest.mark.parametrize("error", [RuntimeError("broken\npipe"), LocalEntryNotFoundError("broken"), ConnectionError()])
def test_download_that_breaks_off(folder, monkeypatch, error):
    Hub(folder, ["model.safetensors"], broken=error).install(monkeypatch)
    with raises_one_line(r"owner/name: the download failed \((broken|ConnectionError)\); try again", OSError):
        load("owner/name")


def test_folder_comes_before_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert json.loads((resolve("owner/name") / "config.json").read_text())["model_type"] == "multi_modality"


def test_only_its_own_files_of_an_adapter_are_fetched():
    files = ["adapter_config.json", "adapter_model.bin", "optimizer.pt"]
    assert weight_patterns(files) == ["adapter_model.bin"]
    assert weight_patterns([*files, "adapter_model.safetensors"]) == ["adapter_model.safetensors"]
    # A checkpoint with an adapter beside it is a checkpoint.
    assert weight_patterns(["config.json", "model.safetensors", *files]) == ["model*.safetensors"]


def test_adapters_by_hub_id(folder, tmp_path, monkeypatch):
    janus = load(folder)
    adapter = written(tmp_path / "watercolor", janus.config)
    Hub(adapter, ["adapter_config.json", "adapter_model.safetensors"]).install(monkeypatch)
    assert janus.load_adapter("owner/watercolor") == "watercolor"
    drawn = janus.generate_codes("a house")
    monkeypatch.undo()
    np.testing.assert_array_equal(load(folder, adapter=adapter).generate_codes("a house"), drawn)


def test_conversion_and_training_by_hub_id(folder, tmp_path, monkeypatch):
    hub = Hub(folder, ["config.json", "model.safetensors"]).install(monkeypatch)
    from_torch("owner/name", tmp_path / "converted")
    to_torch("owner/name", tmp_path / "torch", "original", note=lambda text: None)
    assert [call[0] for call in hub.calls] == ["owner/name"] * 2
    model = load(folder).config
    config = tiny_config(FOLDERS, tmp_path / "run", init_from="owner/name", vision_from="owner/vision", model=model)
    assert set(open_sources(config)) == {path.split("/")[0] for path in flatten(load(folder).params)}
    assert [call[0] for call in hub.calls[2:]] == ["owner/name", "owner/vision"]
    Hub(folder, error=ConnectionError("no network")).install(monkeypatch)
    for key in ("init_from", "vision_from"):
        with raises_one_line(f"{key}: owner/other is not a folder here", Exception):
            open_sources(tiny_config(FOLDERS, tmp_path / "run", **{key: "owner/other"}))
