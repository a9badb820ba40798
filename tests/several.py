"""Several processes of one run on this machine, through the command line."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("localhost", 0))
        return door.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    """Of a process with so many CPU devices that runs this checkout from any folder."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    return os.environ | own | more


def launch(
    config: pathlib.Path | str,
    env: dict[str, str],
    cwds: list[pathlib.Path],
    *overrides: list[str],
    module: str = "train.main",
) -> list[subprocess.Popen]:
    """Starts the processes of one run, each in one of `cwds`; `overrides` are of one process each."""
    coordinator, count = f"localhost:{free_port()}", len(cwds)
    overrides = overrides or ([],) * count
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(config), *own, "--coordinator", coordinator,
             "--processes", str(count), "--process", str(number), "--timeout", "60"],
            cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, (cwd, own) in enumerate(zip(cwds, overrides, strict=True))
    ]  # fmt: skip


def outcome(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each."""
    try:
        told = [process.communicate(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, told, strict=True):
        if process.returncode < 0:  # pytest shortens what an assertion shows
            print(f"signal {-process.returncode}:", *errors.splitlines()[-60:], sep="\n")
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


_GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s")


def ours(text: str) -> list[str]:
    """Lines but those of Gloo, which tells of its connections by itself: from several threads, between one another."""
    return [line for line in text.splitlines() if _GLOO.sub("", line)]
