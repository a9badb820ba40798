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
    parser.add_argument("--adapter", metavar="DIR", help="a low-rank adapter in PEFT's files; needs --merge")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights that are written")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, as in 5GB, 500MB, 4GiB (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it was converted or exported here")
    args = parser.parse_args()

    def work():
        if (args.adapter is None) == args.merge:
            raise ValueError("--adapter DIR and --merge go together: the checkpoint is written with the adapter merged")
        sizes = {"max_shard_size": args.max_shard_size, "overwrite": args.overwrite}
        to_torch(args.src, args.out, args.dialect, progress=True, note=print_note, adapter=args.adapter, **sizes)
        print(f"{args.out}: written in the {args.dialect} dialect")

    return run(work)


if __name__ == "__main__":
    leave(main())
