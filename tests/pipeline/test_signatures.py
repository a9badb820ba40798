"""What help() and completion show of the pipeline: one order, the settings of `Options`, no *args."""

import dataclasses
import inspect

import pytest

from janus_jax import JanusPipeline
from janus_jax.__main__ import _parser
from janus_jax.sampling.sampler import Options

SHARED = [field.name for field in dataclasses.fields(Options) if field.name != "cfg_weight"]
DRAWING = ("generate_images", "generate_codes", "compile_images")
CHAT = ("chat", "stream_chat", "chat_batch", "compile_chat")


def parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(JanusPipeline, name)).parameters.values())[1:]


@pytest.mark.parametrize("name", [name for name in vars(JanusPipeline) if not name.startswith("_")])
def test_every_argument_is_named(name):
    if callable(getattr(JanusPipeline, name)):
        assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters(name))
        assert all(p.annotation is not p.empty for p in parameters(name))


@pytest.mark.parametrize("name", DRAWING + CHAT)
def test_one_order(name):
    """A setting added to Options is shown by every method, in its place and with its default."""
    given = parameters(name)
    assert [p.name for p in given[3 : 3 + len(SHARED)]] == SHARED
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in given[:4])
    assert all(p.kind == p.KEYWORD_ONLY for p in given[4:])
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    assert all(p.default == defaults[p.name] for p in given if p.name in SHARED and p.name != "temperature")
    model = {p.name: p.default for p in parameters("generate_images" if name in DRAWING else "chat")}
    assert all(p.default == model[p.name] for p in given[2:])


@pytest.mark.parametrize("command", [["generate", "--prompt", "a cat", "--out", "x"], ["chat", "What is it?"]])
def test_the_command_line_offers_them(command):
    args = _parser().parse_args([*command, "--model", "m", "--top-k", "7", "--seed", "3"])
    method = {"generate": "generate_images", "chat": "chat"}[command[0]]
    defaults = {p.name: p.default for p in parameters(method) if p.name in (*SHARED, "cfg_weight")}
    given = {name: getattr(args, name) for name in defaults}
    assert given == defaults | {"top_k": 7, "seed": 3}


def test_speculation_is_of_drawing_alone():
    """Every way to draw takes the window, by the same name and default, the command too."""
    for name in DRAWING:
        (given,) = (p for p in parameters(name) if p.name == "speculate")
        assert given.kind == given.KEYWORD_ONLY and given.default == "auto"
    assert not any(p.name == "speculate" for name in CHAT for p in parameters(name))
    generate = ["generate", "--model", "m", "--prompt", "a cat", "--out", "x"]
    for given, taken in ((), "auto"), (("off",), False), (("auto",), "auto"), (("16",), 16):
        assert _parser().parse_args([*generate, *(f"--speculate={x}" for x in given)]).speculate == taken
        served = ["serve", "--model", "m", *(f"--speculate={x}" for x in given)]
        assert _parser().parse_args(served).speculate == taken


@pytest.mark.parametrize("wrong", ["0", "1", "-3", "on", "8.0", ""])
def test_windows_that_the_command_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        _parser().parse_args(["generate", "--model", "m", "--prompt", "a cat", "--out", "x", f"--speculate={wrong}"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument --speculate: must be auto, off or a number of codes from 2, got {wrong!r}")
