"""Loads run configurations by name, with overrides of fields: `optimizer.learning_rate=2e-5 data.ratio=5,1,4`.

Works on any frozen dataclasses, nested or in tuples; types are those of the annotations.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from janus_jax.io import files
from janus_jax.io.fields import shown
from janus_jax.io.messages import did_you_mean, nearest, one_line

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
_LONGEST_KEY = 200
_MOST = 2**63  # above the integers that arrays and files can hold
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


# ---------------------------------------------------------------- finding


def config_names() -> list[str]:
    """Names that `load_config` knows, from `configs/`; files with a leading underscore are helpers."""
    return sorted(_paths())


def _paths() -> dict[str, pathlib.Path]:
    return {path.stem: path for path in CONFIGS.rglob("*.py") if not path.stem.startswith("_")}


def load_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """The config from `get_config()` in `<name>.py`, in `configs/` or below, or in the .py file `name`, with overrides.

    Raises: ValueError in one line for an unknown name, a file that does not return a dataclass, or a bad override.
    """
    if name in (paths := _paths()):
        path = paths[name]
    elif name.endswith(".py"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"config file {one_line(name)} does not exist")
    else:
        known = config_names()
        raise ValueError(f"unknown config {shown(name)}{did_you_mean(name, known, 3)}; known: {', '.join(known)}")
    config = override(_get_config(path), overrides)
    try:
        check_types(config)
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from None
    return config


def _get_config(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"config_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config()")
        config = module.get_config()
        if not dataclasses.is_dataclass(config) or isinstance(config, type):
            raise ValueError(f"its get_config() returns a {type(config).__name__}, not a dataclass instance")
    except Exception as error:
        # The config is the user's own code: they need its line, not our frames above it.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = one_line(f"{path}:{frames[-1].lineno}" if frames else path)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{_one_line(error)}") from None
    return config


# ---------------------------------------------------------------- overriding


def override(config: Any, overrides: Sequence[str]) -> Any:
    """`config` with each `key=value` of `overrides` applied; the last one for a key wins.

    Values: integers (also 1_000 and 1e3), numbers, true or false, text, a choice of a Literal, `none` if optional;
    tuples with commas, or as a JSON list if their strings contain commas; nothing after the `=` for ().
    Fields of a tuple of dataclasses are named by index: `stages.0.steps=5`.
    All are applied together, so that fields which a `__post_init__` compares can change at once.

    Raises: ValueError in one line naming the key, and for an unknown key the nearest ones.
    """
    changes: dict[tuple[str, ...], str] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"an override must be key=value, got {shown(item)}")
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"unknown key {shown(key)}")
        changes[tuple(key.split("."))] = text
    return _changed(config, type(config), changes, "", config)


def _changed(value: Any, hint: Any, changes: Mapping[tuple[str, ...], str], key: str, root: Any) -> Any:
    """`value` at the dotted `key`, of type `hint`, with `changes` by what remains of their paths."""
    if () in changes:
        if len(changes) > 1:
            raise ValueError(f"{key} is set both as a whole and by its fields; give one or the other")
        return _parse(changes[()], hint, value, key)
    if value is None and dataclasses.is_dataclass(inner := _without_none(hint)):
        value = inner()  # a field of an optional part that is left out so far
    groups: dict[str, dict[tuple[str, ...], str]] = {}
    for (head, *rest), text in changes.items():
        groups.setdefault(head, {})[tuple(rest)] = text
    children = fields_of(value, hint)
    made = {}
    for head, group in groups.items():
        name = f"{key}.{head}" if key else head
        if head not in children:
            raise ValueError(_unknown(".".join((name, *next(iter(group)))), root))
        made[head] = _changed(*children[head], group, name, root)
    if isinstance(value, tuple):
        return tuple(made.get(str(i), item) for i, item in enumerate(value))
    try:
        return dataclasses.replace(value, **made)
    except ValueError as error:
        keys = (".".join(filter(None, (key, *path))) + f"={one_line(text)}" for path, text in changes.items())
        raise ValueError(f"{', '.join(keys)}: {_one_line(error)}") from None


def fields_of(value: Any, hint: Any) -> dict[str, tuple[Any, Any]]:
    """(value, type) by name for a dataclass's fields, or by index for a tuple's items; {} for anything else."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return {f.name: (getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple):
        return {str(i): (item, _item_type(hint, i)) for i, item in enumerate(value)}
    return {}


def _item_type(hint: Any, index: int) -> Any:
    args = typing.get_args(_without_none(hint)) or (str, ...)
    return args[0] if len(args) == 2 and args[1] is ... else args[index]


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _parse(text: str, hint: Any, value: Any, key: str) -> Any:
    """`text` parsed as a value of type `hint`; `value` is the present one."""
    inner = _without_none(hint)
    if inner is not hint and text.lower() == "none":
        return None
    below = fields_of(inner() if value is None and dataclasses.is_dataclass(inner) else value, hint)
    if dataclasses.is_dataclass(inner) or any(dataclasses.is_dataclass(item) for item, _ in below.values()):
        shown = ", ".join(f"{key}.{name}" for name in below)
        raise ValueError(f"{key} is not a single value; set its fields: {shown}")
    try:
        return _value(text, inner)
    except ValueError as error:
        raise ValueError(f"{key}={one_line(text)}: {error}") from None


