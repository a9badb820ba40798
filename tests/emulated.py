"""Makes this process's CPU devices look like an accelerator's to janus_jax and train, and to nobody else.

Run as a program it is `python -m train.main` on such devices: `python -m tests.emulated --config ...`. What they are
is said by JANUS_JAX_EMULATE, as "tpu" or "gpu", and JANUS_JAX_EMULATE_BYTES, of one device's memory.
"""

from __future__ import annotations

import os
import runpy
import sys

import jax

_OURS = ("janus_jax", "train", "__main__")


def emulate(platform: str, limit: int = 16 << 30):
    """From here on `platform` and `memory_stats` of devices are an accelerator's for code of ours.

    As on real ones, a device of another process does not let itself be asked for its memory.
    """
    real = jax.Device.platform

    def seen(device: jax.Device) -> str:
        name = sys._getframe(1).f_globals.get("__name__", "")
        return platform if name.partition(".")[0] in _OURS else real.__get__(device)

    def memory_stats(device: jax.Device) -> dict[str, int]:
        if device.process_index != jax.process_index():
            raise jax.errors.JaxRuntimeError(
                "INVALID_ARGUMENT: MemoryStats is only supported for addressable PjRt devices."
            )
        return {"bytes_limit": limit, "bytes_in_use": limit // 4}

    jax.Device.platform = property(seen)
    jax.Device.memory_stats = memory_stats


def emulate_slices(count: int):
    """From here on the devices are of `count` slices, as many of each, in the order of their ids."""
    size = jax.device_count() // count
    jax.Device.slice_index = property(lambda device: device.id // size)


if __name__ == "__main__":
    emulate(os.environ["JANUS_JAX_EMULATE"], int(os.environ.get("JANUS_JAX_EMULATE_BYTES", 16 << 30)))
    runpy.run_module("train.main", run_name="__main__", alter_sys=True)
