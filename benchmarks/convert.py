"""Seconds and peak memory of converting a full-size checkpoint.

    python -m benchmarks.convert --preset janus_pro_7b --verify

Writes random weights in the original dialect (bfloat16, two shards and their index), converts them in a separate
process, and deletes everything again. Exits with 1 if the conversion fails or takes 6 GiB or more.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from janus_jax.config import PRESETS, JanusConfig, get_preset, original_config
from janus_jax.io.messages import print_any_text
from janus_jax.weights.formats.safetensors_files import TensorToWrite, write_sharded
from janus_jax.weights.torch_names import carried_shapes, slots

BOUND_GIB = 6.0
ROOT = pathlib.Path(__file__).resolve().parent.parent


def write_random_checkpoint(folder: pathlib.Path, config: JanusConfig) -> int:
    """Writes `config`'s tensors, each another stretch of one random block, into two shards; returns their bytes."""
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(ml_dtypes.bfloat16)

    def tensor(name: str, shape: tuple[int, ...], number: int) -> TensorToWrite:
        # An odd stride between the starts keeps tensors of one shape, and layers of one stack, apart.
        def read() -> np.ndarray:
            return np.resize(np.roll(block, -number * 4099), math.prod(shape)).reshape(shape)

        return TensorToWrite(name, shape, block.dtype, read)

    shapes = {slot.name: slot.tensor_shape for slot in slots(config, "original")} | carried_shapes(config)
    tensors = [tensor(name, shape, number) for number, (name, shape) in enumerate(shapes.items())]
    num_bytes = sum(t.num_bytes for t in tensors)
    write_sharded(folder, tensors, num_bytes * 51 // 100)
    (folder / "config.json").write_text(json.dumps(original_config(config)), encoding="utf-8")
    return num_bytes


def run(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its seconds and its peak resident memory in GiB. Raises CalledProcessError."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak_kib = 0
    while process.poll() is None:
        # getrusage would count this process's own memory, too, which a child begins with.
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        peak_kib = max([peak_kib, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, peak_kib / 2**20


def main() -> int:
    print_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="janus_pro_7b", choices=sorted(PRESETS))
    parser.add_argument("--verify", action="store_true", help="have the converter compare its result with the source")
    parser.add_argument("--back", action="store_true", help="also write the result as a torch checkpoint again")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()

    print(f"{'step':<14}{'seconds':>9}{'GB/s':>8}{'peak GiB':>10}{'bound':>7}")
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="janus_convert_", dir=args.folder) as name:
        src, out, back = (pathlib.Path(name) / part for part in ("src", "out", "back"))
        src.mkdir()
        num_bytes = write_random_checkpoint(src, get_preset(args.preset))
        steps = {"from_torch": [str(ROOT / "convert/from_torch.py"), "--src", str(src), "--out", str(out)]}
        if args.verify:
            steps["from_torch"].append("--verify")
        if args.back:
            steps["to_torch"] = [str(ROOT / "convert/to_torch.py"), "--src", str(out), "--out", str(back)]
            steps["to_torch"] += ["--dialect", "transformers"]
        for step, command in steps.items():
            try:
                seconds, peak = run([sys.executable, *command])
            except subprocess.CalledProcessError as error:
                print(f"error: {step} ended with code {error.returncode}", file=sys.stderr)
                return 1
            worst = max(worst, peak)
            print(
                f"{step:<14}{seconds:>9.1f}{num_bytes / seconds / 1e9:>8.2f}{peak:>10.2f}{BOUND_GIB:>7.1f}", flush=True
            )
    print(f"{args.preset}: {num_bytes / 1e9:.2f} GB of weights")
    return 0 if worst < BOUND_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