def _value(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in choices:
            raise ValueError(f"{shown(text)} is not one of {', '.join(choices)}{did_you_mean(text, choices, 3)}")
        return choices[text]
    if typing.get_origin(hint) is tuple:
        items = _items(text)
        args = typing.get_args(hint)
        if args[-1] is not ... and len(items) != len(args):
            raise ValueError(f"needs {len(args)} values ({type_name(hint)}), got {len(items)}")
        return tuple(_value(item, _item_type(hint, i)) for i, item in enumerate(items))
    if hint is str:
        return text
    if hint is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if hint in (int, float):
        number = _number(text)
        if number is not None and (hint is float or (abs(number) < _MOST and number == int(number))):
            return hint(number)
    raise ValueError(f"{shown(text)} is not {_WANTED.get(hint, f'a {type_name(hint)}')}")


_WANTED = {int: "an integer", float: "a number", bool: "true or false"}


def _number(text: str) -> int | float | None:
    """`text` as a finite number, exact if it is an integer; None if it is not a number."""
    for convert in (int, float):
        try:
            number = convert(text)
        except ValueError:
            continue
        if abs(number) < _MOST or (convert is float and math.isfinite(number)):
            return number
    return None


def _items(text: str) -> list[str]:
    if not text.strip():
        return []
    if text.startswith("["):
        try:
            return [item if isinstance(item, str) else json.dumps(item) for item in files.parse_json(text, "the list")]
        except ValueError as error:
            raise ValueError(f"{shown(text)} begins like a JSON list but is not one ({error})") from None
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        raise ValueError(f"{shown(text)} has nothing between two commas or after the last one")
    return items


def _unknown(key: str, root: Any) -> str:
    known = list(flat(root))
    *path, last = key.split(".")
    # The right name under the wrong prefix, or without a prefix.
    near = [name for name in known if name.split(".")[-1] == last]
    near.sort(key=lambda name: -difflib.SequenceMatcher(None, name, key).ratio())
    near = [name for name in near if name != key]
    while path and not any(name.startswith(".".join((*path, ""))) for name in known):
        last = path.pop()
    prefix = ".".join((*path, "")) if path else ""
    here = list(dict.fromkeys(name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)))
    if not near:
        near = [prefix + name for name in nearest(last, here, 3)]
    if near:
        return f"unknown key {shown(key)}; did you mean {' or '.join(near[:3])}?"
    return f"unknown key {shown(key)}; known in {'.'.join(path) or 'the config'}: {', '.join(here)}"


def _one_line(error: BaseException) -> str:
    return one_line(" ".join(str(error).split()), 1000)


def check_types(config: Any, key: str = ""):
    """ValueError naming the first field of `config`, a dataclass, whose value is not of its annotated type.

    A config is Python: `steps="5"` would fail only when it is first compared, or count characters.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}.{field.name}" if key else field.name
        _check_type(value, hints[field.name], name)


def _check_type(value: Any, hint: Any, name: str):
    inner = _without_none(hint)
    if value is None and inner is not hint:
        return
    if dataclasses.is_dataclass(inner) and isinstance(value, inner):
        check_types(value, name)
        return
    if typing.get_origin(inner) is tuple and isinstance(value, tuple):
        args = typing.get_args(inner)
        if args[-1] is ... or len(args) == len(value):
            for index, item in enumerate(value):
                _check_type(item, _item_type(inner, index), f"{name}.{index}")
            return
    elif typing.get_origin(inner) is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(inner)):
            return
    elif inner is float:
        if type(value) in (int, float) and math.isfinite(value):
            return
    elif inner is int:
        if type(value) is int and abs(value) < _MOST:
            return
    elif not isinstance(inner, type) or isinstance(value, inner):
        return
    raise ValueError(f"{name} must be {_WANTED.get(inner, type_name(inner))}, got {shown(value)}")


# ---------------------------------------------------------------- writing


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values of `config` (or of the output of `to_json`) by dotted key; a tuple of plain values is one value."""
    if isinstance(config, Mapping):
        below = config
    elif dataclasses.is_dataclass(config):
        below = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    elif isinstance(config, (tuple, list)) and any(dataclasses.is_dataclass(x) or isinstance(x, dict) for x in config):
        below = {str(i): item for i, item in enumerate(config)}
    else:
        return {prefix: tuple(config) if isinstance(config, list) else config}
    made: dict[str, Any] = {}
    for name, value in below.items():
        made |= flat(value, f"{prefix}.{name}" if prefix else name)
    return made


def to_json(config: Any) -> dict[str, Any]:
    """`config` in JSON types: nested dicts, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def diff(a: Any, b: Any) -> list[str]:
    """Dotted keys whose values differ between two configs, each a dataclass or the output of `to_json`."""
    left, right = flat(a), flat(b)
    missing = object()
    return [key for key in left | right if left.get(key, missing) != right.get(key, missing)]


def value_text(value: Any) -> str:
    """`value` as an override would write it."""
    if isinstance(value, tuple):
        texts = [value_text(item) for item in value]
        plain = all(text and text == text.strip() and "," not in text and text[0] != "[" for text in texts)
        return ",".join(texts) if plain else json.dumps(value, ensure_ascii=False)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def type_name(hint: Any) -> str:
    """`hint` in words for a user: 'int', 'all|answers', 'str,...', 'int,int,int', 'float or none'."""
    inner = _without_none(hint)
    if inner is not hint:
        return f"{type_name(inner)} or none"
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return ",".join("..." if arg is ... else type_name(arg) for arg in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


# ---------------------------------------------------------------- command line
