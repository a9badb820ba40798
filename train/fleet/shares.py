"""Which shards a process prepares: its share, where the same command runs in several.

Shares need no communication: part I of N makes those of shards I, I + N, I + 2N and so on that are missing, and whoever
ends last merges.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

import jax

from train.run.distributed import has_tpu


@dataclasses.dataclass(frozen=True)
class Part:
    """Part `index`, from 0, of `count`; `told` says where that was found."""

    index: int = 0
    count: int = 1
    told: str = ""

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            last = f"{self.count - 1}/{self.count}"
            raise ValueError(f"a part must be one of 0/{self.count} to {last}, got {self.index}/{self.count}")

    def of(self, shards: int) -> range:
        """Its shards, of so many."""
        return range(self.index, shards, self.count)

    def __str__(self) -> str:
        return f"part {self.index}/{self.count}"


ALL = Part()


def parse_part(text: str) -> Part:
    """The part in `I/N`, as `--part` has it; ValueError otherwise."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or found[2].strip("0") == "":
        raise ValueError(f"--part must be I/N, such as 0/4, 1/4, 2/4 and 3/4 in four processes, got {text!r:.40}")
    return Part(int(found[1]), int(found[2]), "--part")


def find_part(environment: Mapping[str, str] | None = None) -> Part:
    """The share of this process among those that SLURM, Open MPI or a TPU slice started; all of it if there are none.

    Raises: ValueError if a SLURM array does not say how many tasks it has.
    """
    env = os.environ if environment is None else environment
    array = _array(env)
    # Without a step, SLURM's variables are those of a batch script or of an interactive allocation: one process.
    if "SLURM_STEP_NODELIST" in env and (task := _pair(env, "SLURM_PROCID", "SLURM_NTASKS")):
        index, count = task
        return Part(array[0] * count + index, array[1] * count, "SLURM") if array else Part(*task, "SLURM")
    if array:
        return Part(*array, "SLURM's array")
    if task := _pair(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        return Part(*task, "Open MPI")
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 and env.get("TPU_WORKER_ID", "").isdigit():
        return Part(int(env["TPU_WORKER_ID"]), len(hosts), "TPU_WORKER_ID")
    if has_tpu() and jax.process_count() > 1:
        return Part(jax.process_index(), jax.process_count(), "the TPU slice")
    return ALL


def _pair(env: Mapping[str, str], index: str, count: str) -> tuple[int, int] | None:
    if not env.get(index, "").isdigit() or not env.get(count, "").isdigit() or int(env[count]) < 2:
        return None
    return int(env[index]), int(env[count])


def _array(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Index and number of a task of a SLURM array, whose ids are evenly spaced."""
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    texts = [env.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
    if not texts[0]:
        return None
    number, first, last, step, count = (int(text) if text.isdigit() else -1 for text in texts)
    if min(number, first, last) < 0 or min(step, count) < 1 or (number - first) % step:
        number = -1
    if number < 0 or (last - first) // step + 1 != count:
        raise ValueError(
            f"SLURM's array task {texts[0]} is not of evenly spaced ones, so that its share is not known; give "
            "--part I/N, or an array such as --array=0-15"
        )
    return ((number - first) // step, count) if count > 1 else None
