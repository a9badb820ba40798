"""The command line of a run: a config by name, overrides of its fields, and how to find its other processes."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from janus_jax.io.messages import print_error
from train.overrides import config_names, fields_of, flat, load_config, type_name, value_text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse_args(
    argv: Sequence[str] | None = None, prog: str = "python -m train.main"
) -> tuple[Any, dict[str, str | int | None]]:
    """The config of `--config NAME [key=value ...]`; the arguments of `distributed.start`, `steal` and `dry_run`.

    `--help` (with a config: all its fields) and `--print-config` print and exit with 0; bad input prints one line,
    `error: ...`, on standard error and exits with 2.
    """
    parser = _Parser(
        prog=prog, add_help=False, allow_abbrev=False,
        usage="%(prog)s --config NAME [key=value ...] [--help] [--print-config] [--dry-run] [--steal] "
        "[--coordinator HOST:PORT --processes N --process I] [--timeout SECONDS]",
        epilog=f"configs: {', '.join(config_names())}",
    )  # fmt: skip
    parser.add_argument("--config", metavar="NAME", help="a config by name, or a .py file with get_config()")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of single fields")
    parser.add_argument("--help", "-h", action="store_true", help="with --config, list every field of that config")
    parser.add_argument("--print-config", action="store_true", help="print every field's value and do nothing")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check everything that the run needs on these hosts, say what was found, and stop before the first step",
    )  # fmt: skip
    parser.add_argument(
        "--steal", action="store_true", help="take over the workdir from another start, which then ends"
    )
    several = parser.add_argument_group("several processes", "detected automatically on TPU pods and under SLURM")
    several.add_argument("--coordinator", metavar="HOST:PORT", default="", help="host of process 0, and a free port")
    several.add_argument("--processes", metavar="N", type=int, help="number of processes")
    several.add_argument("--process", metavar="I", type=int, help="index of this process, from 0")
    several.add_argument(
        "--timeout", metavar="SECONDS", type=int, default=300, help="how long to wait for the others (default: 300)"
    )
    try:
        args = parser.parse_intermixed_args(argv)
        if args.config is None and not args.help:
            raise ValueError(f"--config NAME is missing; known: {', '.join(config_names())}")
        config = None if args.config is None else load_config(args.config, args.overrides)
    except (OSError, ValueError) as error:
        print_error(error)
        raise SystemExit(2) from None
    if args.help:
        print(parser.format_help() if config is None else f"{parser.format_usage()}\n{help_text(config)}")
    elif args.print_config:
        print("\n".join(f"{key} = {value_text(value)}" for key, value in flat(config).items()))
    else:
        keys = ("coordinator", "processes", "process", "timeout", "steal", "dry_run")
        return config, {key: getattr(args, key) for key in keys}
    raise SystemExit(0)


def help_text(config: Any) -> str:
    """A line for each field of `config`: dotted key, type, value, and its description in the class's docstring."""
    rows = list(_help_rows(config, "", ""))
    widths = [min(max((len(row[i]) for row in rows), default=0), 40) for i in (0, 1)]
    return "\n".join(
        f"{key:{widths[0]}}  {kind:{widths[1]}}  = {value}{f'  # {text}' if text else ''}"
        for key, kind, value, text in rows
    )


def _help_rows(value: Any, hint: Any, key: str, text: str = "") -> Iterator[tuple[str, str, str, str]]:
    children = fields_of(value, hint)
    if not dataclasses.is_dataclass(value) and not any(dataclasses.is_dataclass(v) for v, _ in children.values()):
        yield key, type_name(hint), value_text(value), text
        return
    described = _attributes(type(value))
    for name, (child, child_hint) in children.items():
        yield from _help_rows(child, child_hint, f"{key}.{name}" if key else name, described.get(name, ""))


def _attributes(cls: type) -> dict[str, str]:
    """Descriptions in the 'Attributes:' section of a docstring, by name."""
    _, _, section = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        start = re.match(r"  (\w+(?:, \w+)*): +(.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        elif line.startswith("   "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            break
    return found
