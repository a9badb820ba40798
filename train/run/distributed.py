"""Several processes as one run: finding each other, agreeing on values, and failing together."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import StoreUnavailable
from janus_jax.processes import gather
from train.run.faults import Stopped

_TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
_SLICES, _SLICE, _COORDINATOR = "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"
TIMEOUT = 300  # seconds to wait for the other processes at the start


# ---------------------------------------------------------------- finding each other


def start(
    coordinator: str = "", processes: int | None = None, process: int | None = None, timeout: int = TIMEOUT
) -> None:
    """Joins the other processes of this run, if there are any; call it before anything else uses a device.

    On TPUs, of one slice or several, and under SLURM or Open MPI the processes find each other; elsewhere give all
    three of `coordinator` (host:port of process 0), `processes` (how many) and `process` (the index of this one).
    Slices are told by MEGASCALE_* in the environment, which GKE sets, or in the metadata of queued resources.

    Raises: ValueError in one line for inconsistent flags or variables; TimeoutError if the other processes do not join
      in time.
    """
    given = [bool(coordinator), processes is not None, process is not None]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process go together; give all three, or none")
    _check_slices(os.environ)
    maybe_alone = not any(given) and not _started_as_several()
    if maybe_alone and not has_tpu():
        return
    if coordinator:
        _check_flags(coordinator, processes, process)
        if process:
            _reach(coordinator, timeout)
    try:
        jax.distributed.initialize(
            coordinator or None, processes, process, initialization_timeout=timeout, heartbeat_timeout_seconds=100
        )
    except Exception as error:
        if maybe_alone and _finds_no_pod(error):
            # As on Colab and Kaggle: a TPU of one host, without the metadata of a pod. If it is a pod with broken
            # metadata, the workdir's lease keeps its hosts from training independently.
            print(
                f"note: this host has a TPU, and no other hosts were found ({one_line(error, 150)}); continuing in one "
                "process. If there are other hosts, give --coordinator, --processes and --process",
                flush=True,
            )
            return
        if isinstance(error, RuntimeError) and "coordinator address" in str(error):
            raise TimeoutError(
                f"{one_line(error)} within {timeout} seconds (--timeout); check {_COORDINATOR}"
            ) from None
        if not isinstance(error, RuntimeError) or "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(
            f"the {processes or ''} processes of the run did not all connect within {timeout} seconds (--timeout); "
            "have all of them been started, with the same coordinator?".replace("the  ", "the ")
        ) from None


def _check_slices(given: Mapping[str, str]):
    """ValueError in one line for variables of several slices that do not say which of them this host is of."""
    count = given.get(_SLICES) or "1"
    if not count.isdigit() or not int(count):
        raise ValueError(f"{_SLICES} must be a number of slices, got {one_line(repr(count))}")
    if int(count) == 1:
        return
    for name in (_COORDINATOR, _SLICE):
        if not given.get(name):
            raise ValueError(
                f"{_SLICES}={count}, but {name} is not set; set {_SLICES}, {_SLICE} (from 0) and {_COORDINATOR} (the "
                "first host of slice 0) on every host, or none of them for a single slice"
            )
    own = given[_SLICE]
    if not own.isdigit() or int(own) >= int(count):
        raise ValueError(f"{_SLICE} must be from 0 to below {_SLICES}={count}, got {one_line(repr(own))}")


def _started_as_several() -> bool:
    """Whether this process is one of several started by SLURM or Open MPI, or of several slices."""
    if int(os.environ.get(_SLICES) or 1) > 1:
        return True
    for count in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        step = count != "SLURM_NTASKS" or "SLURM_STEP_NODELIST" in os.environ  # otherwise not started by srun
        if step and int(os.environ.get(count) or 1) > 1:
            return True
    return False


def has_tpu() -> bool:
    """Whether JAX will find a TPU here: that of a single host, or this host's share of a pod."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return any(pathlib.Path(device).exists() for device in _TPU_FILES)


