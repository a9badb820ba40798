"""How a process finds out whether it is alone: a single TPU, a pod, SLURM; each in a process of its own."""

from __future__ import annotations

import http.server
import os
import pathlib
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import os
import sys
import types
import urllib.error
import urllib.request
import jax
from jax._src.clusters import cloud_tpu_cluster
from train.run import distributed

def get(url, headers, timeout):
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        answer = error
    return types.SimpleNamespace(text=answer.read().decode(), status_code=answer.code)

# What JAX asks for the metadata with, and which is not installed everywhere.
sys.modules["requests"] = types.SimpleNamespace(get=get)
distributed._TPU_FILES = (sys.argv[1],)
cloud_tpu_cluster.running_in_cloud_tpu_vm = True  # which JAX tells by the devices on the bus
if sys.argv[2] != "skipped":
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX's own, where it sees no TPU
if sys.argv[2] == "late":
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
try:
    distributed.start(timeout=5)
except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
print("several" if jax.distributed.is_initialized() else "alone")
"""


@pytest.fixture
def metadata():
    """A metadata server; its answers by attribute, 404 for others."""
    answers: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.rpartition("/")[2])
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write((answer or "not found").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}", answers
    server.shutdown()


def start(tmp_path: pathlib.Path, server: str, case: str = "", **env: str) -> subprocess.CompletedProcess:
    (tmp_path / "accel0").touch()
    kept = {
        name: x for name, x in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS", "SLURM", "OMPI"))
    }
    env = kept | {"GCE_METADATA_IP": server, "PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "accel0"), case],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["no metadata", "no server", "skipped", "late"])
def test_a_single_tpu_is_no_pod(tmp_path, metadata, case):
    """Colab's and Kaggle's."""
    pytest.importorskip("libtpu")
    server, _ = metadata
    env = {"TPU_SKIP_MDS_QUERY": "1"} if case == "skipped" else {}
    done = start(tmp_path, "localhost:1" if case == "no server" else server, case, **env)
    assert done.returncode == 0, done.stderr
    note, alone = done.stdout.splitlines()
    assert alone == "alone" and note.startswith("note: this host has a TPU, and no other hosts were found (")
    assert "continuing in one process" in note and "Traceback" not in done.stderr


def test_one_host_of_a_pod_is_several(tmp_path, metadata):
    pytest.importorskip("libtpu")
    server, answers = metadata
    answers |= {"agent-worker-number": "0", "worker-network-endpoints": "localhost", "tpu-env": ""}
    done = start(tmp_path, server)
    assert (done.returncode, done.stdout) == (0, "several\n"), done.stderr


def test_a_pod_that_does_not_find_itself_is_refused(tmp_path, metadata):
    """The environment tells of two hosts: going on alone would be wrong."""
    pytest.importorskip("libtpu")
    done = start(tmp_path, metadata[0], "skipped", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="a,b")
    assert done.returncode == 1 and "alone" not in done.stdout
