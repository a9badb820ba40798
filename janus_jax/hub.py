"""Checkpoints and adapters on the Hugging Face hub: from a folder or a hub id to a folder."""

from __future__ import annotations

import os
import pathlib
import re

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import is_store
from janus_jax.io.stores import as_path, missing

# Neither name starts with a dot: ../name is a path.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Where the hub's library keeps downloads, instead of ~/.cache.
_HUB_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
# Weights are added to these: only one kind if a repository has several.
_SMALL_FILES = ("*.json", "*.jinja", "*.model")


def resolve(path_or_hub_id: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """The folder of a checkpoint or an adapter: local, in a store, or downloaded from the hub if it is a hub id.

    Raises: OSError in one line for what is neither, and for a download that fails.
    """
    folder = as_path(path_or_hub_id)
    if (name := hub_id(path_or_hub_id)) is not None:
        return _download(name, revision)
    if is_store(folder) and not folder.is_dir():
        raise missing(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{one_line(path_or_hub_id)} is neither a folder nor a hub id of the form owner/name")
    return folder


def hub_id(path_or_hub_id: str | os.PathLike) -> str | None:
    """The hub id, or None if it is a path."""
    is_path = pathlib.Path(path_or_hub_id).exists() or not _HUB_ID.fullmatch(str(path_or_hub_id))
    return None if is_path else str(path_or_hub_id)


def _download(hub_id: str, revision: str | None) -> pathlib.Path:
    if not any(os.environ.get(name) for name in _HUB_FOLDERS) and os.path.expanduser("~") == "~":
        # Otherwise the hub's library would create a folder called ~ here.
        raise OSError(f"{hub_id}: this user has no home folder for downloads; set HF_HOME to a folder")
    # Imported late: a local checkpoint needs no network library.
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # One request: listing the tree would be retried for half a minute without a network.
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=10)
        files = [file.rfilename for file in info.siblings or ()]
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{hub_id} is neither a folder here nor a repository on the hub") from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{hub_id} has no revision {revision!r} on the hub") from None
    except Exception as no_network:
        # Offline with everything in the cache is a normal way to work.
        try:
            return pathlib.Path(huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise OSError(
                f"{hub_id} is not a folder here, not in the hub's cache, and the hub cannot be reached "
                f"({_first_line(no_network)}); use a local folder, or connect to the network"
            ) from None
    wanted = [*_SMALL_FILES, *weight_patterns(files)]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # from whatever HTTP library the hub's client uses
        raise OSError(f"{hub_id}: the download failed ({_first_line(error)}); try again to resume") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def weight_patterns(files: list[str]) -> list[str]:
    """Which weights of a repository's files to fetch: an adapter's, or converted ones, else safetensors, else .bin."""
    if "adapter_config.json" in files and "config.json" not in files:
        return ["adapter_model.safetensors" if "adapter_model.safetensors" in files else "adapter_model.bin"]
    if any(name.startswith("params/") for name in files):
        return ["params/**", "carried.safetensors"]
    if any(re.fullmatch(r"model[^/]*\.safetensors", name) for name in files):
        return ["model*.safetensors"]
    return ["pytorch_model*.bin"]
