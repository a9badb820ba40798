"""Command line of training: `python -m train.main --config 7b_stage3 optimizer.learning_rate=2e-5`."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from janus_jax import compilation_cache
from janus_jax.io.messages import error_text, print_any_text, print_line
from janus_jax.io.store_access import StoreUnavailable
from janus_jax.sampling.memory import OutOfMemory
from train.command_line import parse_args
from train.config import refused_options
from train.run import distributed, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one configuration; returns 0 on success, else an exit code of `train.run.faults`, with one line why."""
    print_any_text()
    config, processes = parse_args(argv)
    steal, dry = processes.pop("steal"), processes.pop("dry_run")
    compilation_cache.enable()
    try:
        distributed.start(**processes)
        if dry:
            return checker_of(config)(config, steal)
        runner_of(config)(config, steal)
    except faults.Stopped as error:
        return _end(f"stopped: {error_text(error)}", error.code, error.alone)
    except StoreUnavailable as error:
        return _end(f"stopped: {error_text(error)}; run the same command again later", faults.STORAGE, alone=True)
    except (OSError, ValueError, OutOfMemory) as error:
        return _end(f"error: {error_text(error)}", faults.BAD_INPUT)
    except jax.errors.JaxRuntimeError as error:
        if refused := refused_options(error):
            return _end(f"error: {refused}", faults.BAD_INPUT)
        if not OutOfMemory.says(error):
            raise
        cause = "a step does not fit in the devices' memory; raise accumulate, or give mesh.fsdp more devices"
        return _end(f"stopped: {cause}", faults.STOPPED)
    except KeyboardInterrupt:
        return _end("interrupted; run the same command to resume from the last checkpoint", faults.INTERRUPTED)
    return 0


def runner_of(config: Any) -> Callable[[Any, bool], Any]:
    """The function that runs `config`, named by its class as `RUNNER`; ValueError if there is none.

    By name, so that configs need not import the code that runs them.
    """
    runner = getattr(config, "RUNNER", None)
    if not isinstance(runner, str):
        raise ValueError(f"the config is a {type(config).__name__}, which names no RUNNER; return a TrainConfig")
    return pkgutil.resolve_name(runner)


def checker_of(config: Any) -> Callable[[Any, bool], int]:
    """The function that looks at what `config` needs, named by its class as `CHECKER`; ValueError if there is none."""
    checker = getattr(config, "CHECKER", None)
    if not isinstance(checker, str):
        raise ValueError(f"--dry-run is for a training run, whose config is a TrainConfig, not {type(config).__name__}")
    return pkgutil.resolve_name(checker)


def _end(line: str, code: int, alone: bool = False) -> int:
    several = jax.distributed.is_initialized()
    if not several or jax.process_index() == 0 or alone:
        print_line(line)
    if several and code != faults.AGAIN and faults.is_own_process():
        # A normal exit waits in JAX for the other processes, which may be waiting for this one.
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    faults.own_process()
    sys.exit(main())
