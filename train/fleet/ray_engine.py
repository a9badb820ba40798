"""Preparation by Ray: each shard is a task, which Ray places, and tries again wherever a worker or a node was lost.

Workers, retries, preemptible nodes, autoscaling and devices are Ray's; shards and the merge are the same as without it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from janus_jax.io.messages import one_line
from janus_jax.io.progress import shown, step_bar
from train.config import ENCODED
from train.data.shards import LEAST_READ, Tally
from train.fleet.job import Job
from train.fleet.merge import Report
from train.fleet.preparation import Preparation

_PACKAGES = ("train", "janus_jax")  # which nodes get from here
_CPUS = 4  # of a task, without devices
_ANSWERS_WITHIN = 10  # seconds


def run(job: Job, address: str | None = None, progress: bool | None = None) -> Report:
    """Prepares `job` on the Ray cluster at `address`, or on this machine; the folder and its bytes are as without Ray.

    Raises: as `train.prepare.prepare`; OSError if the cluster is lost, and ValueError without Ray.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray; pip install -e '.[ray]'") from None
    reach(address)
    job = job.anywhere()
    root = pathlib.Path(__file__).resolve().parents[2]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, runtime_env={"py_modules": [str(root / name) for name in _PACKAGES]}, log_to_driver=False)
    try:
        needs = resources([node["Resources"] for node in ray.nodes() if node["Alive"]], job)
        task = functools.partial(_submit, ray, {**needs, "max_retries": -1}, job)
        samples, count, finished = ray.get(task(_plan))
        if not finished:
            _shards(ray, task, job, samples, count, progress)
        return ray.get(task(_end))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        raise OSError(f"a task of Ray failed ({one_line(cause, 300)}); run the same command to continue") from None
    except ray.exceptions.RayError as error:
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(f"Ray: {one_line(told, 300)}; run the same command to continue") from None
    finally:
        ray.shutdown()


def reach(address: str | None):
    """OSError in one line if nothing answers at `address`, for which Ray would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto`, which Ray finds, or nothing
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN).close()
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or error
        raise OSError(f"no Ray cluster answers at {one_line(address)} ({one_line(told, 100)})") from None


def resources(nodes: Iterable[Mapping[str, float]], job: Job) -> dict[str, Any]:
    """What a task takes: a GPU, or a host of TPUs, with its share of the cores; cores if no codes are to be computed.

    Args:
      nodes: the resources of each node.
    """
    nodes = [node for node in nodes if node.get("CPU")]
    if job.kind in ENCODED:
        # Chips of a host belong to one process.
        if tpus := [node for node in nodes if node.get("TPU")]:
            chips = min(int(node["TPU"]) for node in tpus)
            return {"num_cpus": min(int(node["CPU"]) for node in tpus), "resources": {"TPU": chips}}
        if gpus := [node for node in nodes if node.get("GPU")]:
            return {"num_cpus": max(1, min(int(node["CPU"] // node["GPU"]) for node in gpus)), "num_gpus": 1}
    most = min((int(node["CPU"]) for node in nodes), default=1)
    return {"num_cpus": max(1, min(job.workers or _CPUS, most))}


def _submit(ray: Any, options: Mapping[str, Any], job: Job, function: Any, *args: Any) -> Any:
    cpus = options["num_cpus"]
    return ray.remote(function).options(**options).remote(job, job.workers or cpus, *args)


def _shards(ray: Any, task: Any, job: Job, samples: int, count: int, progress: bool | None) -> None:
    tally = Tally(job.max_bad_share)
    waiting = [task(_shard, shard) for shard in range(count)]
    with step_bar("preparing", samples, shown(progress)) as bar:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            for read, dropped, firsts in ray.get(ready):
                tally.include(read, dropped, firsts)
                tally.check(LEAST_READ)
                bar.update(read)


# ---------------------------------------------------------------- tasks, in the workers


@functools.lru_cache(maxsize=1)
def _joined(job: Job, workers: int) -> Preparation:
    """Source, tokenizer and compiled encoder, which a worker keeps from shard to shard."""
    return dataclasses.replace(job, workers=workers).join(progress=False)


def _plan(job: Job, workers: int) -> tuple[int, int, bool]:
    made = _joined(job, workers)
    return len(made.source), made.count, made.finished


def _shard(job: Job, workers: int, shard: int) -> tuple[int, dict[str, int], dict[str, str]]:
    made = _joined(job, workers)
    made.new_tally()
    if not any(made.done([shard])):
        for _ in made.write([shard], lambda _: None):
            pass
    return made.tally.read, dict(made.tally.dropped), made.tally.first


def _end(job: Job, workers: int) -> Report:
    return _joined(job, workers).end()
