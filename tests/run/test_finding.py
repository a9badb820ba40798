"""How a process finds out whether it is alone: a single TPU, a pod, SLURM; each in a process of its own."""

from __future__ import annotations

import concurrent.futures
import http.server
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from tests.library.tiny_janus import raises_one_line
from train.run import distributed

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import os
import sys
import types
import urllib.error
import urllib.request
import jax
from jax._src.clusters import cloud_tpu_cluster
from jax._src.distributed import global_state
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
# Asking for jax.process_index() would look for the TPU.
several = f"several: {global_state.process_id} of {global_state.num_processes}"
print(several if jax.distributed.is_initialized() else "alone")
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
        name: x
        for name, x in os.environ.items()
        if not name.startswith(("TPU_", "JAX_PLATFORMS", "SLURM", "OMPI", "MEGASCALE"))
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
    assert (done.returncode, done.stdout) == (0, "several: 0 of 1\n"), done.stderr


def test_a_pod_that_does_not_find_itself_is_refused(tmp_path, metadata):
    """The environment tells of two hosts: going on alone would be wrong."""
    pytest.importorskip("libtpu")
    done = start(tmp_path, metadata[0], "skipped", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="a,b")
    assert done.returncode == 1 and "alone" not in done.stdout


SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_SLICE_ID": "0"}


@pytest.mark.parametrize("where", ["environment", pytest.param("metadata", marks=pytest.mark.slow)])
def test_hosts_of_two_slices_find_each_other(tmp_path, metadata, where):
    """One host each; told as GKE does, and as queued resources are."""
    pytest.importorskip("libtpu")
    server, answers = metadata
    answers |= {"agent-worker-number": "0", "worker-network-endpoints": "localhost", "tpu-env": ""}
    env = [SLICES | {"MEGASCALE_SLICE_ID": str(number)} for number in (0, 1)]
    if where == "metadata":
        # Both ask the same server here, so only the slice's own number is in the environment.
        answers["tpu-env"] = "".join(f"{name}: '{value}'\n" for name, value in list(SLICES.items())[:2])
        env = [{"MEGASCALE_SLICE_ID": str(number)} for number in (0, 1)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda own: start(tmp_path, server, **own), env))
    assert [(one.returncode, one.stdout) for one in done] == [(0, f"several: {n} of 2\n") for n in (0, 1)], done


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"MEGASCALE_SLICE_ID": ""}, "MEGASCALE_NUM_SLICES=2, but MEGASCALE_SLICE_ID is not set; set "),
        ({"MEGASCALE_COORDINATOR_ADDRESS": ""}, "MEGASCALE_COORDINATOR_ADDRESS is not set"),
        ({"MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID must be from 0 to below MEGASCALE_NUM_SLICES=2, got '2'"),
        ({"MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES must be a number of slices, got 'two'"),
    ],
)
def test_slices_that_are_not_told_whole_are_refused(monkeypatch, changes, told):
    for name, value in (SLICES | changes).items():
        monkeypatch.setenv(name, value)
    with raises_one_line(told):
        distributed.start(timeout=5)


@pytest.mark.slow
def test_a_coordinator_of_slices_that_nobody_knows_is_one_line(tmp_path, metadata):
    pytest.importorskip("libtpu")
    server, answers = metadata
    answers |= {"agent-worker-number": "0", "worker-network-endpoints": "localhost", "tpu-env": ""}
    done = start(tmp_path, server, **SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": "nowhere.invalid"})
    assert done.returncode == 1 and "within 5 seconds (--timeout); check MEGASCALE_COORDINATOR_ADDRESS" in done.stderr
    assert "Traceback" not in done.stderr
