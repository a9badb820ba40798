"""Writes a Janus checkpoint of any kind as a torch checkpoint (safetensors) of one of the two dialects.

python convert/to_torch.py --src janus_pro_7b --out Janus-Pro-7B-hf --dialect transformers
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the work is on disk: leave accelerators to others

from janus_jax.io.commands import leave, run
from janus_jax.io.messages import print_note
from janus_jax.weights.conversion import to_torch
from janus_jax.weights.torch_names import DIALECTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="a converted folder, or a torch checkpoint in either dialect")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dialect", required=True, choices=DIALECTS)
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, as in 5GB, 500MB, 4GiB (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it was converted or exported here")
    args = parser.parse_args()

    def work():
        to_torch(args.src, args.out, args.dialect, args.max_shard_size, args.overwrite, progress=True, note=print_note)
        print(f"{args.out}: written in the {args.dialect} dialect")

    return run(work)


if __name__ == "__main__":
    leave(main())