def _finds_no_pod(error: Exception) -> bool:
    """Whether `error` means that JAX found no other hosts, and the environment names none."""
    hosts = (os.environ.get(name, "") for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))
    if any("," in listed for listed in hosts) or jax.distributed.is_initialized():
        return False
    # No metadata, no metadata server (requests' errors are OSErrors), or no requests; or devices are already in use, as
    # in a notebook, which cannot happen before the processes of a pod have connected.
    return isinstance(error, ValueError | OSError | ImportError) or "must be called before" in str(error)


def _check_flags(coordinator: str, processes: int, process: int):
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator must be host:port, got {coordinator}")
    if not 0 <= process < processes:
        raise ValueError(f"--process must be from 0 to below --processes {processes}, got {process}")


def _reach(coordinator: str, timeout: int):
    """Waits for process 0's port to open, since JAX aborts with a stack trace if it stays closed."""
    host, _, port = coordinator.rpartition(":")
    deadline, reason = time.monotonic() + timeout, "no answer"
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.5)
    raise TimeoutError(
        f"the coordinator {coordinator} cannot be reached within {timeout} seconds (--timeout): {reason}; "
        "is process 0 running there, and does the firewall allow this port?"
    )


# ---------------------------------------------------------------- agreeing


def barrier():
    """Waits until every process gets here."""
    gather("")


def say(line: str):
    """Prints `line` in process 0 only; errors are ignored, since a run may outlive the reader of its output."""
    if jax.process_index() == 0:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class Agreed(ValueError):
    """An error of one process, raised in all of them."""


class AgreedUnavailable(StoreUnavailable, Agreed):
    """A store did not answer one process, which all of them say: the same command may work later."""


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Raises an error of one process in every process, in one line; otherwise the others would wait forever.

    Nothing inside may wait for other processes.

    Args:
      kinds: the exceptions to share, OSError and ValueError by default.
    Raises: with a single process the original error; else Agreed in all of them, AgreedUnavailable if it is a store's.
    """
    failed, agreed, kinds = "", "", kinds or (OSError, ValueError)
    try:
        yield
    except Stopped:
        raise
    except kinds as error:
        if jax.process_count() == 1:
            raise
        failed = f"process {jax.process_index()} ({socket.gethostname()}): {one_line(error, 1000)}"
        agreed = "later" if isinstance(error, StoreUnavailable) else "now"
    for told in gather(f"{agreed}\n{failed}" if failed else ""):
        if told:
            when, _, line = told.partition("\n")
            raise AgreedUnavailable(line) if when == "later" else Agreed(line)


def check_same(config: dict[str, Any], data: dict[str, str]):
    """ValueError in every process if the configuration, data or code of any process differs from process 0's.

    Args:
      config: values by dotted key.
      data: fingerprints by folder.
    """
    if jax.process_count() == 1:
        return
    mine = {"configuration": config, "data": data, "code": code_fingerprint()}
    first, *others = (json.loads(text) for text in gather(json.dumps([socket.gethostname(), mine])))
    for number, (host, theirs) in enumerate(others, 1):
        for kind, ours in first[1].items():
            names = {**ours, **theirs[kind]}
            wrong = [name for name in names if ours.get(name) != theirs[kind].get(name)]
            if wrong:
                shown = "; ".join(_difference(kind, name, ours.get(name), theirs[kind].get(name)) for name in wrong[:3])
                more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise ValueError(
                    f"the {kind} of process {number} ({host}) differs from process 0's ({first[0]}): {shown}{more}"
                )


def _difference(kind: str, name: str, ours: Any, theirs: Any) -> str:
    if kind == "configuration":
        return f"{name} is {theirs} there, {ours} on process 0"
    return name


@functools.cache
def code_fingerprint() -> dict[str, str]:
    """Hashes of our modules, and versions of the libraries that determine a step, as this process runs them."""
    import flax
    import optax

    found = {f"{module.__name__} {module.__version__}": module.__version__ for module in (jax, flax, optax, np)}
    for package in ("janus_jax", "train", "evals"):
        folder = pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0])
        for path in sorted(folder.rglob("*.py")):
            found[f"{package}/{path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found
