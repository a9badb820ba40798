from __future__ import annotations

import secrets

import pytest

from janus_jax.io.stores import StorePath
from tests import emulated_stores


@pytest.fixture(params=["gs", "s3"])
def store(request):
    """An empty folder in each store, and the proxy before it; skipped without the extras `test` (gs) or `test-s3`."""
    for name in {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}[request.param]:
        pytest.importorskip(name)
    bucket, proxy = {"gs": emulated_stores.google, "s3": emulated_stores.amazon}[request.param]()
    return StorePath(bucket) / secrets.token_hex(4), proxy


def upload(local, folder: StorePath) -> StorePath:
    """Copies a local folder or file to a store."""
    for path in [local] if local.is_file() else [each for each in local.rglob("*") if each.is_file()]:
        (folder / path.relative_to(local if local.is_dir() else local.parent).as_posix()).write_bytes(path.read_bytes())
    return folder
