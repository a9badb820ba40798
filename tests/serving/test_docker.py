"""The Dockerfile agrees with the package: what it copies, which extras it names, how it starts the server."""

import json
import pathlib
import re
import tomllib

from janus_jax import __main__ as commands

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def test_what_is_copied_suffices_for_the_package():
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert copied == {"janus_jax", "pyproject.toml", project["readme"], *project["license-files"]}
    for extras in re.findall(r"EXTRAS=(\S+)", TEXT):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_command_is_one():
    (command,) = map(json.loads, re.findall(r"^ENTRYPOINT (.*)$", TEXT, re.MULTILINE))
    assert command[:3] == ["python", "-m", "janus_jax"]
    args = commands._parser().parse_args([*command[3:], "--model", "/model"])
    (asked,) = re.findall(r"http://127.0.0.1:(\d+)/health", TEXT)
    assert args.host == "0.0.0.0" and f"EXPOSE {args.port}" in TEXT and int(asked) == args.port
