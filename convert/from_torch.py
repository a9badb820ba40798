"""Converts a torch checkpoint of Janus, in either dialect, for JAX.

python convert/from_torch.py --src Janus-Pro-7B --out janus_pro_7b --verify
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the work is on disk: leave accelerators to others

from janus_jax.io.commands import leave, run
from janus_jax.io.messages import print_note
from janus_jax.weights.conversion import from_torch
from janus_jax.weights.quantize import FORMS
from janus_jax.weights.torch_weights import DTYPES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="folder with config.json and weights, or hub id")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="cast the parameters (default: keep the checkpoint's)")
    parser.add_argument("--weights", choices=FORMS, help="quantize the decoder's and the heads' kernels (default: no)")
    parser.add_argument(
        "--verify", action="store_true", help="read the result and compare it with the source, bit for bit"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it was converted or exported here")
    args = parser.parse_args()

    def work():
        from_torch(args.src, args.out, args.dtype, args.verify, args.overwrite, True, print_note, args.weights)
        print(f"{args.out}: converted{' and verified' if args.verify else ''}")

    return run(work)


if __name__ == "__main__":
    leave(main())
