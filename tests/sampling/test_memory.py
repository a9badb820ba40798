"""How much memory is free: of this machine, a container, an accelerator, and of all processes."""

from typing import ClassVar

import jax
import numpy as np
import pytest

from janus_jax.sampling import memory
from janus_jax.sampling.batches import fitting
from janus_jax.sampling.memory import OutOfMemory, available_bytes, least_available_bytes
from tests.library.tiny_janus import SHORT, codes, folder, janus  # noqa: F401

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1234 bytes.\nBuffers:\n  ..."


def test_available_bytes():
    free = available_bytes(jax.devices()[0])
    assert isinstance(free, int) and 2**20 < free < 2**50


def test_available_bytes_in_a_container(tmp_path, monkeypatch):
    """A container's limit counts where it is tighter than the machine's memory."""
    monkeypatch.setattr("janus_jax.sampling.memory._CGROUP", tmp_path)
    device = jax.devices()[0]
    assert available_bytes(device) > 2**20  # no limit told
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_bytes(device) == 700
    (tmp_path / "memory.max").write_text("200\n")
    assert available_bytes(device) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(device) > 2**20


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: 1024 kB\n", "MemAvailable:\n", "?\nMemAvailable: x kB\n"])
def test_available_bytes_where_the_machine_does_not_tell(tmp_path, monkeypatch, meminfo):
    """As in gVisor and in old kernels: no figure, unless the container's limit is one."""
    monkeypatch.setattr("janus_jax.sampling.memory._MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("janus_jax.sampling.memory._CGROUP", tmp_path)
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    assert available_bytes(jax.devices()[0]) is None
    assert fitting(5, 1000, None, {}) == 5
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_bytes(jax.devices()[0]) == 700


class Device:
    """An accelerator of this process, or (stats None) of another one, which does not let itself be asked."""

    platform = "gpu"

    def __init__(self, stats, mine: bool = True):
        self._stats, self._mine = stats, mine

    def memory_stats(self):
        if not self._mine:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: MemoryStats is only supported for addressable devices")
        return self._stats


def test_pages_of_files_count_as_free(tmp_path, monkeypatch):
    """A container that has read a large checkpoint once has its limit full of pages that it would give back."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 100\nactive_file 200\ninactive_file 500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_bytes(jax.devices()[0]) == 800


def test_available_bytes_of_an_accelerator():
    assert available_bytes(Device({"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert available_bytes(Device(None)) is None
    assert available_bytes(Device({"bytes_in_use": 30})) is None


class TwoProcesses:
    """A mesh whose first devices are another process's, seen from the second one."""

    is_multi_process = True
    shape: ClassVar = {"slices": 1, "data": 1, "fsdp": 4}

    def __init__(self, *mine: Device):
        self.local_devices = mine
        self.devices = np.array([Device(None, mine=False), *mine])


@pytest.mark.parametrize(
    ("mine", "theirs", "least"),
    [
        ([{"bytes_limit": 9 << 20}, {"bytes_limit": 7 << 20}], 8, 7 << 20),
        ([{"bytes_limit": 9 << 20}, {"bytes_limit": 7 << 20}], 3, 3 << 20),
        ([{"bytes_limit": 80 << 30}, None], -1, 80 << 30),
        ([None], 5, 5 << 20),
        ([None], -1, None),
        ([{"bytes_limit": 1 << 20, "bytes_in_use": 3 << 20}], 8, 0),
    ],
)
def test_the_least_of_all_processes(monkeypatch, mine, theirs, least):
    monkeypatch.setattr("janus_jax.sampling.memory.process_allgather", lambda own: np.array([theirs, int(own)]))
    mesh = TwoProcesses(*map(Device, mine))
    assert least_available_bytes(mesh) == least
    assert fitting(10, 1000, mesh, {}) == (12 if least is None else max(1, least * 8 // 10 // 250))


def test_whether_an_error_is_about_memory():
    assert OutOfMemory.says(jax.errors.JaxRuntimeError(EXHAUSTED))
    assert not OutOfMemory.says(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"))
