"""From a reward's config to what is called."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from janus_jax.io.messages import did_you_mean, error_text, one_line
from train.rl.config import ROLLOUTS, RewardConfig

Metadata = Sequence[Mapping[str, Any]]
# What is judged, N of it: pictures uint8 [N, h, w, 3], or the texts of answers.
Judged = np.ndarray | Sequence[str]
# What is judged, its prompts, and what else is known of each; N numbers, in any form of an array.
Reward = Callable[[Any, Sequence[str], Metadata], Any]
_ERROR = 300  # characters


class RewardFailed(Exception):
    """A call gave no scores; the message says why."""


def name_of(config: RewardConfig) -> str:
    """What the reward is called in metrics and messages."""
    return config.name or config.function.rpartition(":")[2]


def check_config(config: RewardConfig) -> None:
    """ValueError in one line for what can be seen without importing anything."""
    module, colon, name = config.function.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module.split("."), name))):
        raise ValueError(
            f"a reward's function must be package.module:name, such as train.rl.rewards.brightness:brightness, got "
            f"{one_line(config.function)!r}"
        )
    told = f"reward {name_of(config)}"
    if not np.isfinite(config.weight):
        raise ValueError(f"{told}: weight must be a number, got {config.weight}")
    for field, least in (("workers", 0), ("batch_size", 1), ("tries", 1)):
        if (given := getattr(config, field)) < least:
            raise ValueError(f"{told}: {field} must be at least {least}, got {given}")
    if not config.timeout > 0:
        raise ValueError(f"{told}: timeout must be above 0 seconds, got {config.timeout}")
    options_of(config)


def options_of(config: RewardConfig) -> dict[str, Any]:
    """The options by name; a value is JSON, or else text."""
    found: dict[str, Any] = {}
    for option in config.options:
        key, equals, text = option.partition("=")
        if not equals or not key.isidentifier() or key in found:
            told = "is given twice" if key in found else "must be key=value"
            raise ValueError(f"reward {name_of(config)}: the option {one_line(option)!r} {told}")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def reward_of(config: RewardConfig, rollouts: str = "pictures") -> Reward:
    """What is called, with the options; a class is made here, and may load a model.

    Args:
      rollouts: one of `ROLLOUTS`: what it has to judge.
    Raises: ValueError in one line for a name, an option or a model that is not there, or a reward of something else.
    """
    check_config(config)
    told, options = f"reward {name_of(config)}", options_of(config)
    module_name, _, name = config.function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module may be anybody's
        raise ValueError(f"{told}: {module_name} cannot be imported ({_said(error)})") from None
    found = getattr(module, name, None)
    if not callable(found):
        public = [each for each in vars(module) if not each.startswith("_")]
        raise ValueError(f"{told}: {module_name} has no function {name}{did_you_mean(name, public)}")
    made = inspect.isclass(found)
    judges = _judges(found)
    if judges in ROLLOUTS and judges != rollouts:
        raise ValueError(
            f"{told}: {config.function} judges {judges}, but grpo.rollouts is {rollouts}; name a reward of {rollouts}"
        )
    try:
        inspect.signature(found).bind(*([] if made else [None] * 3), **options)
    except TypeError as error:
        takes = "" if made else f" {rollouts}, prompts, metadata and its options"
        raise ValueError(f"{told}: {config.function} is not called with{takes or ' its options'} ({error})") from None
    except ValueError:
        pass  # a function of C, which does not say what it takes
    if not made:
        return functools.partial(found, **options)
    try:
        return found(**options)
    except Exception as error:
        raise ValueError(f"{told}: {_said(error)}") from None


def _judges(found: Any) -> str:
    """The name of the first argument with which a function, or an object of a class, is called; '' if it has none."""
    try:
        called = list(inspect.signature(found.__call__ if inspect.isclass(found) else found).parameters)
    except (TypeError, ValueError):
        return ""
    return next(iter(called[1:] if inspect.isclass(found) else called), "")


def call(reward: Reward, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
    """The reward's numbers, float64 [N]; some may not be finite. RewardFailed if it has not given N numbers."""
    count = len(judged)
    try:
        given = reward(judged, prompts, metadata)
    except Exception as error:  # it may be anybody's
        raise RewardFailed(_said(error)) from None
    try:
        values = np.asarray(given, np.float64)
    except Exception:
        raise RewardFailed(f"it must return {count} numbers, got {one_line(type(given).__name__)}") from None
    if values.shape != (count,):
        raise RewardFailed(f"it must return {count} numbers, got an array of shape {list(values.shape)}")
    return values


def needs_torch() -> None:
    """ValueError in one line without torch or transformers."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"it needs {error.name}; pip install torch transformers") from None


def _said(error: Exception) -> str:
    """The error in one line, with the line of code that raised it unless it is a message for people."""
    said = error_text(error)
    if not isinstance(error, ValueError | OSError):
        said = f"{type(error).__name__}: {said}"
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is not None and frame.tb_frame.f_code.co_filename not in (__file__, "<frozen importlib._bootstrap>"):
            said += f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})"
    return one_line(said, _ERROR)
