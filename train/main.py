"""Command line of training: `python -m train.main --config 7b_stage3 optimizer.learning_rate=2e-5`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from janus_jax.memory import OutOfMemory
from train.config import TrainConfig
from train.overrides import parse_args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one configuration; 0 when it is done, 2 for bad input (one line on standard error), 130 when interrupted."""
    config = parse_args(argv)
    try:
        if isinstance(config, TrainConfig):
            from train.loop import train

            train(config)
        else:
            from train.digits import run

            run(config)
    except (OSError, ValueError, OutOfMemory) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # JAX's own and the like, whose traceback is needed
            raise
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
