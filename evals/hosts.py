"""Several processes that evaluate together: the first one has the files, and all fail together."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import jax

from janus_jax.io.messages import error_text
from janus_jax.processes import gather


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options by which several processes find each other."""
    several = parser.add_argument_group("several processes", "with --mesh over all their devices")
    several.add_argument("--coordinator", metavar="HOST:PORT", default="", help="host of process 0, and a free port")
    several.add_argument("--processes", metavar="N", type=int, help="number of processes")
    several.add_argument("--process", metavar="I", type=int, help="index of this process, from 0")


def check_mesh(mesh: str | None) -> None:
    """ValueError if there are several processes, and no mesh for them."""
    if jax.process_count() > 1 and mesh is None:
        raise ValueError(f"several processes need --mesh over all of their devices, such as data={jax.device_count()}")


def start(coordinator: str, processes: int | None, process: int | None, timeout: int = 300) -> None:
    """Joins the other processes; call it before anything else uses a device. Without arguments there are none.

    Raises: ValueError if only some of the arguments are given, or the others do not come in time.
    """
    given = [bool(coordinator), processes is not None, process is not None]
    if not any(given):
        return
    if not all(given):
        raise ValueError("--coordinator, --processes and --process go together; give all three, or none")
    if not 0 <= process < processes:
        raise ValueError(f"--process must be from 0 to below --processes {processes}, got {process}")
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)
    except RuntimeError as error:
        raise ValueError(f"the {processes} processes have not found each other: {error_text(error)}") from None


def is_first() -> bool:
    """Whether this process reads and writes the output folder."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises bad input of one process in all of them, which would otherwise wait forever."""
    failed = ""
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        failed = f"process {jax.process_index()}: {error_text(error)}"
    for told in gather(failed) if jax.process_count() > 1 else ():
        if told:
            raise ValueError(told)
